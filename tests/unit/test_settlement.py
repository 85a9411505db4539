"""Settlement: what becomes of jobs that succeed, fail, or lose their worker."""

import base64
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

import pytest

from jobworker.worker.admin.identity import read_identity
from jobworker.worker.envelope import MAX_NESTING
from jobworker.worker.errors import Fenced, StoreUnavailable
from jobworker.worker.ipc.control import Attach, ExitReclaimed, WorkerExited
from jobworker.worker.keys import Source
from jobworker.worker.outcome import Failure, RetryPolicy
from jobworker.worker.store.memory.store import MemoryStore
from jobworker.worker.store.ports import Entry, Settled, Settlement
from support.reader_rig import SOURCE, ReaderRig, reader_rig

FAILED = Failure("ValueError: no")
PERMANENT = Failure("PermanentError: no", permanent=True)
UNAVAILABLE = Failure("Unavailable: store", unavailable=True)


@pytest.fixture
def rig() -> Iterator[ReaderRig]:
    with reader_rig() as made:
        yield made


# -- outcomes


def test_a_job_that_succeeds_is_acknowledged_once(rig: ReaderRig) -> None:
    rig.add("1", "2", "3")
    rig.tick()
    (worker,) = rig.workers
    assert worker.take() == ["1", "2", "3"]
    worker.succeed("1", "3")
    rig.tick()
    assert rig.pending == 1
    worker.succeed("2")
    rig.tick()
    assert (rig.pending, rig.retries, rig.letters) == (0, [], [])
    assert rig.metric("z_novel_jobs_completed_total", "a") == 3


def test_jobs_of_two_streams_are_acknowledged_on_their_own_stream() -> None:
    other = SOURCE._replace(stream="other")
    with reader_rig(streams=(SOURCE, other)) as rig:
        rig.add("1", "2")
        rig.server.append("other", b'{"id":"3","type":"b"}')
        rig.tick()
        ids = rig.workers[0].take()
        rig.workers[0].succeed(*ids)
        rig.tick()
        assert [rig.store.depths(source).pending for source in (SOURCE, other)] == [0, 0]
        assert [rig.metric("z_novel_jobs_completed_total", name) for name in "ab"] == [2, 1]


def test_a_failed_job_is_retried_until_its_retries_are_exhausted(rig: ReaderRig) -> None:
    rig.add("1")
    rig.add("2", retry_count=3)
    rig.tick()
    (worker,) = rig.workers
    for job_id in worker.take():
        worker.fail(job_id, FAILED)
    rig.tick()
    assert [(job["id"], job["retry_count"]) for job in rig.retries] == [("1", 1)]
    assert [(letter["reason"], letter["task"]["id"]) for letter in rig.letters] == [("exhausted", "2")]
    assert (rig.pending, rig.metric("z_novel_jobs_failed_total", "a")) == (0, 2)


