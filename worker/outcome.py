"""What running a job may come to, and what then becomes of it."""

import random
from enum import StrEnum
from typing import Any

import msgspec

from .backoff import RetryPolicy

#: An error's text is cut to this, so that a handler that raises a whole novel does not fill the dead letters.
MAX_ERROR_CHARS = 4096


class Reason(StrEnum):
    """Why a job was given up; stands in the dead letter and in a metric's label."""

    EXHAUSTED = "exhausted"
    PERMANENT = "permanent"
    TIMEOUT = "timeout"
    POISON = "poison"
    MALFORMED = "malformed"
    UNKNOWN_TYPE = "unknown_type"
    OVERSIZED = "oversized"


class Failure(msgspec.Struct, frozen=True, array_like=True):
    """A try that came to nothing, as a worker (or whoever found it dead) tells the reader."""

    error: str
    permanent: bool = False
    timed_out: bool = False


class Died(msgspec.Struct, frozen=True):
    """How a worker ended under its jobs."""

    cause: str
    timed_out: bool = False
    details: dict[str, Any] = msgspec.field(default_factory=dict)


class TryAgain(msgspec.Struct, frozen=True):
    """Schedule the job anew after a delay."""

    retry_count: int
    delay_s: float


class GiveUp(msgspec.Struct, frozen=True):
    """Dead-letter the job."""

    reason: Reason


def failure_of(error: BaseException, permanent: bool) -> Failure:
    """The class and message of an exception, bounded and safe to encode."""
    text = f"{type(error).__name__}: {error}"[:MAX_ERROR_CHARS]
    return Failure(text.encode("utf-8", "backslashreplace").decode(), permanent)


def after_failure(
    failure: Failure, retry_count: int, deaths: int, policy: RetryPolicy, rng: random.Random
) -> TryAgain | GiveUp:
    """Decide about a job whose try failed; deaths under it are tries too."""
    tries = retry_count + deaths
    if failure.permanent:
        return GiveUp(Reason.PERMANENT)
    if tries >= policy.max_retries:
        return GiveUp(Reason.TIMEOUT if failure.timed_out else Reason.EXHAUSTED)
    return TryAgain(tries + 1, policy.delay_s(tries + 1, rng))
