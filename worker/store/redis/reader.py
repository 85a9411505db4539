"""The reader's side of the job store on Redis."""

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import msgspec
from redis.exceptions import NoPermissionError, ResponseError

from ...errors import NameHeld, StoreRefused
from ...flow import FlowConfig
from ...keys import NO_HOLDER, PAUSED_KEY, Holder, Source
from ..ports import (
    RELEASED_IDLE_S,
    Backlog,
    Candidate,
    Dead,
    Entry,
    Screened,
    Settled,
    Settlement,
    TakenJobs,
    WaitingJob,
    do_nothing,
)
from . import lanes
from .base import (
    SCRIPT_BYTES,
    SCRIPT_IDS,
    Question,
    RedisStoreBase,
    checked,
    chunks,
    chunks_by_size,
    death_count,
    is_no_group,
    pairs,
    too_few,
    wait_command,
)
from .blocking_read import BlockingRead, GroupMissing
from .conditions import KeyCall, add_screened, key_calls, screen_calls
from .connection import Begun, Reply
from .lua import Command, script

log = logging.getLogger(__name__)

#: Most characters of a text in another service's record: they are logged and shown.
_RECORD_CHARS = 256
_PAUSED = Question("paused", PAUSED_KEY, [("HKEYS", PAUSED_KEY)])


