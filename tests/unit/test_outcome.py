"""Outcomes of failed tries: retry or dead letter, and with which reason."""

import random

import msgspec
import pytest

from jobworker.worker import PermanentError
from jobworker.worker.outcome import (
    MAX_ERROR_CHARS,
    Failure,
    GiveUp,
    Reason,
    RetryPolicy,
    TryAgain,
    after_failure,
)
from jobworker.worker.telemetry.failure import failure_of

POLICY = RetryPolicy(jitter=0.0)


def decide(
    failure: Failure, retry_count: int, deaths: int = 0, policy: RetryPolicy = POLICY
) -> TryAgain | GiveUp:
    return after_failure(failure, retry_count, deaths, policy, random.Random(0))


def test_a_job_is_tried_four_times_by_default() -> None:
    story = [decide(Failure("E: x"), count) for count in range(4)]
    assert story == [TryAgain(1, 2.0), TryAgain(2, 4.0), TryAgain(3, 8.0), GiveUp(Reason.EXHAUSTED)]


@pytest.mark.parametrize("retry_count", [0, 2, 3, 99])
def test_a_permanent_error_is_never_tried_again(retry_count: int) -> None:
    assert decide(Failure("E: x", permanent=True), retry_count) == GiveUp(Reason.PERMANENT)


def test_running_too_long_is_a_failed_try_with_a_reason_of_its_own() -> None:
    late = Failure("TimeoutError", timed_out=True)
    assert decide(late, 2) == TryAgain(3, 8.0)
    assert decide(late, 3) == GiveUp(Reason.TIMEOUT)


def test_deaths_under_a_job_are_tries_too() -> None:
    assert decide(Failure("E: x"), 1, deaths=1) == TryAgain(3, 8.0)
    assert decide(Failure("E: x"), 2, deaths=1) == GiveUp(Reason.EXHAUSTED)


def test_no_retries_at_all() -> None:
    assert decide(Failure("E: x"), 0, policy=POLICY._replace(max_retries=0)) == GiveUp(Reason.EXHAUSTED)


def test_a_count_above_the_limit_is_used_up() -> None:
    """As after --max-retries was lowered while jobs waited."""
    assert decide(Failure("E: x"), 10**30) == GiveUp(Reason.EXHAUSTED)


def test_the_reasons_have_the_documented_names() -> None:
    assert {str(reason) for reason in Reason} == {
        "exhausted", "permanent", "timeout", "poison", "malformed", "unknown_type", "oversized", "expired",
        "cancelled",
    }  # fmt: skip


# -- an exception as it travels


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


class Away(Exception):
    transient = True


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("no such chapter"), "ValueError: no such chapter"),
        (PermanentError("no"), "PermanentError: no"),
        (KeyError("texts"), "KeyError: 'texts'"),
        (ValueError(), "ValueError: "),
        (ValueError("第七章"), "ValueError: 第七章"),
        (ValueError("half a pair: \ud800"), r"ValueError: half a pair: \ud800"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), None),
        (Unspeakable(), "Unspeakable: (its message raised RuntimeError)"),
    ],
)
def test_class_and_message(error: Exception, text: str | None) -> None:
    failure = failure_of(error, permanent=False)
    assert text is None or failure.error == text
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(failure), type=Failure) == failure
    assert msgspec.json.encode(failure.error)


def test_a_whole_novel_as_message_is_cut() -> None:
    failure = failure_of(ValueError("字" * 10**6), permanent=True)
    assert len(failure.error) == MAX_ERROR_CHARS
    assert failure.permanent


def test_what_calls_itself_transient_blames_a_store() -> None:
    assert failure_of(Away(), permanent=False).unavailable
    assert not failure_of(Away(), permanent=True).unavailable
    assert not failure_of(ValueError(), permanent=False).unavailable
