"""Every outcome of a job, seen from outside: store, handler's notes, metrics."""

import base64
import json
import re
import socket
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest

from support.service import SOON_S, STREAM, Service, eventually, handlers, service

pytestmark = pytest.mark.process

#: First wait = initial * multiplier = 0.1 s: long enough to tell three of them apart, and soon over.
RETRY_INITIAL_S, MULTIPLIER, MAX_RETRIES = 0.05, 2.0, 3
MAX_PAYLOAD = 128 * 1024
HANDLERS = handlers("Noop", "Sleep", "Flaky", "Permanent", "Die", "Hang")
CONTRACT_FIELDS = {"task", "error", "failed_at", "reason", "original_stream", "original_id"}
CONTRACT_FIELDS |= {"retry_count", "deaths", "worker"}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One service for all: jobs of one test do not disturb those of another."""
    options = {"retry_initial": RETRY_INITIAL_S, "retry_multiplier": MULTIPLIER, "retry_jitter": 0,
               "max_retries": MAX_RETRIES, "max_payload": MAX_PAYLOAD, "instance": "blue"}  # fmt: skip
    with service(tmp_path_factory.mktemp("outcomes"), HANDLERS, **options) as one:
        yield one
        one.wait_until_drained()


def test_a_job_that_succeeds_is_acknowledged_and_run_once(running: Service) -> None:
    job = running.enqueue("noop", tenant_id="t001", project_id="p1")
    running.wait_for_end(job)
    running.wait_until_drained()
    assert len(running.events("start", job)) == 1
    assert all((letter["task"] or {}).get("id") != job for letter in running.dead_letters())


@pytest.mark.parametrize("stream", ["stream:memory:update", "stream:audit:log"])
def test_a_known_type_is_run_from_whichever_stream_it_arrives_on(running: Service, stream: str) -> None:
    running.wait_for_end(running.enqueue("noop", stream=stream))


def test_a_transient_failure_is_retried_with_growing_waits_until_it_succeeds(running: Service) -> None:
    job = running.enqueue("flaky", {"times": MAX_RETRIES})
    running.wait_for_end(job)
    starts = running.events("start", job)
    assert [start.retry_count for start in starts] == [0, 1, 2, 3]
    waits_s = [after.mono_s - before.mono_s for before, after in pairwise(starts)]
    for retry_count, waited_s in enumerate(waits_s, 1):
        assert waited_s >= RETRY_INITIAL_S * MULTIPLIER**retry_count
    # Late by no more than the reaper's own look-out and a busy machine account for.
    assert waits_s[-1] < RETRY_INITIAL_S * MULTIPLIER**MAX_RETRIES + 2.0


def test_the_retry_waits_in_the_zset_with_its_due_time_and_all_its_fields(running: Service) -> None:
    before_s = float(running.client.time()[0])
    job = running.enqueue(
        "flaky", {"times": 99}, priority="gold", retry_count=2
    )  # the last wait is the longest
    eventually(lambda: running.client.zcard(f"retry:{STREAM}"), saying="a scheduled retry")
    ((member, due_s),) = running.client.zrange(f"retry:{STREAM}", 0, -1, withscores=True)
    waiting = json.loads(member)
    assert (waiting["id"], waiting["retry_count"], waiting["priority"]) == (job, 3, "gold")
    assert due_s % 1 != 0, "the fraction of the due time is kept"
    wait_s = RETRY_INITIAL_S * MULTIPLIER**3
    assert before_s + wait_s <= due_s <= before_s + wait_s + SOON_S
    running.dead_letter(job)


def test_used_up_retries_end_in_an_exact_dead_letter(running: Service) -> None:
    extra: dict[str, Any] = {
        "tenant_id": "t001",
        "project_id": "p1",
        "metadata": {"trace_id": "abc"},
        "colour": ["red", 1.5],
    }
    job = running.enqueue("flaky", {"times": 99}, created_at="2026-01-02T10:00:00.123Z", **extra)
    letter = running.dead_letter(job)
    assert letter.keys() == CONTRACT_FIELDS | {"details"}
    assert letter["details"].keys() == {"traceback"}
    assert letter["details"]["traceback"].startswith("Traceback (most recent call last):\n  File ")
    assert "toys.py" in letter["details"]["traceback"].splitlines()[1], (
        "it begins with the handler's own frame"
    )
    assert letter["details"]["traceback"].endswith(letter["error"])
    assert letter["task"] == {"id": job, "type": "flaky", "payload": {"times": 99}, "retry_count": 3,
                              "created_at": "2026-01-02T10:00:00.123Z", **extra}  # fmt: skip
    assert letter["error"] == f"ConnectionError: try 3 of {job}"
    assert (letter["reason"], letter["retry_count"], letter["deaths"]) == ("exhausted", MAX_RETRIES, 0)
    assert letter["original_stream"] == STREAM
    assert re.fullmatch(r"\d+-\d+", letter["original_id"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", letter["failed_at"])
    assert re.fullmatch(rf"{re.escape(socket.gethostname())}/blue/[01]", letter["worker"])
    assert len(running.events("start", job)) == 1 + MAX_RETRIES


def test_a_permanent_failure_is_not_retried(running: Service) -> None:
    job = running.enqueue("permanent", future_field={"kept": True})
    letter = running.dead_letter(job)
    assert letter["reason"] == "permanent"
    assert letter["error"] == "PermanentError: no such chapter"
    assert letter["task"]["future_field"] == {"kept": True}
    assert letter["retry_count"] == 0
    assert len(running.events("start", job)) == 1


@pytest.mark.parametrize("where", ["python", "c"])
def test_a_job_past_its_time_is_stopped_and_given_up_as_timeout(running: Service, where: str) -> None:
    job = running.enqueue("hang", {"in": where}, retry_count=MAX_RETRIES - 1)
    letter = running.dead_letter(job)
    assert letter["reason"] == "timeout"
    assert letter["retry_count"] == MAX_RETRIES
    starts = running.events("start", job)
    assert [start.retry_count for start in starts] == [MAX_RETRIES - 1, MAX_RETRIES]
    assert starts[0].pid != starts[1].pid, "its worker was killed"


def test_the_envelopes_own_timeout_counts(running: Service) -> None:
    job = running.enqueue("sleep", {"s": 60}, timeout=0.3, retry_count=MAX_RETRIES)
    letter = running.dead_letter(job)
    assert (letter["reason"], letter["error"]) == ("timeout", "TimeoutError: SIGKILL (timeout of 0.3 s)")
    assert "toys.py" in letter["details"]["stack"], "it shows where the job was"


@pytest.mark.parametrize(("how", "known"), [("SIGKILL", 0), ("SIGSEGV", 0), ("exit 7", 2), ("exit 0", 2)])
def test_a_job_that_kills_three_workers_is_given_up_as_poison(running: Service, how: str, known: int) -> None:
    # Deaths that are known already, and a tenant for each: more of them would be slowed down.
    job = running.enqueue("die", {"how": how}, deaths=known, tenant_id=how)
    letter = running.dead_letter(job, within_s=30)
    assert letter["reason"] == "poison"
    assert letter["deaths"] == 3
    assert how in letter["error"]
    assert letter["details"]["peak_rss_mib"] > 0
    assert ("toys.py" in letter["details"]["stack"]) == (how == "SIGSEGV"), "the others leave no stack"
    assert len({start.pid for start in running.events("start", job)}) == 3 - known
    assert len(running.events("start", job)) == 3 - known


@pytest.mark.parametrize("raw", [
    b"no json", b"[1]", b'"text"', b"null", b"", b"\xff\xfe", b'{"type": "noop"}', b'{"id": "x"}',
    b'{"id": "", "type": "noop"}', b'{"id": 7, "type": "noop"}', b'{"id": "x", "type": null}',
    b'{"id": "x", "type": "noop", "timeout": 0}', b'{"id": "x", "type": "noop", "timeout": "9"}',
    b'{"id": "x", "type": "noop", "retry_count": -1}', b'{"id": "x", "type": "noop", "metadata": {"a": 1}}',
    b'{"id": "x", "type": "noop", "payload": NaN}', b'{"id": "x", "id": "y", "type": "noop"}',
    b'{"id": "x", "type": "noop", "payload": ' + b"[" * 20_000 + b"]" * 20_000 + b"}",
])  # fmt: skip
def test_what_is_no_job_is_dead_lettered_at_once_with_its_raw_bytes(running: Service, raw: bytes) -> None:
    entry = running.add_raw({"data": raw})
    letter = running.dead_letter(entry)
    assert letter.keys() == CONTRACT_FIELDS | {"raw"}
    assert (letter["reason"], letter["task"], letter["raw"]) == (
        "malformed",
        None,
        base64.b64encode(raw).decode(),
    )
    assert letter["error"].startswith("MalformedJob: ")
    assert letter["original_id"] == entry


def test_an_entry_without_data_is_dead_lettered(running: Service) -> None:
    letter = running.dead_letter(running.add_raw({"body": b"{}"}))
    assert letter["reason"] == "malformed"
    assert "raw" not in letter


def test_metadata_null_is_the_empty_one(running: Service) -> None:
    running.wait_for_end(running.enqueue("noop", metadata=None))


def test_a_type_without_a_handler_is_dead_lettered_with_the_job_as_received(running: Service) -> None:
    job = running.enqueue("sing", {"song": "雪"}, shade=7)
    letter = running.dead_letter(job)
    assert letter["reason"] == "unknown_type"
    assert letter["task"] == {"id": job, "type": "sing", "payload": {"song": "雪"}, "shade": 7}
    assert "sing" in letter["error"]


def test_of_an_oversized_entry_only_the_first_64_kib_are_kept(running: Service) -> None:
    raw = json.dumps({"id": "big", "type": "noop", "payload": "x" * MAX_PAYLOAD}).encode()
    letter = running.dead_letter(running.add_raw({"data": raw}))
    assert (letter["reason"], letter["task"]) == ("oversized", None)
    assert base64.b64decode(letter["raw"]) == raw[: 64 * 1024]


def test_the_largest_allowed_entry_is_run(running: Service) -> None:
    envelope = {"id": "as-large-as-may-be", "type": "noop", "payload": ""}
    envelope["payload"] = "x" * (MAX_PAYLOAD - len(json.dumps(envelope)))
    running.add_raw({"data": json.dumps(envelope).encode()})
    running.wait_for_end("as-large-as-may-be")
