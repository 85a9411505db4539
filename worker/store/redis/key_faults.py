"""Refusals of a stream's keys: which errors they are, what is wrong, and the command that repairs it."""

from collections.abc import Mapping

import orjson
from redis.exceptions import (
    AskError,
    ClusterError,
    ExecAbortError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
    TryAgainError,
)

from ..ports import KeyFault
from .connection import Reply

#: Redirections of a cluster: the command was not run, because the slot of its keys moved or moves now. The
#: client library takes the code off their text. MOVED and ASK close all connections.
_REDIRECTIONS = (AskError, TryAgainError)  # MovedError is an AskError
#: Errors of a whole server, or of a reader's name, by class and by first word. Any other concerns a stream.
_OF_THE_SERVER = (ReadOnlyError, OutOfMemoryError, ClusterError, ExecAbortError, *_REDIRECTIONS)
_SERVER_CODES = frozenset(
    {
        *("OOM", "READONLY", "MISCONF", "NOREPLICAS", "BUSY", "LOADING", "TRYAGAIN", "NOAUTH", "MASTERDOWN"),
        *("UNKILLABLE", "UNFENCED", "OUTDATED", "UNBLOCKED"),
    }
)
#: The last possible entry id: a stream that has reached it takes no more entries.
_LAST_ID = b"18446744073709551615-18446744073709551615"


def concerns_one_stream(reply: Exception) -> bool:
    """Whether an error reply is about the keys of a command, not about the server or a reader's name."""
    if not isinstance(reply, ResponseError) or isinstance(reply, _OF_THE_SERVER):
        return False
    return str(reply).partition(" ")[0] not in _SERVER_CODES


def was_redirected(reply: Reply) -> bool:
    """Whether a command was not run because its slot is on another node, or moves to one now."""
    return isinstance(reply, _REDIRECTIONS)


def type_faults(types: Mapping[str, str], replies: Mapping[str, Reply], *, cluster: bool) -> list[KeyFault]:
    """The keys whose type (``replies``, of the command TYPE) is not the expected one, or that are forbidden.

    If all are forbidden, the command TYPE itself is, and nothing is known.
    """
    faults = []
    forbidden = [key for key, reply in replies.items() if isinstance(reply, NoPermissionError)]
    for key, expected in types.items():
        reply = replies[key]
        if key in forbidden and len(forbidden) < len(types):
            repair = f"ACL SETUSER <user> {_word('~' + key)}"
            faults.append(KeyFault(key, "may not be used by this user", repair))
        elif isinstance(reply, bytes) and reply not in (b"none", expected.encode()):
            problem = f"is a {reply.decode(errors='replace')}, not a {expected}"
            faults.append(KeyFault(key, problem, _set_aside(key, "damaged", cluster)))
    return faults


def is_full(reply: Reply) -> bool:
    """Whether the last id of a stream (``reply``, of last_id.lua) is the last possible one."""
    return bool(reply == _LAST_ID)


def full_fault(key: str, *, is_job_stream: bool, cluster: bool) -> KeyFault:
    """The fault of a stream that takes no more entries."""
    problem = "has reached the last possible entry id and takes no more entries"
    repair = _set_aside(key, "full", cluster)
    if is_job_stream:
        repair = f"once none of its jobs is queued or pending: {repair}"
    return KeyFault(key, problem, repair, blocks=not is_job_stream)


def _set_aside(key: str, suffix: str, cluster: bool) -> str:
    """The command that renames a key. On a cluster both names must be in one slot."""
    aside = f"{{{key}}}:{suffix}" if cluster and "{" not in key else f"{key}:{suffix}"
    return f"RENAME {_word(key)} {_word(aside)}"


def _word(text: str) -> str:
    """The text as one argument of redis-cli."""
    plain = text.isprintable() and not set(text) & set(" \"'\\")
    return text if plain else orjson.dumps(text).decode()
