"""Oracle of the chaos test: each fabricated broken promise is reported, and no other one."""

import base64
import importlib
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
GOOD, POISON, MALFORMED = "job-000001", "job-000002", "job-000003"


class Letters:
    """A server with dead letters only."""

    def __init__(self, *letters: dict[str, Any]) -> None:
        self._letters = letters

    def xrange(self, stream: str) -> list[tuple[bytes, dict[bytes, bytes]]]:
        letters = self._letters if stream == "dlq:chaos:jobs" else ()
        return [(b"1-1", {b"data": json.dumps(letter).encode()}) for letter in letters]


class World:
    """A run without fault, which tests change: a successful job, a poison job, a malformed one."""

    def __init__(self, folder: Path) -> None:
        self.load, self.events_module, self.oracle = map(
            importlib.import_module, ("chaos_load", "chaos_events", "chaos_oracle")
        )
        self._folder = folder
        self.event_log = self.events_module.EventLog(folder)
        self.ledger = self.load.Ledger()
        for id, fate, effect in (
            (GOOD, "ok", "t.good"),
            (POISON, "poison", ""),
            (MALFORMED, "malformed", ""),
        ):
            self.ledger.planned[id] = self.load.Planned(id, fate, effect, {})
            self.ledger.confirmed[id] = f"1-{id[-1]}"
        self.poison = {"task": {"id": POISON}, "reason": "poison", "original_id": "1-2", "deaths": 3}
        raw = base64.b64encode(b'["%s"]' % MALFORMED.encode()).decode()
        self.malformed = {"task": None, "raw": raw, "reason": "malformed", "original_id": "1-3"}
        self.letters = [self.poison, self.malformed]
        self.lines = [f"start {GOOD} 0 7 1.0", f"end {GOOD} 0 7 1.1"]
        self.lines += [f"start {POISON} 0 {pid} 2.0" for pid in (8, 9, 10)]
        self.effects = {"t.good": GOOD}

    def judge(self) -> Any:
        """The verdict."""
        (self._folder / "events").write_text("".join(line + "\n" for line in self.lines))
        for key, id in self.effects.items():
            (self._folder / "effects" / key).symlink_to(id)
        return self.oracle.judge(self.ledger, self.event_log, Letters(*self.letters), uncounted_deaths=0)

    def broken(self) -> set[str]:
        """Names of the broken promises in the verdict."""
        verdict = self.judge()
        found = {name for name, value in vars(verdict).items() if isinstance(value, list) and value}
        assert verdict.safe == (not found - {"cut_off"})
        return found


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    before = set(sys.modules)
    one = World(tmp_path)
    yield one
    one.event_log.close()
    for name in set(sys.modules) - before:
        if name.startswith("chaos"):
            del sys.modules[name]


def test_a_run_without_fault_is_safe(world: World) -> None:
    verdict = world.judge()
    assert verdict.safe
    assert (verdict.executions, verdict.repeated, verdict.dead_letters) == (1, 0, 2)
    assert verdict.poison_starts == {3: 1}


def test_a_second_execution_is_counted_but_breaks_no_promise(world: World) -> None:
    world.lines += [f"start {GOOD} 0 9 3.0", f"end {GOOD} 0 9 3.1"]
    verdict = world.judge()
    assert verdict.safe
    assert verdict.repeated == 1


def test_a_confirmed_job_without_effect_is_lost(world: World) -> None:
    world.effects.clear()
    assert world.broken() == {"lost"}


def test_an_unconfirmed_job_may_be_missing(world: World) -> None:
    world.effects.clear()
    world.ledger.unanswered.add(GOOD)
    del world.ledger.confirmed[GOOD]
    assert world.broken() == set()


def test_a_letter_without_bytes_is_that_of_its_entry_in_its_stream(world: World) -> None:
    probe = world.load.probe(1)
    world.ledger.planned[probe.id] = probe
    world.ledger.confirmed[probe.id] = world.ledger.confirmed[MALFORMED]
    world.effects[probe.effect] = probe.id
    world.malformed["raw"] = ""
    assert world.broken() == set()


