"""Batches in one process: every way in which a job ends, callbacks, questions over HTTP."""

import threading
from collections.abc import Iterator

import orjson
import pytest

from jobworker.worker import Job, PermanentError, RateLimited, Settings
from jobworker.worker.batches import Batch, callback_job
from jobworker.worker.ipc.control import BatchShown, ShowBatch
from jobworker.worker.store.batches import StreamBatch, parse_batch
from jobworker.worker.supervision.batch_mailbox import BatchAnswer, BatchMailbox
from jobworker.worker.testing import Harness, RetryPolicy
from support.service import eventually

SETTINGS = Settings(retry=RetryPolicy(max_retries=1, jitter=0.0), max_payload=2000, host="h", instance="i")


class Toy:
    """Does what the payload says."""

    def __init__(self) -> None:
        self.waited = set[str]()

    def handle(self, job: Job) -> None:
        match job.payload:
            case "fail":
                raise ValueError
            case "fail once" if job.retry_count == 0:
                raise ValueError
            case "permanent":
                raise PermanentError
            case "die":
                raise SystemExit(3)
            case "wait" if job.id not in self.waited:
                self.waited.add(job.id)
                raise RateLimited(5.0)


@pytest.fixture
def harness() -> Iterator[Harness]:
    with Harness({"toy": Toy, "done": Toy}, SETTINGS) as one:
        yield one


def counts(harness: Harness, id: str) -> tuple[int | None, int, int, str]:
    found = harness.batch(id)
    assert found is not None
    return found.total, found.done, found.dead, found.state


@pytest.mark.parametrize(
    ("payload", "done", "dead"),
    [
        ("succeed", 1, 0), ("fail once", 1, 0), ("wait", 1, 0), ("fail", 0, 1), ("permanent", 0, 1),
        ("die", 0, 1), ("x" * 2000, 0, 1),
    ],
    ids=lambda value: str(value)[:10],
)  # fmt: skip
def test_every_end_of_a_job_counts_once(harness: Harness, payload: str, done: int, dead: int) -> None:
    with harness.producer.batch("t1", on_complete={"type": "done"}) as batch:
        batch.enqueue("toy", payload)
    harness.advance(60)
    assert counts(harness, batch.id) == (1, done, dead, "finished")
    assert [job.id for job in harness.completed if job.type == "done"] == [f"batch:{batch.id}"]


def test_a_job_of_an_unknown_type_counts_as_dead(harness: Harness) -> None:
    with pytest.warns(UserWarning, match="runs the type"), harness.producer.batch() as batch:
        batch.enqueue("unknown", None)
    harness.run()
    assert counts(harness, batch.id) == (1, 0, 1, "finished")


def test_jobs_that_are_not_run_count_too(harness: Harness) -> None:
    with harness.producer.batch("t1") as batch:
        for _ in range(2):
            batch.enqueue("toy", "", metadata={"idempotency_key": "a"})
            batch.enqueue("toy", "", metadata={"supersede_key": "b"}, delay=5)
        batch.enqueue("toy", "", delay=20, expires_at=harness.wall_now_s() + 10)
    harness.advance(60)
    assert counts(harness, batch.id) == (5, 4, 1, "finished")
    assert len(harness.batches) == 2


def test_jobs_that_wait_in_lanes_are_counted_at_their_end(harness: Harness) -> None:
    with harness.producer.batch("t1") as batch:
        batch.enqueue_many({"type": "toy", "payload": "succeed"} for _ in range(600))
    harness.advance(5)
    assert counts(harness, batch.id) == (600, 600, 0, "finished")
    assert harness.metric("z_novel_batches_finished_total", "stream:story:gen") == 1


def test_a_batch_without_jobs_finishes_at_once(harness: Harness) -> None:
    with harness.producer.batch("t1", on_complete={"type": "done", "payload": [1]}) as batch:
        pass
    harness.run()
    assert counts(harness, batch.id) == (0, 0, 0, "finished")
    assert [job.payload for job in harness.completed] == [[1]]


def test_a_failure_of_the_producer_leaves_the_batch_open(harness: Harness) -> None:
    with pytest.raises(ValueError, match="tenant_id"), harness.producer.batch(id="b") as batch:
        batch.enqueue_many([{"type": "toy", "payload": ""}, {"type": "toy", "tenant_id": "/"}])
    harness.advance(60)
    assert counts(harness, "b") == (1, 1, 0, "open")
    with harness.producer.batch(id="b") as batch:
        batch.enqueue("toy", "")
    harness.advance(60)
    assert counts(harness, "b") == (2, 2, 0, "finished")


