"""Oracle of flow control: keys, series, delays, cancellations, results, batches and cron."""

import threading
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import orjson
import redis
from chaos_events import END, START, Event
from chaos_flow import CALLBACK, TICK
from chaos_load import STREAM, Ledger
from chaos_oracle import Letter, Verdict

#: Pause between two looks (s).
_LOOK_S = 0.02
#: Entries of one look.
_PAGE = 1000
#: Clocks: the service compares with the server's, milliseconds are cut off.
_ROUNDING_S = 0.005


class Watcher(threading.Thread):
    """Reads the stream beside the service, and looks at the counts of batches while they change.

    ``enqueued`` counts the entries of jobs that the service itself enqueues; ``wrong`` names each moment at
    which the counts of a batch could not be true.
    """

    def __init__(self, client: Any, ledger: Ledger) -> None:
        super().__init__(name="watcher", daemon=True)
        self.enqueued: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.looks = 0
        self._client = client
        self._ledger = ledger
        self._done = threading.Event()
        self._after = b"0-0"
        self._ended: dict[str, int] = {}

    def run(self) -> None:
        """Look until `finish`."""
        while not self._done.wait(_LOOK_S):
            try:
                self._read()
                self._look()
            except redis.RedisError:
                continue  # the server is away

    def finish(self, within_s: float) -> None:
        """Look once more, then end."""
        self._done.set()
        self.join(within_s)
        self._read()
        self._look()

    def _read(self) -> None:
        while entries := self._client.xrange(STREAM, b"(" + self._after, "+", count=_PAGE):
            for _, fields in entries:
                data = fields.get(b"data", b"")
                if b'"%s' % CALLBACK.encode() in data or b'"%s' % TICK.encode() in data:
                    self._count(data)
            self._after = entries[-1][0]

    def _count(self, data: bytes) -> None:
        job = orjson.loads(data)
        # A job that is tried again has a new entry.
        if job["id"].startswith((CALLBACK, TICK)) and not job.get("retry_count"):
            self.enqueued[job["id"]] += 1

    def _look(self) -> None:
        """Look at the batches that have not ended."""
        open_ids = [id for id, size in list(self._ledger.batches.items()) if self._ended.get(id, 0) < size]
        pipe = self._client.pipeline(transaction=False)
        for id in open_ids:
            pipe.hmget(f"batch:{STREAM}/{id}", "total", "done", "dead")
        for id, counts in zip(open_ids, pipe.execute(), strict=True):
            total, done, dead = (int(count or 0) for count in counts)
            self.looks += 1
            if not self._ended.get(id, 0) <= done + dead <= total:
                self.wrong.append(f"{id}: {done} done, {dead} dead of {total}")
            self._ended[id] = max(self._ended.get(id, 0), done + dead)


class Seen(NamedTuple):
    """What the oracle compares. ``cron``: last ticks of each table: before the run, surely enqueued, perhaps
    enqueued. ``wall_offset_s``: unix time less monotonic time. ``oom``: monotonic times of begin and end of
    each time in which the server had no memory."""

    ledger: Ledger
    events: Sequence[Event]
    effects: Mapping[str, Sequence[str]]
    letters: Sequence[Letter]
    watcher: Watcher
    client: Any
    cron: Mapping[str, tuple[int, int, int]]
    wall_offset_s: float
    oom: Sequence[tuple[float, float]]


def check_flow(verdict: Verdict, seen: Seen) -> None:
    """Add what was broken to the verdict."""
    dead = {letter.id for letter in seen.letters}
    starts = defaultdict[str, list[float]](list)
    ends = set()
    for event in seen.events:
        if event.what == START:
            starts[event.id].append(event.mono_s)
        elif event.what == END:
            ends.add(event.id)
    _check_keys(verdict, seen, starts, ends, dead)
    _check_series(verdict, seen, starts, dead)
    _check_delays(verdict, seen, starts)
    _check_cancels(verdict, seen, starts)
    _check_results(verdict, seen, dead)
    _check_batches(verdict, seen, starts)
    _check_cron(verdict, seen, starts)


def _check_keys(
    verdict: Verdict, seen: Seen, starts: Mapping[str, Sequence[float]], ends: set[str], dead: set[str]
) -> None:
    """Of the jobs with one key one runs. A dead letter frees its key, and so does a server without memory."""
    for name, ids in _groups(seen.ledger, "key").items():
        if not dead.isdisjoint(ids):
            continue
        verdict.count_flow("keys")
        ran = [id for id in ids if id in ends or id in seen.effects]
        if len(ran) > 1 and not any(_was_read_without_memory(seen, id, starts[id]) for id in ran):
            verdict.key_doubled.append(f"{name}: {', '.join(ran)}")
        if not ran and any(id in seen.ledger.confirmed for id in ids):
            verdict.key_lost.append(name)


def _was_read_without_memory(seen: Seen, id: str, starts: Sequence[float]) -> bool:
    """Whether a service may have read a job while its key could not be kept."""
    sent_s = seen.ledger.mono_sent_s[id]
    return any(sent_s <= end_s and begin_s <= start_s for begin_s, end_s in seen.oom for start_s in starts)


