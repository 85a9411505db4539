"""Arguments and replies of the scripts that compare jobs with others of their keys."""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import msgspec

from ...conditions import series_of, unique_name
from ...envelope import read_header
from ..operator import Rivals
from ..ports import Candidate, Entry, Screened
from .base import SCRIPT_IDS, chunks_by_size
from .lua import Argument, Command

#: Time for which the newest job of a series is known, from its due time on: no older one waits as long.
_KEEP_NEWEST_MS = 24 * 3600 * 1000

#: First entry of a job, and name of its idempotency key.
Key = tuple[bytes, str]
#: The keys of one call of ``claim_keys.lua``, and its arguments.
KeyCall = tuple[Sequence[Key], list[Argument]]


def key_calls(keys: Sequence[Key], window_s: float) -> Iterator[KeyCall]:
    """Calls of ``claim_keys.lua``: the keys and the arguments of each, one bucket and no key twice."""
    window_ms = max(1, round(window_s * 1000))
    for part in _parts(keys):
        numbers = (
            int(part[0][0].partition(b"-")[0]) // window_ms,
            int(part[-1][0].partition(b"-")[0]) // window_ms,
        )
        by_bucket = [(numbers[0], part)] if numbers[0] == numbers[1] else _by_bucket(part, window_ms)
        for number, some in by_bucket:
            # The server's decoder knows texts, and not the newer type for bytes.
            claims = [part for id, name in some for part in (name, id.decode())]
            yield some, [window_ms, number, msgspec.msgpack.encode(claims)]


def _parts(keys: Sequence[Key]) -> Iterator[Sequence[Key]]:
    """Keys in parts that a script takes, in which each name occurs once."""
    while keys:
        once: Sequence[Key] = keys
        again: list[Key] = []
        if len({name for _, name in keys}) < len(keys):
            first: dict[str, Key] = {}
            again = [key for key in keys if first.setdefault(key[1], key) is not key]
            once = list(first.values())
        yield from (once[start : start + SCRIPT_IDS] for start in range(0, len(once), SCRIPT_IDS))
        keys = again


def _by_bucket(keys: Sequence[Key], window_ms: int) -> Iterator[tuple[int, list[Key]]]:
    for number, some in groupby(keys, key=lambda key: int(key[0].partition(b"-")[0]) // window_ms):
        yield number, list(some)


def screen_calls(candidates: Sequence[Candidate]) -> Iterator[tuple[list[Candidate], list[Argument]]]:
    """Calls of ``screen.lua``: the jobs and the arguments of each. The newest of each series comes first."""
    for part in chunks_by_size(sorted(candidates, key=_age, reverse=True), lambda one: len(one.data)):
        arguments: list[Argument] = [_KEEP_NEWEST_MS]
        for one in part:
            due = f"{one.due_s:.6f}" if one.data else "0"
            arguments += (one.id, one.first_id, one.series, due, one.data)
        yield part, arguments


def add_screened(part: Sequence[Candidate], reply: Sequence[Any], screened: Screened) -> None:
    """Add the jobs of one call that may not run."""
    for number, verdict, by in zip(reply[::3], reply[1::3], reply[2::3], strict=True):
        id = part[number - 1].id
        match verdict:
            case b"superseded":
                screened.superseded[id] = by
            case b"delayed":
                screened.delayed.add(id)
            case _:
                screened.lost.add(id)


def _age(candidate: Candidate) -> tuple[int, int]:
    ms, _, sequence = candidate.first_id.partition(b"-")
    return int(ms), int(sequence)


def rivals(run: Callable[[Command], Any], ready: str, entry: Entry) -> Rivals:
    """The jobs that run instead of an entry's. ``run`` runs a command on its stream's server.

    Raises `MalformedJob` for an entry that is no job.
    """
    job = read_header(entry.data or b"")
    first_id = job.first_id.encode() or entry.id
    owner = newest = b""
    if name := unique_name(job):
        for bucket in run(("ZRANGE", f"{ready}/unique", 0, -1)):
            window_ms, _, number = bucket.decode().rpartition("/unique/")[2].partition("/")
            if int(number) == int(first_id.partition(b"-")[0]) // int(window_ms):
                owner = run(("HGET", bucket, name)) or owner
    if series := series_of(job.type, job.tenant_id, job.metadata):
        newest = (run(("GET", f"{ready}/newest/{series}")) or b"").partition(b" ")[0]
    return Rivals(*(b"" if one == first_id else one for one in (owner, newest)))