def test_a_letter_without_bytes_may_be_that_of_an_unanswered_job(world: World) -> None:
    world.malformed["raw"] = ""
    del world.ledger.confirmed[MALFORMED]
    world.ledger.unanswered.add(MALFORMED)
    assert world.broken() == set()


def test_a_letter_without_bytes_that_fits_no_job_is_unexpected(world: World) -> None:
    world.malformed["raw"] = ""
    del world.ledger.confirmed[MALFORMED]
    assert world.broken() == {"letters_unexpected"}


def test_two_effects_of_one_job_are_a_duplicate(world: World) -> None:
    world.effects["t.other"] = GOOD
    assert world.broken() == {"effect_duplicates"}


def test_an_effect_of_a_job_that_must_fail_is_reported(world: World) -> None:
    world.effects["t.poison"] = POISON
    assert world.broken() == {"effect_duplicates"}


def test_a_job_that_was_not_sent_is_unexpected(world: World) -> None:
    world.lines.append("start job-999999 0 7 1.0")
    assert world.broken() == {"unexpected"}


@pytest.mark.parametrize("letter", [0, 1])
def test_a_missing_dead_letter_is_reported(world: World, letter: int) -> None:
    del world.letters[letter]
    assert world.broken() == {"letters_missing"}


def test_a_repeated_dead_letter_is_reported(world: World) -> None:
    world.letters.append(world.poison)
    assert world.broken() == {"letters_repeated"}


def test_a_wrong_reason_of_a_dead_letter_is_reported(world: World) -> None:
    world.poison["reason"] = "exhausted"
    assert world.broken() == {"letters_wrong_reason"}


def test_a_dead_letter_of_a_successful_job_is_reported(world: World) -> None:
    world.letters.append({"task": {"id": GOOD}, "reason": "exhausted", "original_id": "1-1"})
    assert world.broken() == {"letters_unexpected"}


def test_a_job_whose_worker_was_killed_three_times_may_be_dead_lettered(world: World) -> None:
    world.effects.clear()
    world.lines = [f"start {GOOD} 0 {pid} 1.0" for pid in (4, 5, 6)] + world.lines[2:]
    world.letters.append({"task": {"id": GOOD}, "reason": "poison", "original_id": "1-1"})
    assert world.broken() == {"cut_off"}


def test_too_many_starts_of_a_poison_job_are_reported(world: World) -> None:
    world.lines.append(f"start {POISON} 0 11 3.0")
    assert world.broken() == {"poison_starts_over"}


def test_a_retry_before_its_backoff_is_reported(world: World) -> None:
    world.lines[:0] = [f"start {GOOD} 0 7 0.80", f"fail {GOOD} 0 7 0.85"]
    world.lines[2:4] = [f"start {GOOD} 1 7 0.90", f"end {GOOD} 1 7 0.95"]
    assert world.broken() == {"retries_early"}


class MovingJob:
    """A server on which a job moves between any two calls: scheduled, undelivered, pending, scheduled."""

    def __init__(self, place: int) -> None:
        self._place = place
        self._replies: list[Any] | None = None

    def pipeline(self, transaction: bool) -> "MovingJob":
        self._replies = [] if transaction else None
        return self

    def execute(self) -> list[Any]:
        replies, self._replies = self._replies, None
        self._place += 1
        assert replies is not None
        return replies

    def _answer(self, *by_place: Any) -> Any:
        reply = by_place[self._place % 3]
        if self._replies is None:
            self._place += 1
        else:
            self._replies.append(reply)
        return reply

    def xinfo_groups(self, stream: str) -> Any:
        groups = [[{"name": b"chaos", "pending": n, "last-delivered-id": b"5-0"}] for n in (0, 0, 1)]
        return self._answer(*groups)

    def xrevrange(self, stream: str, count: int) -> Any:
        return self._answer([(b"4-0", {})], [(b"6-0", {})], [(b"5-0", {})])

    def hget(self, key: str, field: str) -> Any:
        return self._answer(None, None, None)

    def hlen(self, key: str) -> Any:
        return self._answer(0, 0, 0)

    def zcard(self, key: str) -> Any:
        return self._answer(int(key.startswith("retry:")), 0, 0)


