"""Search of a job store's keys for streams: on every server, within a bounded number of calls."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from redis.exceptions import ResponseError

from ..operator import FoundStreams

#: Keys that one SCAN call visits, and calls for each server and kind: 200,000 keys, about 0.1 s of its time.
_SCAN_KEYS, _SCAN_CALLS = 1000, 200
#: Streams that are returned.
_MAX_FOUND = 200


def find_streams(
    servers: Iterable[str], one: Callable[[str, Any], Any], stream_of: Callable[[str], str]
) -> FoundStreams:
    """Names of all streams, and of the streams that retry sets and dead letters belong to.

    ``servers`` has a key for each server, ``one`` runs a command there, ``stream_of`` is the inverse of the
    names of derived keys.
    """
    names: set[str] = set()
    complete = True
    for key in servers:
        for options in (("TYPE", "stream"), ("MATCH", "retry:*", "TYPE", "zset")):
            try:
                for page in _scan(one, key, options):
                    names |= {stream_of(name.decode()) for name in page if _is_text(name)}
                    if len(names) > _MAX_FOUND:
                        return FoundStreams(sorted(names)[:_MAX_FOUND], False)
            except _Incomplete:
                complete = False
    return FoundStreams(sorted(names), complete)


class _Incomplete(Exception):
    """The limit was reached, or this user may not run SCAN."""


def _scan(one: Callable[[str, Any], Any], key: str, options: tuple[str, ...]) -> Iterator[list[bytes]]:
    cursor: bytes = b"0"
    for _ in range(_SCAN_CALLS):
        reply = one(key, ("SCAN", cursor, *options, "COUNT", _SCAN_KEYS))
        if isinstance(reply, ResponseError):
            raise _Incomplete
        cursor, page = reply
        yield page
        if cursor == b"0":
            return
    raise _Incomplete


def _is_text(name: bytes) -> bool:
    try:
        name.decode()
    except UnicodeDecodeError:
        return False
    return True
