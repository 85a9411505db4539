"""Discovery: asks all sentinels for the master, or all known nodes of a cluster for a sign of life, at once.

One that accepts connections and never answers costs nothing while others answer (a majority of the
sentinels), and a second at most otherwise. After a failover the sentinels may disagree for a moment: the
newest configuration counts.
"""

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import redis
from redis.exceptions import ConnectionError, RedisError

#: Time limit of each step of a look-up (seconds): an answer takes about a millisecond.
STEP_S = 1.0

#: A host and a port.
Address = tuple[str, int]
Answer = TypeVar("Answer")


class _NamedMaster(NamedTuple):
    """Answer of one sentinel: the master that it names and its configuration epoch, or an error."""

    address: Address | None = None
    epoch: int = 0
    error: str = ""


def find_master(
    sentinels: Sequence[Address],
    name: str,
    sentinel_options: dict[str, Any],
    master_options: dict[str, Any],
    step_s: float = STEP_S,
) -> Address:
    """The address of the master of a Sentinel group. The options are arguments of redis-py's connections.

    Of the masters that the sentinels name, the newest that says of itself that it is one; else the newest
    that gave no answer in time, whose connection will tell. Raises redis-py's ConnectionError where there is
    none, within about twice ``step_s``.
    """

    def ask(sentinel: Address) -> _NamedMaster:
        return _ask(sentinel, name, sentinel_options, step_s)

    answers = _ask_all(
        sentinels, ask, lambda some: 2 * sum(one.address is not None for one in some) > len(sentinels), step_s
    )
    named = _newest_first(answers)
    if not named:
        errors = "; ".join(sorted({one.error for one in answers})) or f"no answer within {step_s:g} s"
        raise ConnectionError(f"no sentinel names a master {name!r}: {errors}")
    silent: list[Address] = []
    for address in named:
        role = _role(address, master_options, step_s)
        if role == "master":
            return address
        if role is None:
            silent.append(address)
    if silent:
        return silent[0]
    shown = ", ".join(f"{host}:{port}" for host, port in named)
    raise ConnectionError(
        f"the sentinels name {shown} as {name!r}, which is no master or refuses connections"
    )


def _newest_first(answers: Sequence[_NamedMaster]) -> list[Address]:
    """The addresses by configuration epoch, then by number of sentinels that name them.

    A failover needs a majority of the sentinels and raises the epoch, so the highest is the newest.
    """
    votes = Counter(one.address for one in answers if one.address)
    epochs = {address: max(one.epoch for one in answers if one.address == address) for address in votes}
    return sorted(epochs, key=lambda address: (epochs[address], votes[address]), reverse=True)


def living_nodes(nodes: Sequence[Address], options: dict[str, Any], step_s: float = STEP_S) -> list[Address]:
    """The first node that knows the slots; all of them where none answers in time."""
    if len(nodes) == 1:
        return list(nodes)

    def ask(node: Address) -> Address | None:
        try:
            return node if _call(node, options, step_s, "CLUSTER", "SLOTS") else None
        except (RedisError, OSError):
            return None

    answers = _ask_all(nodes, ask, any, step_s)
    return [node for node in answers if node] or list(nodes)


def _ask_all(
    addresses: Sequence[Address],
    ask: Callable[[Address], Answer],
    is_enough: Callable[[Sequence[Answer]], bool],
    step_s: float,
) -> list[Answer]:
    """Ask each address in a thread of its own; returns the answers that come in time, or that are enough."""
    inbox: queue.SimpleQueue[Answer] = queue.SimpleQueue()
    for address in addresses:
        threading.Thread(target=lambda at=address: inbox.put(ask(at)), name="discovery", daemon=True).start()
    answers: list[Answer] = []
    mono_deadline_s = time.monotonic() + step_s
    while len(answers) < len(addresses) and not is_enough(answers):
        try:
            answers.append(inbox.get(timeout=max(0.0, mono_deadline_s - time.monotonic())))
        except queue.Empty:
            break
    return answers


def _ask(sentinel: Address, name: str, options: dict[str, Any], step_s: float) -> _NamedMaster:
    try:
        flat = _call(sentinel, options, step_s, "SENTINEL", "MASTER", name)
        facts = dict(zip(flat[::2], flat[1::2], strict=True))
        address = facts[b"ip"].decode(), int(facts[b"port"])
        return _NamedMaster(address, int(facts.get(b"config-epoch", 0)))
    except (RedisError, OSError) as error:
        return _NamedMaster(error=f"{sentinel[0]}:{sentinel[1]}: {error}")
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        return _NamedMaster(error=f"{sentinel[0]}:{sentinel[1]}: no answer of a sentinel: {error!r}")


def _role(address: Address, options: dict[str, Any], step_s: float) -> str | None:
    """What the server says that it is: ``master`` or ``slave``. Empty if it refuses connections; None if it
    does not answer in time, is loading, or this user may not ask."""
    try:
        info = _call(address, options, step_s, "INFO", "replication")
    except redis.exceptions.TimeoutError:
        return None
    except (ConnectionError, OSError):
        return ""
    except RedisError:
        return None
    fields = dict(line.split(b":", 1) for line in info.splitlines() if b":" in line)
    return str(fields.get(b"role", b"").decode(errors="replace"))


def _call(address: Address, options: dict[str, Any], step_s: float, *command: str) -> Any:
    """One command on a connection of its own."""
    kind: Any = redis.SSLConnection if options.get("ssl") else redis.Connection
    limits = {"socket_timeout": step_s, "socket_connect_timeout": step_s}
    arguments = {key: value for key, value in options.items() if key != "ssl"} | limits
    connection = kind(host=address[0], port=address[1], **arguments)
    try:
        connection.connect()
        connection.send_command(*command)
        return connection.read_response(disable_decoding=True)
    finally:
        connection.disconnect()