@pytest.mark.parametrize("place", range(3))
def test_a_job_that_moves_while_it_is_looked_for_is_found(world: World, place: int) -> None:
    rest = importlib.import_module("chaos_rest")
    found = rest.unfinished(MovingJob(place))
    assert {where.split()[0] for where in found} == {"chaos:jobs", "chaos:probes"}


class FlowWorld:
    """A run of flow control without fault, which tests change."""

    def __init__(self, world: World) -> None:
        self.flow, self.checks = map(importlib.import_module, ("chaos_flow", "chaos_flow_oracle"))
        load = self._load = world.load
        self._world = world
        self.ledger = load.Ledger()
        self.records = {
            "batch:chaos:jobs/b1": {b"total": b"2", b"done": b"1", b"dead": b"1", b"finished": b"9"}
        }
        self.results = {"result:chaos:jobs/keep": b'{"state":"succeeded"}'}
        self.letters = [("c1", "cancelled"), ("m2", "permanent")]
        self.effects = {id: [id] for id in ("k1", "s2", "delay", "keep", "m1", "c2")}
        for id, flow in (
            ("k1", {"key": "k"}), ("k2", {"key": "k"}), ("s1", {"series": "s"}), ("s2", {"series": "s"}),
            ("delay", {"delay_s": 1.0}), ("keep", {"keep": True}),
            ("c1", {"cancel": True}), ("c2", {"cancel": True}),
            ("m1", {"batch": "b1"}), ("m2", {"batch": "b1"}),
        ):  # fmt: skip
            self.ledger.planned[id] = load.Planned(id, "ok", id, {}, "chaos_one", "t1", load.Flow(**flow))
            self.ledger.confirmed[id] = f"1-{len(self.ledger.confirmed)}"
        self.ledger.wall_due_s = {"delay": 105.0}
        self.ledger.batches = {"b1": 2}
        self.ledger.cancels = {"c1": "cancelled", "c2": "requested"}
        self.ledger.mono_cancelled_s = {"c1": 5.0, "c2": 5.0}
        self.ledger.mono_sent_s = dict.fromkeys(self.ledger.planned, 1.0)
        self.starts = {id: [6.0] for id in (*self.effects, "m2", "batch:b1")}
        self.watcher = self.checks.Watcher(self, self.ledger)
        self.watcher.enqueued["batch:b1"] = 1
        self.cron = {"each-second": (100, 102, 103)}
        for tick in (101, 102):
            self.add_tick(tick)
        self.oom: list[tuple[float, float]] = []

    def add_tick(self, wall_s: int, times: int = 1) -> None:
        """A tick that was enqueued and ran."""
        id = self.checks._tick_id("each-second", wall_s)
        self.starts[id] = [6.0]
        self.watcher.enqueued[id] = times

    def get(self, key: str) -> bytes | None:
        return self.results.get(key)

    def hgetall(self, key: str) -> dict[bytes, bytes]:
        return self.records.get(key, {})

    def broken(self) -> list[str]:
        """Names of the broken promises."""
        event = self._world.events_module.Event
        events = [
            event(what, id, 0, 7, start_s)
            for id, starts in self.starts.items()
            for start_s in starts
            for what in ("start", *(["end"] if id in self.effects else []))
        ]
        letters = [self._world.oracle.Letter(id, reason, 0) for id, reason in self.letters]
        verdict = self._world.oracle.Verdict()
        seen = self.checks.Seen(
            self.ledger, events, self.effects, letters, self.watcher, self, self.cron, 100.0, self.oom
        )
        self.checks.check_flow(verdict, seen)
        return verdict.broken()  # type: ignore[no-any-return]