def _check_series(
    verdict: Verdict, seen: Seen, starts: Mapping[str, Sequence[float]], dead: set[str]
) -> None:
    """The newest job of a series runs, and no older one starts after it has."""
    for name, ids in _groups(seen.ledger, "series").items():
        if not seen.ledger.unanswered.isdisjoint(ids):
            continue  # which one is the newest is not known
        verdict.count_flow("series")
        ids.sort(key=lambda id: [int(part) for part in seen.ledger.confirmed[id].split("-")])
        newest = ids[-1]
        if newest not in dead and newest not in seen.effects:
            verdict.series_lost.append(newest)
        for number, id in enumerate(ids):
            newer = [start_s for one in ids[number + 1 :] for start_s in starts[one]]
            if newer and any(start_s > min(newer) for start_s in starts[id]):
                verdict.series_disorder.append(f"{name}: {id} after a newer one")


def _check_delays(verdict: Verdict, seen: Seen, starts: Mapping[str, Sequence[float]]) -> None:
    for id, due_s in seen.ledger.wall_due_s.items():
        for start_s in starts[id][:1]:
            verdict.count_flow("delayed")
            early_s = due_s - (start_s + seen.wall_offset_s)
            if early_s > _ROUNDING_S:
                verdict.started_early.append(f"{id}: {early_s:.3f} s")


def _check_cancels(verdict: Verdict, seen: Seen, starts: Mapping[str, Sequence[float]]) -> None:
    """A removed job never starts again. Each cancelled job is done, or has one dead letter."""
    letters = Counter(letter.id for letter in seen.letters if letter.reason == "cancelled")
    for id, outcome in seen.ledger.cancels.items():
        verdict.count_flow(f"cancel {outcome}")
        if outcome == "cancelled":
            late = [one for one in starts[id] if one > seen.ledger.mono_cancelled_s[id]]
            if late or letters[id] != 1:
                verdict.cancel_wrong.append(f"{id}: {len(late)} starts later, {letters[id]} letters")
        elif id in seen.ledger.confirmed and not letters[id] and id not in seen.effects:
            verdict.cancel_wrong.append(f"{id}: {outcome}, and it is lost")
        elif outcome == "ended" and letters[id]:
            verdict.cancel_wrong.append(f"{id}: had ended, and was cancelled")


def _check_results(verdict: Verdict, seen: Seen, dead: set[str]) -> None:
    """A job that asked for its result has it exactly if it has ended, which all have."""
    for id, job in seen.ledger.planned.items():
        if not job.flow.keep or id not in seen.ledger.confirmed:
            continue
        verdict.count_flow("results")
        record = seen.client.get(f"result:{STREAM}/{id}")
        state = orjson.loads(record)["state"] if record else "missing"
        if state != ("dead" if id in dead else "succeeded"):
            verdict.results_wrong.append(f"{id}: {state}")


def _check_batches(verdict: Verdict, seen: Seen, starts: Mapping[str, Sequence[float]]) -> None:
    """Counts are those of the dead letters, at every instant possible, and each callback is enqueued once."""
    verdict.batch_wrong += seen.watcher.wrong
    verdict.count_flow("looks at batches", seen.watcher.looks)
    dead = Counter(
        seen.ledger.planned[letter.id].flow.batch
        for letter in seen.letters
        if letter.id in seen.ledger.planned
    )
    for batch, size in seen.ledger.batches.items():
        verdict.count_flow("batches")
        record = seen.client.hgetall(f"batch:{STREAM}/{batch}")
        found = tuple(int(record.get(name, 0)) for name in (b"total", b"done", b"dead"))
        if found != (size, size - dead[batch], dead[batch]) or b"finished" not in record:
            verdict.batch_wrong.append(f"{batch}: {found}, and {dead[batch]} letters of {size} jobs")
        id = f"{CALLBACK}{batch}"
        if seen.watcher.enqueued[id] > 1 or not starts[id]:
            verdict.batch_wrong.append(
                f"{id}: enqueued {seen.watcher.enqueued[id]}, started {len(starts[id])}"
            )


def _check_cron(verdict: Verdict, seen: Seen, starts: Mapping[str, Sequence[float]]) -> None:
    """Each tick is enqueued once, and its job runs."""
    ticks = {id for id in {*starts, *seen.watcher.enqueued} if id.startswith(TICK)}
    by_name = defaultdict[str, set[str]](set)
    for id in ticks:
        by_name[id.split(":")[1]].add(id)
    for name, (first_s, last_s, perhaps_s) in seen.cron.items():
        every_s = 3 if name.endswith("three") else 1
        sure = {_tick_id(name, at) for at in range(first_s + 1, last_s + 1) if at % every_s == 0}
        more = {_tick_id(name, at) for at in range(last_s + 1, perhaps_s + 1)}
        later = {id for id in by_name[name] if id > _tick_id(name, first_s)}
        verdict.count_flow("ticks", len(sure))
        verdict.cron_wrong += sorted(f"{id} did not run" for id in sure if not starts[id])
        verdict.cron_wrong += sorted(f"{id} is no tick" for id in later - sure - more)
    doubled = (id for id, count in seen.watcher.enqueued.items() if id.startswith(TICK) and count > 1)
    verdict.cron_wrong += [f"{id} was enqueued twice" for id in doubled]


def _tick_id(name: str, wall_s: int) -> str:
    return f"{TICK}{name}:{datetime.fromtimestamp(wall_s, UTC):%Y-%m-%dT%H:%M:%SZ}"


def _groups(ledger: Ledger, mark: str) -> dict[str, list[str]]:
    """Ids of the jobs that were sent, by the value of a mark, in the order of sending."""
    found = defaultdict[str, list[str]](list)
    for id, job in ledger.planned.items():
        if name := getattr(job.flow, mark):
            found[name].append(id)
    return found