def test_the_tenant_of_a_batch_is_that_of_jobs_which_name_none(harness: Harness) -> None:
    with harness.producer.batch("t1", on_complete={"type": "done"}) as batch:
        batch.enqueue("toy", "")
        batch.enqueue("toy", "", tenant_id="t2", metadata={"request_id": "r"})
    harness.run()
    assert [job.tenant_id for job in harness.completed] == ["t1", "t2", "t1"]
    assert harness.completed[1].metadata == {"request_id": "r", "batch_id": batch.id}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"id": "a/b"}, "at most 64"),
        ({"id": ""}, "at most 64"),
        ({"id": 7}, "at most 64"),
        ({"tenant_id": "a b"}, "tenant_id"),
        ({"name": "x" * 1000}, "name"),
        ({"on_complete": {"payload": 1}}, "needs a type"),
        ({"on_complete": {"type": "done", "delay": 3}}, "delay"),
        ({"on_complete": {"type": "done", "id": "x"}}, "gives the job its id"),
        ({"on_complete": {"type": "done", "metadata": {"batch_id": "b"}}, "id": "b"}, "its own batch"),
    ],
)
def test_a_wrong_argument_is_refused(harness: Harness, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        harness.producer.batch(**arguments)  # type: ignore[arg-type]
    assert harness.batch("b") is None


class TestCallback:
    def callback(self, on_complete: bytes) -> bytes:
        record = StreamBatch(on_complete=on_complete, tenant_id="t1")
        return callback_job(Batch("b", "s", record, 3, 2, 1), 0.0)

    def test_the_payload_keeps_its_bytes(self) -> None:
        payload = b'{"n": 12345678901234567890123}'
        data = self.callback(b'{"type": "a", "tenant_id": "t2", "payload": ' + payload + b"}")
        assert payload in data
        assert orjson.loads(data)["tenant_id"] == "t2"

    def test_it_is_no_job_of_its_own_batch(self) -> None:
        job = orjson.loads(self.callback(b'{"type": "a", "metadata": {"batch_id": "b", "x": "y"}}'))
        assert job["metadata"] == {
            "x": "y", "batch_total": "3", "batch_done": "2", "batch_dead": "1", "completed_batch_id": "b",
        }  # fmt: skip

    @pytest.mark.parametrize("text", [b"", b"[]", b'{"type": 1}', b'{"type":"a","payload":' + b"[" * 100_000])
    def test_what_is_no_job_is_refused(self, text: bytes) -> None:
        with pytest.raises(ValueError, match=r"."):
            self.callback(text)


@pytest.mark.parametrize(
    ("total", "ended", "percent"),
    [(1204, 759, 63.0), (3, 2, 66.6), (3, 4, 100.0), (0, 0, 100.0), (None, 5, None)],
)
def test_progress_is_rounded_down(total: int | None, ended: int, percent: float | None) -> None:
    assert Batch("b", "s", StreamBatch(), total, ended, 0).percent == percent


def test_fields_that_other_programs_wrote_are_read_leniently() -> None:
    fields = {
        b"total": b"-1",
        b"done": b"x",
        b"dead": b"9" * 30,
        b"closed": b"yes",
        b"created": b"\xff",
        b"name": b"\xff",
    }
    found = parse_batch(fields)
    assert (found.total, found.done, found.dead) == (None, 0, 0)
    assert found.wall_closed_s == 0.0
    assert found.name == "\ufffd"


@pytest.mark.parametrize(
    ("written", "read"), [(b"12.345", 12.345), (b"12", 12.0), (b"1e999", 0.0), (b"nan", 0.0)]
)
def test_a_time_has_milliseconds(written: bytes, read: float) -> None:
    """Two imports of a book within a second have different versions by it."""
    assert parse_batch({b"created": written}).wall_created_s == read


class TestQuestions:
    def test_each_thread_gets_its_answer(self) -> None:
        mailbox, answers = BatchMailbox(), dict[str, BatchAnswer | None]()

        def ask(id: str) -> None:
            answers[id] = mailbox.request(id)

        threads = [threading.Thread(target=ask, args=(id,)) for id in ("a", "b")]
        for thread in threads:
            thread.start()
        taken: dict[int, str] = {}
        eventually(lambda: taken.update(mailbox.take()) or len(taken) == 2)  # type: ignore[func-returns-value]
        for number, id in sorted(taken.items(), reverse=True):
            mailbox.answer(number, BatchAnswer({"id": id}))
        mailbox.answer(99, BatchAnswer(None))
        for thread in threads:
            thread.join()
        assert answers == {id: BatchAnswer({"id": id}) for id in ("a", "b")}

    def test_the_reaper_answers(self, harness: Harness) -> None:
        with harness.producer.batch(id="b"):
            pass
        harness.run()
        replies = []
        for id in ("b", "none", "a/b"):
            harness._to_reaper.send(ShowBatch(len(replies), id))
            harness._reaper._drain_requested(0.0)
            while (received := harness._to_reaper.receive()) is not None:
                replies += [received[0]] if isinstance(received[0], BatchShown) else []
        assert [(one.number, one.batch and one.batch["state"], one.error) for one in replies] == [
            (0, "finished", ""), (1, None, ""), (2, None, ""),
        ]  # fmt: skip