@pytest.fixture
def flow(world: World) -> FlowWorld:
    return FlowWorld(world)


def test_a_run_of_flow_control_without_fault_is_safe(flow: FlowWorld) -> None:
    assert flow.broken() == []
    flow.starts["s1"] = [1.0]  # before the newer one
    flow.add_tick(103)  # between the last look at the table and its pause
    assert flow.broken() == []


def test_jobs_with_one_key_that_ran_both_or_neither_are_reported(flow: FlowWorld) -> None:
    flow.effects["k2"] = ["k2"]
    flow.starts["k2"] = [7.0]
    assert flow.broken() == ["key_doubled"]
    flow.oom = [(0.5, 2.0)]
    assert flow.broken() == [], "the keys could not be kept"
    flow.oom = []
    for id in ("k1", "k2"):
        del flow.effects[id]
    assert flow.broken() == ["key_lost"]


def test_a_lost_or_late_job_of_a_series_is_reported(flow: FlowWorld) -> None:
    flow.starts["s1"] = [6.5]
    assert flow.broken() == ["series_disorder"]
    del flow.starts["s1"], flow.effects["s2"]
    assert flow.broken() == ["series_lost"]


def test_a_job_that_starts_before_its_time_is_reported(flow: FlowWorld) -> None:
    flow.starts["delay"] = [4.9]
    assert flow.broken() == ["started_early"]


@pytest.mark.parametrize(
    "change",
    [
        lambda flow: flow.starts.update(c1=[5.5]),
        lambda flow: flow.letters.remove(("c1", "cancelled")),
        lambda flow: flow.letters.append(("c1", "cancelled")),
        lambda flow: flow.effects.pop("c2"),
    ],
)
def test_a_cancelled_job_that_runs_or_is_lost_is_reported(flow: FlowWorld, change: Any) -> None:
    change(flow)
    assert flow.broken() == ["cancel_wrong"]


def test_a_missing_or_wrong_result_is_reported(flow: FlowWorld) -> None:
    flow.results["result:chaos:jobs/keep"] = b'{"state":"dead"}'
    assert flow.broken() == ["results_wrong"]
    flow.results.clear()
    assert flow.broken() == ["results_wrong"]


@pytest.mark.parametrize(
    "change",
    [
        lambda flow: flow.records["batch:chaos:jobs/b1"].update({b"done": b"2"}),
        lambda flow: flow.records["batch:chaos:jobs/b1"].pop(b"finished"),
        lambda flow: flow.watcher.enqueued.update(["batch:b1"]),
        lambda flow: flow.starts.pop("batch:b1"),
        lambda flow: flow.watcher.wrong.append("3 of 2"),
    ],
)
def test_a_wrong_count_or_a_second_callback_is_reported(flow: FlowWorld, change: Any) -> None:
    change(flow)
    assert flow.broken() == ["batch_wrong"]


@pytest.mark.parametrize(
    "change",
    [
        lambda flow: flow.add_tick(102, times=2),
        lambda flow: flow.add_tick(104),
        lambda flow: flow.starts.pop(flow.checks._tick_id("each-second", 101)),
    ],
)
def test_a_tick_that_is_missing_doubled_or_invented_is_reported(flow: FlowWorld, change: Any) -> None:
    change(flow)
    assert flow.broken() == ["cron_wrong"]


def test_every_mark_is_in_a_plan(flow: FlowWorld) -> None:
    jobs = flow.flow.with_flow(flow._load.plan(1500, random.Random(7)), random.Random(7))
    for mark in ("key", "series", "batch", "delay_s", "cancel", "keep"):
        assert sum(bool(getattr(job.flow, mark)) for job in jobs) > 20, mark
