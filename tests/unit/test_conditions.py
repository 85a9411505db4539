"""Start conditions of jobs, in the harness: duplicates, replaced, delayed and expired jobs."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import Any

import pytest

from jobworker.worker import Job
from jobworker.worker.conditions import parse_time, requeued
from jobworker.worker.envelope import fresh_job, read_header
from jobworker.worker.errors import PermanentError, RateLimited
from jobworker.worker.outcome import RetryPolicy
from jobworker.worker.settings import Settings
from jobworker.worker.testing import Harness
from support.reader_rig import ReaderRig, reader_rig

ONE_KEY = {"idempotency_key": "k"}
CHAPTER = {"supersede_key": "chapter-7"}
SETTINGS = Settings(retry=RetryPolicy(jitter=0.0), instance="test", host="test")


class Saves:
    """Records payloads; raises what a test wants for a payload."""

    def __init__(self) -> None:
        self.ran: list[Any] = []
        self.raises: dict[Any, Exception] = {}
        self.during: dict[Any, Callable[[], object]] = {}

    def handle(self, job: Job) -> None:
        self.ran.append(job.payload)
        if during := self.during.pop(job.payload, None):
            during()
        if error := self.raises.get(job.payload):
            raise error


@pytest.fixture
def saves() -> Saves:
    return Saves()


@pytest.fixture
def make(saves: Saves) -> Iterator[Callable[..., Harness]]:
    with ExitStack() as stack:
        yield lambda **settings: stack.enter_context(
            Harness({"save": saves}, dataclasses.replace(SETTINGS, **settings))
        )


@pytest.fixture
def harness(make: Callable[..., Harness]) -> Harness:
    return make()


def reasons(harness: Harness) -> list[tuple[str, str]]:
    return [(letter.job_id, letter.reason) for letter in harness.dead]


def requeue(harness: Harness) -> None:
    """Send the only dead letter again, as an operator does."""
    (letter,) = harness.dead
    assert letter.task is not None
    harness.send(requeued(letter.task, letter.original_id))
    harness.run()


class TestUnique:
    def test_a_second_job_is_acknowledged_and_counted_and_not_run(
        self, harness: Harness, saves: Saves
    ) -> None:
        for payload in (1, 2):
            harness.enqueue("save", payload, metadata=ONE_KEY)
        harness.run()
        harness.enqueue("save", 3, metadata=ONE_KEY)
        harness.run()
        assert saves.ran == [1]
        assert (harness.unfinished, len(harness.completed), harness.dead) == (0, 1, [])
        assert harness.metric("z_novel_jobs_duplicate_total", "save") == 2
        assert harness.metric("z_novel_jobs_completed_total", "save") == 1

    def test_a_duplicate_that_asks_for_its_result_says_so(self, harness: Harness, saves: Saves) -> None:
        asks = {**ONE_KEY, "keep_result": "true"}
        first = harness.enqueue("save", "v1", metadata=asks)
        second = harness.enqueue("save", "v2", metadata=asks)
        assert harness.result(first).state == "succeeded"
        found = harness.result(second)
        assert (found.state, found.value, found.reason) == ("duplicate", None, "duplicate")

    def test_a_job_that_is_sent_twice_with_one_id_has_the_result_of_its_run(
        self, harness: Harness, saves: Saves
    ) -> None:
        asks = {**ONE_KEY, "keep_result": "true"}
        harness.producer.enqueue("save", "v1", id="j1", metadata=asks)
        saves.during["v1"] = lambda: harness.producer.enqueue("save", "v2", id="j1", metadata=asks)
        harness.run()
        harness.producer.enqueue("save", "v3", id="j1", metadata=asks)
        harness.run()
        assert saves.ran == ["v1"]
        assert harness.result("j1").state == "succeeded"

    def test_it_runs_after_the_window(self, make: Callable[..., Harness], saves: Saves) -> None:
        one = make(unique_window_s=60.0)
        for _ in range(2):
            one.enqueue("save", 1, metadata=ONE_KEY)
            one.advance(60)
        assert saves.ran == [1, 1]

    def test_without_a_window_keys_do_not_count(self, make: Callable[..., Harness], saves: Saves) -> None:
        one = make(unique_window_s=0.0)
        for _ in range(2):
            one.enqueue("save", 1, metadata=ONE_KEY)
        one.run()
        assert saves.ran == [1, 1]

    def test_retries_of_the_owner_run(self, harness: Harness, saves: Saves) -> None:
        saves.raises[1] = ConnectionError("no")
        harness.enqueue("save", 1, metadata=ONE_KEY)
        harness.enqueue("save", 2, metadata=ONE_KEY)
        harness.advance(3)
        saves.raises.clear()
        harness.advance(60)
        assert saves.ran == [1, 1, 1]

    @pytest.mark.parametrize("error", [PermanentError("no"), ConnectionError("no")], ids=lambda e: type(e))
    def test_after_a_dead_letter_the_key_is_free(
        self, harness: Harness, saves: Saves, error: Exception
    ) -> None:
        saves.raises[1] = error
        harness.enqueue("save", 1, metadata=ONE_KEY)
        harness.advance(60)
        assert len(harness.dead) == 1
        harness.enqueue("save", 2, metadata=ONE_KEY)
        harness.run()
        assert saves.ran[-1] == 2

    def test_a_requeued_dead_letter_runs_though_another_job_has_the_key(
        self, harness: Harness, saves: Saves
    ) -> None:
        saves.raises[1] = PermanentError("no")
        harness.enqueue("save", 1, metadata=ONE_KEY)
        harness.run()
        harness.enqueue("save", 2, metadata=ONE_KEY)
        harness.run()
        saves.raises.clear()
        requeue(harness)
        assert saves.ran == [1, 2, 1]

    def test_a_delayed_job_has_its_key_already(self, harness: Harness, saves: Saves) -> None:
        harness.enqueue("save", 1, metadata=ONE_KEY, delay=10)
        harness.run()
        harness.enqueue("save", 2, metadata=ONE_KEY)
        harness.advance(20)
        assert saves.ran == [1]

    def test_ticks_of_cron_run(self, saves: Saves) -> None:
        table = {"name": "n", "schedule": "@every 10m", "type": "save", "payload": 1}
        with Harness({"save": saves}, cron=[table]) as one:
            one.advance(3600)
        assert saves.ran == [1] * 6


class TestSupersede:
    def test_a_replaced_job_that_asks_for_its_result_says_so(self, harness: Harness, saves: Saves) -> None:
        asks = {**CHAPTER, "keep_result": "true"}
        ids = harness.producer.enqueue_many({"type": "save", "payload": n, "metadata": asks} for n in (1, 2))
        harness.run()
        assert [harness.result(id).state for id in ids] == ["superseded", "succeeded"]

    def test_a_cancelled_job_stays_the_newest(self, harness: Harness, saves: Saves) -> None:
        # Its predecessors were replaced when it arrived. A later job runs as ever.
        harness.enqueue("save", "v1", metadata=CHAPTER, delay=10)
        second = harness.enqueue("save", "v2", metadata=CHAPTER, delay=20)
        harness.run()
        assert harness.cancel(second) == "cancelled"
        harness.advance(60)
        assert saves.ran == []
        harness.enqueue("save", "v3", metadata=CHAPTER)
        harness.run()
        assert saves.ran == ["v3"]

    def test_jobs_that_wait_are_replaced_and_counted(self, harness: Harness, saves: Saves) -> None:
        for payload in range(50):
            harness.enqueue("save", payload, metadata=CHAPTER)
        harness.run()
        assert saves.ran == sorted(saves.ran)
        assert saves.ran[-1] == 49
        assert len(saves.ran) < 50
        assert (harness.unfinished, len(harness.completed), harness.dead) == (0, len(saves.ran), [])
        replaced = harness.metric("z_novel_jobs_superseded_total", "save")
        assert replaced + len(saves.ran) == 50

    def test_with_a_delay_a_hundred_saves_are_one_run(self, harness: Harness, saves: Saves) -> None:
        for payload in range(100):
            harness.enqueue("save", payload, metadata=CHAPTER, delay=2)
            harness.advance(0.1)
            assert len(harness.retrying) <= 1
        harness.advance(10)
        assert saves.ran == [99]

    def test_without_a_pause_between_saves_the_last_is_stored_last(
        self, harness: Harness, saves: Saves
    ) -> None:
        for payload in range(100):
            harness.enqueue("save", payload, metadata=CHAPTER)
            harness.run()
        assert saves.ran == list(range(100))

    def test_a_job_that_arrives_during_a_run_waits_for_its_end(self, harness: Harness, saves: Saves) -> None:
        def send_two() -> None:
            harness.enqueue("save", 2, metadata=CHAPTER)
            harness.enqueue("save", 3, metadata=CHAPTER)

        saves.during[1] = send_two
        harness.enqueue("save", 1, metadata=CHAPTER)
        harness.run()
        assert saves.ran == [1, 3]

    def test_a_retry_gives_way_to_a_newer_job(self, harness: Harness, saves: Saves) -> None:
        saves.raises[1] = ConnectionError("no")
        harness.enqueue("save", 1, metadata=CHAPTER)
        harness.run()
        harness.enqueue("save", 2, metadata=CHAPTER)
        harness.advance(60)
        assert saves.ran == [1, 2]
        assert harness.metric("z_novel_jobs_superseded_total", "save") == 1

    def test_a_requeued_dead_letter_never_runs_after_a_newer_job(
        self, harness: Harness, saves: Saves
    ) -> None:
        saves.raises[1] = PermanentError("no")
        harness.enqueue("save", 1, metadata=CHAPTER)
        harness.run()
        saves.raises.clear()
        requeue(harness)
        assert saves.ran == [1, 1]
        harness.enqueue("save", 2, metadata=CHAPTER)
        harness.run()
        requeue(harness)
        assert saves.ran == [1, 1, 2]

    def test_a_rate_limited_job_gives_way_too(self, harness: Harness, saves: Saves) -> None:
        saves.raises[1] = RateLimited(30.0)
        harness.enqueue("save", 1, metadata=CHAPTER)
        harness.run()
        harness.enqueue("save", 2, metadata=CHAPTER)
        harness.advance(60)
        assert saves.ran == [1, 2]
        assert harness.unfinished == 0

    def test_jobs_without_the_key_and_of_other_tenants_are_not_replaced(
        self, harness: Harness, saves: Saves
    ) -> None:
        harness.enqueue("save", 1, metadata=CHAPTER, tenant_id="a")
        harness.enqueue("save", 2, metadata=CHAPTER, tenant_id="b")
        harness.enqueue("save", 3)
        harness.run()
        assert sorted(saves.ran) == [1, 2, 3]


class TestTimes:
    def test_a_job_does_not_start_before_its_time(self, harness: Harness, saves: Saves) -> None:
        at = harness.wall_now_s() + 30
        harness.enqueue("save", 1, run_at=datetime.fromtimestamp(at, UTC))
        harness.advance(29.9)
        assert (saves.ran, [round(one.due_in_s, 3) for one in harness.retrying]) == ([], [0.1])
        harness.advance(0.2)
        assert saves.ran == [1]
        assert [job.retry_count for job in harness.completed] == [0]

    def test_a_time_of_the_past_is_now(self, harness: Harness, saves: Saves) -> None:
        harness.enqueue("save", 1, run_at=1.0)
        harness.run()
        assert saves.ran == [1]

    def test_an_expired_job_is_dead_lettered_unseen(self, harness: Harness, saves: Saves) -> None:
        harness.enqueue("save", 1, id="late", expires_at=harness.wall_now_s() - 1)
        harness.enqueue("save", 2, id="never", delay=20, expires_at=harness.wall_now_s() + 10)
        harness.enqueue("save", 3, id="early", delay=5, expires_at=harness.wall_now_s() + 10)
        harness.advance(60)
        assert saves.ran == [3]
        assert reasons(harness) == [("late", "expired"), ("never", "expired")]
        assert harness.metric("z_novel_jobs_dead_total", "save", "expired") == 2
        assert harness.metric("z_novel_jobs_failed_total", "save") == 0

    def test_a_retry_that_would_come_too_late_is_dead_lettered_at_once(
        self, harness: Harness, saves: Saves
    ) -> None:
        saves.raises[1] = ConnectionError("no")
        harness.enqueue("save", 1, id="late", expires_at=harness.wall_now_s() + 5)
        harness.advance(2.5)
        assert reasons(harness) == [("late", "expired")]
        assert harness.dead[0].error == "ConnectionError: no"
        assert saves.ran == [1, 1]

    def test_a_job_that_expires_in_a_workers_queue_is_not_started(
        self, harness: Harness, saves: Saves
    ) -> None:
        saves.during[1] = lambda: harness.advance(10)
        harness.enqueue("save", 1)
        harness.enqueue("save", 2, id="late", expires_at=harness.wall_now_s() + 5)
        harness.run()
        assert saves.ran == [1]
        assert reasons(harness) == [("late", "expired")]

    def test_a_requeued_job_runs_whatever_its_times_say(self, harness: Harness, saves: Saves) -> None:
        harness.enqueue("save", 1, expires_at=1.0)
        harness.run()
        requeue(harness)
        assert saves.ran == [1]

    def test_a_time_that_cannot_be_read_is_malformed(self, harness: Harness, saves: Saves) -> None:
        for field in ("not_before", "expires_at"):
            job = {"id": field, "type": "save", "metadata": {field: "tomorrow"}}
            harness.send(json.dumps(job).encode())
        harness.run()
        assert reasons(harness) == [("not_before", "malformed"), ("expires_at", "malformed")]
        assert harness.dead[0].error.startswith("MalformedJob: metadata.not_before: 'tomorrow' is neither")


@pytest.fixture
def rig() -> Iterator[ReaderRig]:
    with reader_rig() as one:
        yield one


def test_a_prefetched_job_expires_while_its_type_is_paused(rig: ReaderRig) -> None:
    expires_at = str(rig.server.wall_now_s() + 5)
    rig.server.paused.add("a")
    rig.advance(1)
    rig.add("late", metadata={"expires_at": expires_at})
    rig.add("stays")
    rig.advance(1)
    assert rig.letters == []
    rig.advance(4)
    assert [(one["task"]["id"], one["reason"]) for one in rig.letters] == [("late", "expired")]
    assert rig.pending == 1


def test_a_reader_that_is_killed_after_it_claimed_a_key_does_not_lose_the_job(rig: ReaderRig) -> None:
    (worker,) = rig.workers
    rig.add("1", metadata={"idempotency_key": "k"})
    rig.tick()
    assert worker.take() == ["1"]
    other = ReaderRig(rig.server, host="two", lease_s=1.0)
    other.attach()
    other.sync()
    rig.now_s = other.now_s = 100.0  # the lease of the first reader has expired
    other.tick()
    assert other.workers[0].take() == ["1"]
    other.workers[0].succeed("1")
    other.tick()
    other.close()


class Killed(BaseException):
    """The reader is killed."""


#: Calls of the store that change something.
_CALLS = ("finish_read", "begin_claim", "finish_claim", "screen", "settle", "sort", "take")


def kill_at(rig: ReaderRig, number: int) -> None:
    """Kill the reader before (even numbers) or after (odd ones) a call of its store."""
    calls = iter(range(0, 2 * 10**6, 2))

    def doomed(call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any) -> Any:
            at = next(calls)
            if at == number:
                raise Killed
            result = call(*args)
            if at + 1 == number:
                raise Killed
            return result

        return called

    for name in _CALLS:
        setattr(rig.store, name, doomed(getattr(rig.store, name)))


def run_through(rigs: list[ReaderRig]) -> list[str]:
    """Run all jobs for some seconds; a killed reader gets a successor. Returns the ids that ran."""
    ran: list[str] = []
    for _ in range(10):
        rig = rigs[-1]
        rigs[0].now_s = rig.now_s + 0.5  # the server's clock is that of the first reader
        try:
            rig.advance(0.5)
            for id in rig.workers[0].take():
                ran.append(id)
                rig.workers[0].succeed(id)
            rig.tick()
        except Killed:
            rig.crash()
            rigs.append(ReaderRig(rig.server))
            rigs[-1].now_s = rig.now_s
            rigs[-1].attach()
            rigs[-1].sync()
        rigs[-1].store.promote("stream", 100)
    return ran


def last(ids: list[str], start: str) -> str:
    return [id for id in ids if id.startswith(start)][-1]


def test_a_reader_that_is_killed_at_any_call_loses_no_job_and_runs_no_other() -> None:
    kills = 0
    for number in range(200):
        with ExitStack() as stack:
            one = ReaderRig()
            rigs = [one]
            stack.callback(lambda rigs=rigs: [each.close() for each in rigs])
            one.attach()
            one.sync()
            soon = str(one.server.wall_now_s() + 1)
            one.add("u1", "u2", metadata={"idempotency_key": "k"})
            one.add("s1", "s2", metadata={"supersede_key": "c", "not_before": soon})
            one.add("r1", "r2", metadata={"supersede_key": "d"})
            one.add("late", metadata={"expires_at": "1"})
            kill_at(one, number)
            ran = run_through(rigs)
            kills += len(rigs) > 1
            assert set(ran) - {"r1"} == {"u1", "s2", "r2"}, number
            assert last(ran, "r") == "r2", number
            assert [one["task"]["id"] for one in rigs[-1].letters] == ["late"], number
            assert (rigs[-1].pending, rigs[-1].retries) == (0, []), number
            if len(rigs) == 1:
                break
    assert kills > 10


@pytest.mark.parametrize(
    "text", ["", "now", "12:00", "2026-01-02", "2026-01-02T10:00:00", "nan", "inf", "-1", "1e18"], ids=repr
)
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_time(text)


def test_times_are_rfc_3339_or_unix_seconds() -> None:
    for text in ("2026-01-02T10:00:00Z", "2026-01-02T11:00:00.000+01:00", "1767348000", "1767348000.0"):
        assert parse_time(text) == 1767348000.0


def test_only_a_job_with_conditions_is_marked_when_it_is_requeued() -> None:
    plain = b'{"id":"j","type":"t","metadata":{"priority":"5"},"retry_count":3}'
    assert requeued(plain, "1-1") == fresh_job(plain)
    keyed = b'{"id":"j","type":"t","metadata":{"idempotency_key":"k"},"retry_count":3}'
    header = read_header(requeued(keyed, "1-1"))
    assert (header.requeued, header.first_id, header.retry_count) == (True, "1-1", 0)
    again = read_header(requeued(requeued(keyed, "1-1"), "2-2"))
    assert again.first_id == "1-1"