def test_refusals_are_looked_for_only_once_leases_may_have_expired(
    rig: ReaderRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    sure: list[bool] = []
    settle = rig.store.settle

    def noting(settlements: Sequence[Settlement], meanwhile: Callable[[], None]) -> list[Settled]:
        sure.extend(one.sure for one in settlements)
        return settle(settlements, meanwhile)

    monkeypatch.setattr(rig.store, "settle", noting)
    for late_s in (0.0, rig.settings.lease_s * 0.6):
        rig.add(str(late_s))
        rig.tick()
        rig.workers[0].take()
        rig.workers[0].succeed(str(late_s))
        rig.now_s += late_s
        rig.reader.run_once(0.0)
    assert sure == [True, False]


def test_a_malformed_payload_is_kept_as_it_was(rig: ReaderRig) -> None:
    data = b'{"id":"1","type":"a","payload":"\xff"}'
    rig.server.append(SOURCE.stream, data)
    rig.tick()
    rig.workers[0].take()
    rig.workers[0].fail("1", Failure("MalformedJob: not UTF-8", malformed=True))
    rig.tick()
    (letter,) = rig.letters
    assert (letter["reason"], letter["task"], base64.b64decode(letter["raw"])) == ("malformed", None, data)
    assert (rig.pending, rig.metric("z_novel_jobs_dead_total", "a", "malformed")) == (0, 1)


MALFORMED = b'{"id":"1","type":"a","project_id":5}'
MALFORMED_WITH_KEY = b'{"id":"1","type":"a","project_id":5,"metadata":{"idempotency_key":"k"}}'


def test_a_job_of_which_a_worker_says_that_it_is_malformed_is_rejected(rig: ReaderRig) -> None:
    """The reader has read its route only."""
    rig.server.append(SOURCE.stream, MALFORMED)
    rig.tick(2)
    worker = rig.workers[0]
    assert worker.take() == ["1"]
    worker.fail("1", Failure("MalformedJob: no", malformed=True))
    rig.tick()
    (letter,) = rig.letters
    assert (letter["reason"], letter["task"]) == ("malformed", None)
    assert base64.b64decode(letter["raw"]) == MALFORMED
    assert "project_id" in letter["error"]
    assert (rig.pending, rig.metric("z_novel_jobs_dead_total", "unknown", "malformed")) == (0, 1)
    assert rig.metric("z_novel_jobs_failed_total", "a") == 0


def test_a_worker_that_dies_over_a_malformed_job_does_not_end_the_reader(rig: ReaderRig) -> None:
    rig.server.append(SOURCE.stream, MALFORMED)
    rig.tick(2)
    worker = rig.workers[0]
    worker.start(*worker.take())
    rig.exit(worker)
    rig.tick()
    assert [letter["reason"] for letter in rig.letters] == ["malformed"]
    assert rig.pending == 0


def test_a_worker_that_is_ended_over_a_malformed_job_does_not_end_the_reader(rig: ReaderRig) -> None:
    """A worker that waits for room in its outcome ring has started the job and may run into a timeout."""
    rig.server.append(SOURCE.stream, MALFORMED)
    rig.tick(2)
    worker = rig.workers[0]
    worker.start(*worker.take())
    rig.exit(worker, "ran past its timeout", timed_out=True)
    rig.tick()
    assert [letter["reason"] for letter in rig.letters] == ["malformed"]
    assert rig.pending == 0


@pytest.mark.parametrize("more", [{}, {"keep_result": "1"}], ids=["plain", "keeps its result"])
def test_a_malformed_job_takes_no_key_from_a_good_one(rig: ReaderRig, more: dict[str, str]) -> None:
    """A duplicate of it would be dropped, and no job of the key would run."""
    rig.server.append(SOURCE.stream, MALFORMED_WITH_KEY)
    rig.add("good", metadata={"idempotency_key": "k", **more})
    rig.tick()
    assert rig.workers[0].take() == ["good"]
    assert [letter["reason"] for letter in rig.letters] == ["malformed"]
    rig.server.append(SOURCE.stream, MALFORMED_WITH_KEY)
    rig.tick()
    assert [letter["reason"] for letter in rig.letters] == ["malformed", "malformed"]


def test_a_malformed_job_does_not_occupy_the_probe_of_a_circuit_breaker(rig: ReaderRig) -> None:
    """It says nothing about the dependency: the next job of the type is the probe at once."""
    (worker,) = rig.workers
    rig.add("1")
    rig.tick()
    assert worker.take() == ["1"]
    worker.fail("1", UNAVAILABLE)
    rig.tick()
    rig.server.append(SOURCE.stream, MALFORMED.replace(b'"1"', b'"bad"'))
    rig.add("2")
    rig.advance(1.1)
    assert worker.take() == ["1"]
    worker.fail("1", UNAVAILABLE)
    rig.tick()
    rig.advance(2.1)
    assert worker.take() == ["bad"]
    worker.fail("bad", Failure("MalformedJob: no", malformed=True))
    rig.advance(0.1)
    assert worker.take() == ["2"]


def test_a_permanent_failure_is_not_retried(rig: ReaderRig) -> None:
    rig.add("1")
    rig.tick()
    rig.workers[0].take()
    rig.workers[0].fail("1", PERMANENT)
    rig.tick()
    assert [(letter["reason"], letter["error"]) for letter in rig.letters] == [
        ("permanent", "PermanentError: no")
    ]
    assert rig.letters[0]["worker"] == "one/one/0"


RAISED = Failure("ValueError: no", traceback="Traceback ...\nValueError: no")


def test_the_traceback_is_in_the_log_and_in_the_dead_letter(
    rig: ReaderRig, caplog: pytest.LogCaptureFixture
) -> None:
    rig.add("1", tenant_id="t001")
    rig.add("2", retry_count=3)
    rig.tick()
    for job_id in rig.workers[0].take():
        rig.workers[0].fail(job_id, RAISED)
    rig.tick()
    assert [letter["details"] for letter in rig.letters] == [{"traceback": RAISED.traceback}]
    lines = [vars(record) for record in caplog.records if "exception" in vars(record)]
    assert {(line["msg"], line["job_id"], line["exception"]) for line in lines} == {
        ("job.retry_scheduled", "1", RAISED.traceback),
        ("job.dead_lettered", "2", RAISED.traceback),
    }


def test_a_job_that_waits_for_its_retry_keeps_its_last_error_and_its_dead_letter_does_not(
    rig: ReaderRig,
) -> None:
    rig.add("1", retry_count=2)
    rig.tick()
    rig.workers[0].take()
    rig.workers[0].fail("1", FAILED)
    rig.tick()
    (waiting,) = rig.server.waiting(SOURCE.stream)
    assert read_identity(waiting).last_error == "ValueError: no"
    rig.server.append(SOURCE.stream, waiting)
    rig.tick()
    rig.workers[0].take()
    rig.workers[0].fail("1", FAILED)
    rig.tick()
    assert rig.letters[0]["task"] == {"id": "1", "type": "a", "retry_count": 3}


def test_outcomes_are_settled_once_the_store_answers_again(rig: ReaderRig) -> None:
    rig.add("1", "2")
    rig.tick()
    (worker,) = rig.workers
    worker.take()
    settle = rig.store.settle

    def unavailable(*_: object) -> set[bytes]:
        raise StoreUnavailable("away")

    rig.store.settle = unavailable  # type: ignore[method-assign]
    rig.server.append(SOURCE.stream, b"not a job")
    worker.succeed("1")
    worker.fail("2", FAILED)
    rig.advance(5.0)
    rig.store.settle = settle  # type: ignore[method-assign]
    rig.advance(5.0)
    rig.tick(20)
    assert [job["id"] for job in rig.retries] == ["2"]
    assert [letter["reason"] for letter in rig.letters] == ["malformed"]
    assert rig.pending == 0
    assert rig.metric("z_novel_jobs_dead_total", "unknown", "malformed") == 1
    assert rig.metric("z_novel_jobs_completed_total", "a") == 1


def test_an_opened_circuit_breaker_says_what_the_job_reported(
    rig: ReaderRig, caplog: pytest.LogCaptureFixture
) -> None:
    rig.add("1")
    rig.tick()
    rig.workers[0].take()
    rig.workers[0].fail("1", UNAVAILABLE)
    rig.tick()
    (line,) = [vars(record) for record in caplog.records if record.msg == "circuit.opened"]
    assert (line["task_type"], line["error"]) == ("a", UNAVAILABLE.error)


# -- exited workers


def test_jobs_that_an_exited_worker_had_not_started_run_first_and_for_free(rig: ReaderRig) -> None:
    rig.add("1", "2", "3")
    rig.tick()
    rig.workers[0].take()
    rig.exit(rig.workers[0])
    rig.add("4")
    rig.tick()
    rig.receive()
    assert ExitReclaimed(0, 1) in rig.messages
    successor = rig.attach()
    rig.tick()
    assert successor.take() == ["1", "2", "3", "4"]
    assert rig.metric("z_novel_jobs_failed_total", "a") == 0
    assert rig.server.stream(SOURCE.stream).deaths == {}


def test_a_started_job_is_charged_with_the_death_and_runs_isolated(rig: ReaderRig) -> None:
    rig.add("1", "2", "3")
    rig.tick()
    (worker,) = rig.workers
    worker.take()
    worker.start("2")
    rig.exit(worker)
    rig.tick()
    first, second = rig.attach(), rig.attach()
    rig.add("4", "5")
    rig.tick()
    runs = sorted([first.take(), second.take()], key=len)
    assert runs == [["2"], ["1", "3", "4", "5"]]
    assert list(rig.server.stream(SOURCE.stream).deaths.values()) == [1]
    assert rig.metric("z_novel_jobs_failed_total", "a") == 1


def test_a_job_that_succeeded_before_its_worker_died_is_acknowledged(rig: ReaderRig) -> None:
    rig.add("1", "2")
    rig.tick()
    (worker,) = rig.workers
    worker.take()
    worker.succeed("1")
    worker.fail("2", FAILED)
    rig.exit(worker)
    rig.tick()
    assert (rig.pending, [job["id"] for job in rig.retries]) == (0, ["2"])
    assert rig.server.stream(SOURCE.stream).deaths == {}


def test_a_job_that_kills_three_workers_is_poison(rig: ReaderRig) -> None:
    rig.add("1")
    for _ in range(3):
        rig.tick()
        worker = rig.workers[-1]
        assert worker.take() == ["1"]
        worker.start("1")
        rig.exit(worker, "SIGSEGV")
        rig.tick()
        rig.restart(worker)
        rig.tick()
        rig.advance(1.0)
    (letter,) = rig.letters
    assert (letter["reason"], letter["error"], letter["deaths"]) == ("poison", "WorkerDied: SIGSEGV", 3)
    assert letter["details"]["batch"] == [letter["original_id"]]
    assert rig.pending == 0


@pytest.mark.parametrize("max_retries", [0, 1, 2, 20])
@pytest.mark.parametrize("retry_count", [0, 1])
def test_a_job_is_poison_after_three_deaths_whatever_the_limit_of_retries(
    max_retries: int, retry_count: int
) -> None:
    with reader_rig(retry=RetryPolicy(max_retries=max_retries)) as rig:
        rig.add("1", retry_count=retry_count)
        rig.tick()
        for _ in range(3):
            assert not rig.letters
            rig.advance(2.0)  # it waits after the second death
            worker = rig.workers[-1]
            assert worker.take() == ["1"]
            worker.start("1")
            rig.exit(worker, "SIGSEGV")
            rig.restart(worker)
            rig.tick()
        (letter,) = rig.letters
        assert (letter["reason"], letter["deaths"]) == ("poison", 3)


def test_a_death_counts_as_a_failed_try_of_a_job_that_fails_later() -> None:
    with reader_rig(retry=RetryPolicy(max_retries=1)) as rig:
        rig.add("1")
        rig.tick()
        (worker,) = rig.workers
        worker.take()
        worker.start("1")
        rig.exit(worker)
        successor = rig.attach()
        rig.tick()
        assert successor.take() == ["1"]
        successor.fail("1", FAILED)
        rig.tick()
        assert [letter["reason"] for letter in rig.letters] == ["exhausted"]


def test_a_worker_that_was_stopped_on_purpose_charges_no_job(rig: ReaderRig) -> None:
    rig.add("1", "2")
    rig.tick()
    (worker,) = rig.workers
    worker.take()
    worker.start("1")
    rig.exit(worker, "exit 0", charge=False)
    rig.tick()
    successor = rig.attach()
    rig.tick()
    assert successor.take() == ["1", "2"]
    assert rig.server.stream(SOURCE.stream).deaths == {}


def test_a_job_that_exceeds_its_timeout_is_retried_not_charged(rig: ReaderRig) -> None:
    rig.add("1", "2")
    rig.tick()
    (worker,) = rig.workers
    worker.take()
    worker.start("1")
    rig.exit(worker, "timeout of 60 s", timed_out=True)
    rig.tick()
    successor = rig.attach()
    rig.tick()
    assert successor.take() == ["2"]
    assert [(job["id"], job["retry_count"]) for job in rig.retries] == [("1", 1)]
    assert rig.server.stream(SOURCE.stream).deaths == {}


def test_an_isolated_job_stays_isolated_when_it_is_reclaimed_unstarted(rig: ReaderRig) -> None:
    """Its earlier try killed a worker, which only its JSON tells; it is not parsed again."""
    rig.add("1", deaths=1)
    rig.tick()
    rig.workers[0].take()
    rig.exit(rig.workers[0], charge=False)
    rig.tick()
    successor = rig.attach()
    rig.add("2")
    rig.tick()
    assert successor.take() == ["1"], "nothing is queued behind it"


def test_an_entry_that_was_deleted_while_its_worker_died_is_forgotten(rig: ReaderRig) -> None:
    rig.add("1", "2")
    rig.tick()
    (worker,) = rig.workers
    worker.take()
    worker.start("1")
    for entry_id in list(rig.server.entries(SOURCE.stream)):
        rig.server.delete_entry(SOURCE.stream, entry_id)
    rig.exit(worker)
    rig.tick()
    successor = rig.attach()
    rig.tick()
    assert (successor.take(), rig.letters) == ([], [])


def test_a_successor_of_the_reader_reclaims_the_jobs_of_a_worker_that_died_meanwhile() -> None:
    with closing(ReaderRig()) as first:
        worker = first.attach()
        first.sync()
        first.add("1", "2")
        first.tick()
        worker.take()
        worker.start("1")
        first.crash()
        with closing(ReaderRig(server=first.server)) as second:
            second.workers.append(first.workers.pop())
            second.control.send(Attach(0, 1), worker.channel.fds)
            second.exit(worker)
            second.sync()
            second.tick()
            successors = [second.attach(), second.attach()]
            second.tick()
            assert sorted(one.take() for one in successors) == [["1"], ["2"]]
            assert list(second.server.stream(SOURCE.stream).deaths.values()) == [1]


# -- circuit breaker


def test_a_type_whose_dependency_is_unavailable_is_parked_and_probed(rig: ReaderRig) -> None:
    rig.add("1", "2")
    rig.add("3", type_name="b")
    rig.tick()
    (worker,) = rig.workers
    worker.take()
    worker.fail("1", UNAVAILABLE)
    worker.fail("2", UNAVAILABLE)
    worker.succeed("3")
    rig.tick()
    rig.add("4")
    rig.add("5", type_name="b")
    rig.tick()
    assert worker.take() == ["5"], "other types continue"
    assert rig.metric("z_novel_circuit_open", "a") == 1
    rig.advance(1.0)
    (probe,) = worker.take()
    worker.fail(probe, UNAVAILABLE)
    rig.tick()
    rig.advance(1.5)
    assert worker.take() == [], "after a failed probe the wait is twice as long"
    rig.advance(0.5)
    (probe,) = worker.take()
    worker.succeed(probe)
    rig.tick()
    assert len(worker.take()) == 2
    assert (rig.retries, rig.letters, rig.metric("z_novel_circuit_open", "a")) == ([], [], 0)
    assert rig.metric("z_novel_jobs_failed_total", "a") == 0


# -- lost leases

LEASE_S = 30.0
ENDED = {
    "done": None,
    "failed": FAILED,
    "given up": PERMANENT,
}


def taken_over(rig: ReaderRig) -> MemoryStore:
    """Another host claims everything that is pending."""
    other = rig.other_host()
    assert len(other.claim(SOURCE, 0, 100, b"0-0")[1]) == rig.pending
    return other


def end(rig: ReaderRig, *job_ids: str) -> None:
    for job_id in job_ids:
        if failure := ENDED.get(job_id):
            rig.workers[0].fail(job_id, failure)
        else:
            rig.workers[0].succeed(job_id)
    rig.tick()


def counted(rig: ReaderRig) -> dict[str, float]:
    """The counters of settlements that are not 0."""
    names = {
        "completed": ("z_novel_jobs_completed_total", "a"),
        "failed": ("z_novel_jobs_failed_total", "a"),
        "retried": ("z_novel_jobs_retried_total", "a"),
        "dead": ("z_novel_jobs_dead_total", "a", "permanent"),
        "lost": ("z_novel_leases_lost_total", SOURCE.stream),
    }
    return {name: value for name, metric in names.items() if (value := rig.metric(*metric))}


@pytest.mark.parametrize("is_finished", [False, True])
def test_outcomes_of_jobs_that_another_host_took_over_are_counted_as_lost(
    rig: ReaderRig, is_finished: bool
) -> None:
    rig.add(*ENDED)
    rig.tick()
    rig.workers[0].take()
    other = taken_over(rig)
    if is_finished:
        ids = [entry.id for entry in other.own_pending(SOURCE, b"0-0", 10)]
        other.settle([Settlement(SOURCE, done=ids)])
    rig.add("ours")
    rig.tick()
    rig.workers[0].take()
    end(rig, *ENDED, "ours")
    assert counted(rig) == {"completed": 1, "lost": 3}
    assert (rig.retries, rig.letters) == ([], [])


def test_equal_entry_ids_of_two_streams_are_told_apart() -> None:
    other = SOURCE._replace(stream="other")
    with reader_rig(streams=(SOURCE, other)) as rig:
        rig.add("1")
        rig.server.append("other", b'{"id":"2","type":"b"}')
        assert rig.server.entries(SOURCE.stream).keys() == rig.server.entries("other").keys()
        rig.tick()
        rig.workers[0].take()
        taken_over(rig)
        end(rig, "1", "2")
        assert [rig.metric("z_novel_jobs_completed_total", name) for name in "ab"] == [0, 1]
        assert [rig.metric("z_novel_leases_lost_total", one) for one in (SOURCE.stream, "other")] == [1, 0]


def test_a_lost_lease_is_counted_once_however_long_the_job_runs() -> None:
    with reader_rig(lease_s=LEASE_S) as rig:
        rig.add("done")
        rig.tick()
        rig.workers[0].take()
        other = taken_over(rig)
        for _ in range(3):
            rig.advance(LEASE_S / 2)
            other.renew(SOURCE, list(rig.server.entries(SOURCE.stream)))
        assert counted(rig) == {"lost": 1}
        end(rig, "done")
        assert counted(rig) == {"lost": 1}


def test_a_job_whose_lease_was_lost_and_claimed_back_is_completed() -> None:
    with reader_rig(lease_s=LEASE_S) as rig:
        rig.add("done")
        rig.tick()
        rig.workers[0].take()
        taken_over(rig)
        for _ in range(3):
            rig.advance(LEASE_S / 2)
        end(rig, "done")
        assert counted(rig) == {"completed": 1, "lost": 1}
        assert rig.workers[0].take() == [], "it does not run twice here"


def test_answers_to_reads_are_taken_while_outcomes_are_settled(
    rig: ReaderRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    settle, finish_read = rig.store.settle, rig.store.finish_read

    def noting(settlements: Sequence[Settlement], meanwhile: Callable[[], None]) -> list[Settled]:
        steps.append("settle")
        results = settle(settlements, meanwhile)
        steps.append("settled")
        return results

    rig.add("1")
    rig.tick()
    rig.workers[0].take()
    monkeypatch.setattr(rig.store, "settle", noting)
    monkeypatch.setattr(
        rig.store, "finish_read", lambda source: (steps.append("read"), finish_read(source))[1]
    )
    rig.server.append(SOURCE.stream, b"not a job")
    rig.workers[0].succeed("1")
    rig.tick()
    assert steps[:3] == ["settle", "read", "settled"]
    assert [letter["reason"] for letter in rig.letters] == ["malformed"], "it is rejected with the next ones"
    assert rig.pending == 0


def test_a_read_that_fails_while_outcomes_are_settled_repeats_none(rig: ReaderRig) -> None:
    rig.add("1")
    rig.tick()
    rig.workers[0].take()
    finish_read = rig.store.finish_read

    def away(source: Source) -> list[Entry]:
        rig.store.finish_read = finish_read  # type: ignore[method-assign]
        raise StoreUnavailable("away")

    rig.store.finish_read = away  # type: ignore[method-assign]
    rig.add("2")
    rig.workers[0].succeed("1")
    rig.tick()
    assert rig.pending == 1, "its outcome is not settled"
    rig.advance(5.0)
    rig.tick(20)
    assert counted(rig)["completed"] == 1
    assert rig.workers[0].take() == ["2"]


@pytest.mark.parametrize("error", [StoreUnavailable("no answer"), Fenced("lost")])
def test_outcomes_are_counted_once_where_the_answer_of_their_settlement_was_lost(
    rig: ReaderRig, error: Exception
) -> None:
    settle, errors = rig.store.settle, iter([error])

    def lose_an_answer(settlements: Sequence[Settlement], meanwhile: Callable[[], None]) -> list[Settled]:
        results = settle(settlements, meanwhile)
        if lost := next(errors, None):
            raise lost
        return results

    rig.store.settle = lose_an_answer  # type: ignore[method-assign]
    rig.add(*ENDED)
    rig.tick()
    rig.workers[0].take()
    end(rig, *ENDED)
    rig.advance(5.0)
    rig.tick(20)
    assert counted(rig) == {"completed": 1, "failed": 2, "retried": 1, "dead": 1}
    assert (len(rig.retries), len(rig.letters), rig.pending) == (1, 1, 0)
    assert rig.reader._settler._sender.unsure == set()


def test_outcomes_that_a_dead_reader_had_settled_are_no_lost_leases() -> None:
    with closing(ReaderRig()) as first:
        worker = first.attach()
        first.sync()
        first.add("done")
        first.tick()
        worker.take()
        first.reader._settler._release = lambda outcomes: sys.exit()  # type: ignore[method-assign]
        worker.succeed("done")
        with pytest.raises(SystemExit):
            first.tick()
        first.crash()
        with closing(ReaderRig(server=first.server)) as second:
            second.control.send(Attach(0, 1), [os.dup(fd) for fd in worker.channel.fds])
            second.sync()
            second.tick()
            assert counted(second) == {"completed": 1}
            second.control.send(WorkerExited(0, 1, "end of test", False, details={}))
            second.drain()


def test_outcomes_without_their_replicas_are_settled_and_counted(rig: ReaderRig) -> None:
    (worker,) = rig.workers
    settle = rig.store.settle
    rig.store.settle = lambda *arguments: [  # type: ignore[method-assign]
        one._replace(is_replicated=False) for one in settle(*arguments)
    ]
    rig.add("j1")
    rig.tick()
    worker.succeed(*worker.take())
    rig.tick()
    assert rig.pending == 0
    assert rig.metric("z_novel_settlements_unreplicated_total", SOURCE.stream) == 1


@pytest.mark.parametrize("end", [b"}", b" }"], ids=["compact", "spaced"])
def test_no_depth_of_a_payload_ends_the_reader_when_the_job_fails(rig: ReaderRig, end: bytes) -> None:
    """Where a job is settled less of the stack is left than where it was admitted."""
    (worker,) = rig.workers
    failed = 0
    for depth in range(MAX_NESTING, 1000):
        data = b'{"id":"%d","type":"a","payload":%s%s' % (depth, b"[" * depth, b"]" * depth)
        rig.server.append(SOURCE.stream, data + end)
        rig.tick(2)
        try:
            taken = worker.take()
        except RecursionError:  # too deep for the rig: it is in a stack of its own
            break
        for id in taken:
            worker.fail(id, FAILED)
            failed += 1
        rig.tick(2)
    assert failed > 0
    assert {letter["reason"] for letter in rig.letters} <= {"malformed"}
    assert len(rig.letters) + len(rig.retries) >= failed