class RedisReaderStore(RedisStoreBase):
    """`ReaderStore` on Redis. One thread uses it; `consumer` is this service's name in every group.

    A deleted group or fence is created again with a log line, so the service survives a flushed server.
    """

    def __init__(
        self, url: str, consumer: str, *, holder: Holder = NO_HOLDER, timeout_s: float = 5.0,
        wait_replicas: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(url, timeout_s=timeout_s)
        self._consumer = consumer
        self._wait_replicas = wait_replicas
        self._holder = holder
        self._epochs: dict[Source, bytes] = {}
        self._reads: dict[Source, BlockingRead] = {}
        self._warned_no_pauses = False
        # Claims of keys under way.
        self._claims: dict[Source, tuple[list[KeyCall], Begun]] = {}

    def acquire(self, sources: Sequence[Source]) -> None:
        """Raises `ConfigurationError` too, for a server that is too old."""
        taken: list[Source] = []
        try:
            for source in sources:
                self._take_name(source)
                taken.append(source)
        except NameHeld:
            self.release_name(taken)  # else two services with half of the names each would deadlock
            raise

    def renew_name(self, sources: Sequence[Source]) -> None:
        for source in sources:
            self._run(source, "renew_name", [], self._record())

    def release_name(self, sources: Sequence[Source]) -> None:
        for source in sources:
            if (epoch := self._epochs.get(source)) is not None:
                keys = [source.stream, self.fence_key(source.stream)]
                self.one(source.stream, script("release_name", keys, self._consumer, epoch))

    def begin_read(self, source: Source, count: int, block_ms: int) -> int:
        read = self._reads.get(source)
        if read is None:
            read = BlockingRead(self._endpoint, source, self._consumer, self._timeout_s)
            self._reads[source] = read
        return read.begin(count, block_ms)

    def finish_read(self, source: Source) -> list[Entry]:
        """Blocks if the descriptor is not readable yet."""
        read = self._reads.get(source)
        try:
            return read.finish() if read else []
        except GroupMissing:
            self._recreate_group(source)
            return []

    def is_reading(self, source: Source) -> bool:
        read = self._reads.get(source)
        return read is not None and read.under_way

    def share_shards(self, stream: str, lease_s: float, count: int) -> set[int]:
        key = self.shards_key(stream)
        command = script("share_shards", [key], self._consumer, round(lease_s * 1000), count)
        return set(self.one(stream, command))

    def abandon_read(self, source: Source) -> None:
        if read := self._reads.pop(source, None):
            read.drop()

    def abandon_reads(self) -> None:
        for read in self._reads.values():
            read.drop()
        self._reads.clear()
        self._asked.clear()

    def own_pending(self, source: Source, after: bytes, count: int) -> list[Entry]:
        """Entries that were deleted from the stream are acknowledged; where
        a page has no others, the next page is returned."""
        while True:
            rows = self._pending_rows(source, after, count)
            ids = [row[0] for row in rows]
            if not ids:
                return []
            entries = self._entries(source, ids, [row[3] for row in rows])
            if entries:
                return entries
            after = ids[-1]

    def own_ids(self, source: Source, after: bytes, count: int) -> list[bytes]:
        return [row[0] for row in self._pending_rows(source, after, count)]

    def claim(self, source: Source, min_idle_ms: int, count: int, cursor: bytes) -> tuple[bytes, list[Entry]]:
        """Entries of this consumer that were not renewed are returned too. It stops after 8 MiB of jobs."""
        arguments = [min_idle_ms, count, cursor, SCRIPT_BYTES]
        reply = self._run(source, "claim", [self.deaths_key(source.stream)], arguments)
        return reply[0], [
            Entry(id, data, int(tries), self._deaths(source, id, deaths))
            for id, data, tries, deaths in _rows_of_four(reply[1:])
        ]

    def has_lost(self, source: Source, min_idle_ms: int) -> bool:
        two_keys = [source.stream, self.fence_key(source.stream)]
        command = script("find_lost", two_keys, source.group, self._consumer, min_idle_ms)
        return bool(self._send(source, lambda: command))

    def settle(
        self, settlements: Sequence[Settlement], meanwhile: Callable[[], None] = do_nothing
    ) -> list[Settled]:
        """Acknowledgements, retries and dead letters take one step each, so that a
        key that refuses one kind does not stop the others; more than 1,000 ids or 8 MiB take several.
        With ``wait_replicas`` one WAIT follows them on their connection."""
        results = [Settled(set(), set()) for _ in settlements]
        all_parts = [(number, part) for number, one in enumerate(settlements) for part in _parts(one)]
        for parts in self._by_node(all_parts):
            commands = [self._settlement(part) for _, part in parts]
            commands += wait_command(self._wait_replicas)
            begun = self.begin_call(parts[0][1].source.stream, commands)
            meanwhile()
            meanwhile = do_nothing
            replies = self.finish_call(begun)
            for (number, part), reply in zip(parts, replies[: len(parts)], strict=True):
                results[number] = self._settled(results[number], part, reply)
            if self._wait_replicas and too_few(replies[-1], self._wait_replicas):
                for number in {number for number, _ in parts}:
                    results[number] = results[number]._replace(is_replicated=False)
        return results

    def _settled(self, result: Settled, part: Settlement, reply: Reply) -> Settled:
        """The result of a settlement with that of one more part."""
        try:
            reported = self._recovered(part.source, reply, partial(self._settlement, part))
        except StoreRefused as error:
            error = error.with_traceback(None)  # it would hold the settlement
            return result._replace(unsettled=result.unsettled.union(part.ids), error=error)
        cancelled = {id[2:]: id[1:2] == b"1" for id in reported if id.startswith(b"!")}
        refused = result.refused.union(id for id in reported if not id.startswith(b"!"))
        return result._replace(refused=refused, cancelled={**result.cancelled, **cancelled})

    def set_deaths(self, source: Source, deaths: Mapping[bytes, int]) -> dict[bytes, int]:
        charged: dict[bytes, int] = {}
        for some in chunks(list(deaths)):
            arguments = [value for id in some for value in (id, deaths[id])]
            for id in self._run(source, "set_deaths", [self.deaths_key(source.stream)], arguments):
                charged[id] = deaths[id]
        return charged

    def renew(self, source: Source, ids: Sequence[bytes]) -> set[bytes]:
        lost: set[bytes] = set()
        for some in chunks(_in_order(ids)):
            reply = self._run(source, "renew", [], some)
            lost.update(reply)
        return lost

    def release(self, source: Source, ids: Sequence[bytes]) -> None:
        for some in chunks(ids):
            self._run(source, "release", [], [round(RELEASED_IDLE_S * 1000), *some])

    def hand_back(self, source: Source, jobs: Mapping[bytes, bytes]) -> int:
        """One script per 1,000 entries or 8 MiB, whichever is reached first."""
        given = 0
        for some in chunks_by_size(jobs.items(), lambda pair: len(pair[1])):
            given += self._run(source, "hand_back", [], [part for pair in some for part in pair])
        return given

    def idle_readers(self, source: Source) -> int:
        two_keys = [source.stream, self.fence_key(source.stream)]
        command = script("find_idle", two_keys, source.group, self._consumer)
        return int(self._send(source, lambda: command))

    def fetch(self, source: Source, ids: Sequence[bytes]) -> dict[bytes, bytes | None]:
        """One script per 1,000 entries or 8 MiB, whichever is reached first."""
        bodies: dict[bytes, bytes | None] = {}
        done = 0
        while done < len(ids):
            some = ids[done : done + SCRIPT_IDS]
            looked_up, *flat = self.one(
                source.stream, script("entries", [source.stream], SCRIPT_BYTES, *some)
            )
            bodies |= pairs(flat)
            done += looked_up
        return bodies

    def ask_state(self, sources: Iterable[Source]) -> None:
        self.ask_ahead([*map(self._backlog_question, sources), _PAUSED])

    def _backlog_question(self, source: Source) -> Question:
        return Question("backlog", source.stream, lanes.backlog_commands(source, self._ready(source)))

    def paused_types(self) -> set[str]:
        reply = self.answers(_PAUSED)[0]
        if isinstance(reply, NoPermissionError):  # an access list from before pauses existed
            if not self._warned_no_pauses:
                fields = {"key": PAUSED_KEY, "hint": "this user may not read it"}
                log.warning("pauses.unreadable", extra=fields)
            self._warned_no_pauses = True
            return set()
        return {kind.decode(errors="replace") for kind in checked(reply)}

    def backlog(self, source: Source) -> Backlog:
        return lanes.backlog(source, self.answers(self._backlog_question(source)))

    def flow_config(self, source: Source) -> FlowConfig:
        return lanes.flow_config(self.call(source.stream, lanes.config_commands(self._ready(source))))

    def configure(self, source: Source, config: FlowConfig) -> bool:
        return self.one(source.stream, lanes.configure(self._ready(source), config)) is not None

    def sort(self, source: Source, version: int, lanes_: Mapping[bytes, Sequence[WaitingJob]]) -> set[bytes]:
        refused: set[bytes] = set()
        for arguments in lanes.sort_arguments(lanes_):
            refused.update(self._run(source, "sort", [self._ready(source)], [version, *arguments]))
        return refused

    def take(self, source: Source, types: Iterable[str], count: int) -> TakenJobs:
        more_keys = [self.deaths_key(source.stream), self._ready(source)]
        most = min(count, SCRIPT_IDS)
        reply = self._run(source, "take", more_keys, [most, lanes.TAKE_BYTES, lanes.OUTDATED_IDS, *types])
        return lanes.taken(reply, partial(self._deaths, source))

    def cancels(self, source: Source) -> dict[bytes, bool]:
        found = pairs(self.one(source.stream, ("HGETALL", lanes.cancels_key(self._ready(source)))))
        return {id: keeps == b"1" for id, keeps in found.items()}

    def end_cancels(self, source: Source, ids: Sequence[bytes]) -> None:
        for some in chunks(ids):
            self.one(source.stream, ("HDEL", lanes.cancels_key(self._ready(source)), *some))

    def register_batches(self, source: Source, batches: Mapping[bytes, str]) -> set[str]:
        unknown: set[str] = set()
        for some in chunks(_in_order(list(batches))):
            arguments = [value for id in some for value in (id, batches[id])]
            unknown.update(id.decode() for id in self._run(source, "batch_register", [], arguments))
        return unknown

    def claim_keys(
        self, source: Source, keys: Sequence[tuple[bytes, str]], window_s: float
    ) -> dict[bytes, bytes]:
        """At most 1,000 keys a script."""
        self.begin_claim(source, keys, window_s)
        return self.finish_claim(source)

    def begin_claim(self, source: Source, keys: Sequence[tuple[bytes, str]], window_s: float) -> None:
        """The server claims the keys while the caller does other things, even other calls."""
        calls = list(key_calls(keys, window_s))
        commands = [self._claim_command(source, call) for call in calls]
        self._claims[source] = calls, self.begin_call(source.stream, commands)

    def finish_claim(self, source: Source) -> dict[bytes, bytes]:
        """Takes the reply at once if it came with that of a later call."""
        if source not in self._claims:
            return {}
        calls, begun = self._claims.pop(source)
        owners: dict[bytes, bytes] = {}
        for call, reply in zip(calls, self.finish_call(begun), strict=True):
            found = self._recovered(source, reply, partial(self._claim_command, source, call))
            owners |= {call[0][number - 1][0]: by for number, by in zip(found[::2], found[1::2], strict=True)}
        return owners

    def _claim_command(self, source: Source, call: KeyCall) -> Command:
        return self._reader_script(source, "claim_keys", [self._ready(source)], call[1])

    def screen(self, source: Source, candidates: Sequence[Candidate]) -> Screened:
        """At most 1,000 jobs or 8 MiB a script."""
        stream = source.stream
        more_keys = [self.retry_key(stream), self.deaths_key(stream), self._ready(source)]
        screened = Screened({}, set(), set())
        for some, arguments in screen_calls(candidates):
            add_screened(some, self._run(source, "screen", more_keys, arguments), screened)
        return screened

    def slot_holders(self, source: Source, ids: Sequence[bytes]) -> set[bytes]:
        slots = lanes.slots_key(self._ready(source))
        held = [self.one(source.stream, ("HMGET", slots, *some)) for some in chunks(ids)]
        return {id for id, keys in zip(ids, itertools.chain(*held), strict=True) if keys is not None}

    def _ready(self, source: Source) -> str:
        return self.ready_key(source.stream)

    def close(self) -> None:
        """Drop every connection."""
        self.abandon_reads()
        super().close()

    def _pending_rows(self, source: Source, after: bytes, count: int) -> list[Any]:
        command = ("XPENDING", *source, b"(" + after, "+", count, self._consumer)
        return list(self._send(source, lambda: command))

    def _entries(self, source: Source, ids: list[bytes], deliveries: list[int]) -> list[Entry]:
        bodies = self.fetch(source, ids)
        deaths = self.one(source.stream, ("HMGET", self.deaths_key(source.stream), *ids))
        gone = [id for id in ids if id not in bodies]
        if gone:
            fields = {"entries": len(gone), "stream": source.stream}
            log.error("entry.deleted_while_pending", extra=fields)
            (settled,) = self.settle([Settlement(source, dead=[Dead(id, b"") for id in gone])])
            if settled.error:
                raise settled.error
        return [
            Entry(id, bodies[id], tries, self._deaths(source, id, died))
            for id, tries, died in zip(ids, deliveries, deaths, strict=True)
            if id in bodies
        ]

    def _deaths(self, source: Source, id: bytes, value: bytes | None) -> int:
        """The stored deaths of an entry. A damaged value counts as 0: the next death overwrites it."""
        count = death_count(value)
        if count is None:
            key = self.deaths_key(source.stream)
            log.error("deaths.damaged", extra={
                "key": key, "entry_id": id.decode(), "hint": f"HDEL {key} {id.decode()}",
            })  # fmt: skip
        return count or 0

    def _take_name(self, source: Source) -> None:
        stream = source.stream
        keys = [stream, self.fence_key(stream)]
        last = self._epochs.get(source, b"0")
        arguments = [*self._record(), last, *self._holder.predecessors]
        reply = self.one(stream, script("acquire", keys, source.group, self._consumer, *arguments))
        if not reply[0]:
            about, token, renewed = (part.decode(errors="replace")[:_RECORD_CHARS] for part in reply[1:4])
            raise NameHeld(stream, about, int(reply[4]) / 1000, f"{token} {renewed}")
        self._epochs[source] = reply[0]

    def _record(self) -> list[str | int]:
        return [self._holder.token, round(self._holder.lease_s * 1000), self._holder.about]

    def _recreate_group(self, source: Source) -> None:
        """Create the group again, without touching the fence: a fenced reader stays fenced."""
        stream, group = source
        reply = self.call(stream, [("XGROUP", "CREATE", stream, group, "0", "MKSTREAM")])[0]
        if str(reply).startswith("BUSYGROUP"):
            return  # another reader was quicker, or the stream moved to another node with its group
        checked(reply)
        log.error("group.recreated", extra={"group": group, "stream": stream, "hint": "it was deleted"})
        self._forget_deaths(source)

    def _forget_deaths(self, source: Source) -> None:
        """Delete counts of entries that are gone with their stream: no settlement removes them."""
        key = self.deaths_key(source.stream)
        ids = self.one(source.stream, ("HKEYS", key))
        if gone := set(ids) - self.fetch(source, list(filter(_is_entry_id, ids))).keys():
            self.one(source.stream, ("HDEL", key, *gone))

    def _reader_script(
        self, source: Source, name: str, more_keys: list[str], arguments: Sequence[Any]
    ) -> Command:
        stream = source.stream
        epoch = self._epochs.get(source)
        if epoch is None:
            raise RuntimeError(f"{stream} was not acquired")
        all_keys = [stream, self.fence_key(stream), *more_keys]
        return script(name, all_keys, source.group, self._consumer, epoch, *arguments)

    def _run(self, source: Source, name: str, more_keys: list[str], arguments: Sequence[Any]) -> Reply:
        return self._send(source, lambda: self._reader_script(source, name, more_keys, arguments))

    def _send(self, source: Source, command: Callable[[], Command]) -> Reply:
        return self._recovered(source, self.call(source.stream, [command()])[0], command)

    def _recovered(self, source: Source, reply: Reply, command: Callable[[], Command]) -> Reply:
        """The reply, checked. A deleted group or fence is created again first, then the command repeated.

        Both errors precede a script's first write, so nothing happens twice. Scripts check the fence first,
        and taking the name creates the group too: one recovery is enough.
        """
        if is_no_group(reply):
            self._recreate_group(source)
        elif isinstance(reply, ResponseError) and str(reply).startswith("UNFENCED"):
            log.error("fence.recreated", extra={"stream": source.stream, "hint": "it was deleted or damaged"})
            self._take_name(source)
        else:
            return checked(reply)
        return self.one(source.stream, command())

    def _by_node(self, parts: list[tuple[int, Settlement]]) -> Iterable[list[tuple[int, Settlement]]]:
        """Numbered parts in pipelines: all in one, or on a cluster one for each stream."""
        if not self._endpoint.cluster:
            return [parts] if parts else []
        by_stream = itertools.groupby(parts, key=lambda part: part[1].source.stream)
        return [list(group) for _, group in by_stream]

    def _settlement(self, part: Settlement) -> Command:
        source, stream = part.source, part.source.stream
        done = msgspec.msgpack.encode([id.decode() for id in (*part.done, *part.dropped)])
        counts = [len(part.retries), len(part.dead)]
        arguments: list[Any] = [done, *counts, int(part.sure), part.version]
        for retry in part.retries:
            arguments += (retry.id, retry.delay_s, retry.data)
        for dead in part.dead:
            arguments += dead.id, dead.data, *(dead.key or ("", "", ""))
        for job, lane, key, wait_s in part.put_back:
            arguments += (job.id, lane, job.cost, key, round(wait_s * 1000))
        arguments += self._results(part)
        more_keys = [
            self.retry_key(stream),
            self.dead_key(stream),
            self.deaths_key(stream),
            self._ready(source),
        ]
        return self._reader_script(source, "settle", more_keys, arguments)

    def _results(self, part: Settlement) -> list[Any]:
        """The end of the arguments: see prelude_results.lua."""
        stream = part.source.stream
        arguments: list[Any] = []
        for kept in part.kept:
            arguments += (
                kept.id,
                self.result_key(stream, kept.job_id),
                kept.result,
                2 if kept.is_dropped else 1,
            )
        for dead in part.dead:
            if dead.result:
                arguments += (dead.id, self.result_key(stream, dead.job_id), dead.result, 0)
        number = len(arguments) // 4
        return [*arguments, max(1, round(part.result_ttl_s * 1000)), number] if number else [0]


def _is_entry_id(field: bytes) -> bool:
    """Whether a field that any program may have written is an entry id: the server refuses others."""
    numbers = field.split(b"-")
    return len(numbers) == 2 and all(
        number.isdigit() and len(number) <= 20 and int(number) < 2**64 for number in numbers
    )


def _in_order(ids: Sequence[bytes]) -> list[bytes]:
    """Sorted as the server sorts ids of equal length, because prelude_epoch.lua looks up ranges."""
    if len(set(map(len, ids))) == 1:
        return sorted(ids)
    return sorted(ids, key=lambda id: (len(id), id))


def _parts(settlement: Settlement) -> Iterator[Settlement]:
    """The settlement in parts of one kind, at most 1,000 ids and 8 MiB."""
    source, done, retries, dead, sure, put_back, version, dropped, kept, result_ttl_s = settlement
    for ids in chunks(_in_order(done)):
        yield Settlement(source, done=ids, sure=sure)
    for ids in chunks(_in_order(dropped)):
        yield Settlement(source, dropped=ids)
    for some in chunks_by_size(retries, lambda retry: len(retry.data)):
        yield Settlement(source, retries=some)
    for letters in chunks_by_size(dead, lambda letter: len(letter.data) + len(letter.result)):
        yield Settlement(source, dead=letters, result_ttl_s=result_ttl_s)
    for results in chunks_by_size(kept, lambda one: len(one.result)):
        yield Settlement(source, kept=results, result_ttl_s=result_ttl_s)
    for some_back in chunks_by_size(put_back, lambda job: len(job.lane)):
        yield Settlement(source, put_back=some_back, version=version)


def _rows_of_four(flat: Sequence[Any]) -> Iterator[tuple[Any, Any, Any, Any]]:
    return zip(flat[::4], flat[1::4], flat[2::4], flat[3::4], strict=True)
