"""Outcomes of a job, and the decision that follows: acknowledge, retry after a backoff, or dead-letter."""

import random
from enum import StrEnum
from typing import NamedTuple

import msgspec


class RetryPolicy(NamedTuple):
    """Times in seconds; ``jitter`` is the share by which a delay is spread either way."""

    max_retries: int = 3
    initial_s: float = 1.0
    max_s: float = 60.0
    multiplier: float = 2.0
    jitter: float = 0.1

    def delay_s(self, retry_count: int, rng: random.Random) -> float:
        """``initial * multiplier ** retry_count``, at most ``max``, spread by +- ``jitter``.

        ``retry_count`` is the new one, already counted up: the first retry waits initial * multiplier.
        """
        try:
            delay = self.initial_s * self.multiplier**retry_count
        except OverflowError:
            delay = self.max_s
        return min(delay, self.max_s) * (1.0 + self.jitter * rng.uniform(-1.0, 1.0))


#: An error's text is cut to this, so that a handler that raises a whole novel does not fill the dead letters.
MAX_ERROR_CHARS = 4096


class Reason(StrEnum):
    """Why a job was dead-lettered; a field of the dead letter and a metric's label."""

    EXHAUSTED = "exhausted"
    PERMANENT = "permanent"
    TIMEOUT = "timeout"
    POISON = "poison"
    MALFORMED = "malformed"
    UNKNOWN_TYPE = "unknown_type"
    OVERSIZED = "oversized"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


class Drop(StrEnum):
    """Why a job is acknowledged without being run; part of a metric's name."""

    DUPLICATE = "duplicate"
    SUPERSEDED = "superseded"


class Failure(msgspec.Struct, frozen=True, array_like=True):
    """A failed try, as the worker (or the supervisor, after its death) reports it to the reader.

    ``traceback`` is empty if no exception was raised for this job itself.
    """

    error: str
    permanent: bool = False
    timed_out: bool = False
    unavailable: bool = False
    traceback: str = ""
    malformed: bool = False
    #: The job must wait for this long (seconds), with all jobs of ``wait_key``; None: it failed.
    wait_s: float | None = None
    wait_key: str = ""
    #: The worker did not start the job, because it was cancelled.
    cancelled: bool = False
    #: The job was not run, because its latest start has passed.
    expired: bool = False


class TryAgain(msgspec.Struct, frozen=True):
    """Schedule a retry after a delay."""

    retry_count: int
    delay_s: float


class GiveUp(msgspec.Struct, frozen=True):
    """Dead-letter the job."""

    reason: Reason


def after_failure(
    failure: Failure, retry_count: int, deaths: int, policy: RetryPolicy, rng: random.Random
) -> TryAgain | GiveUp:
    """Decide about a job whose try failed; deaths under it are tries too."""
    tries = retry_count + deaths
    if failure.malformed:
        return GiveUp(Reason.MALFORMED)
    if failure.expired:
        return GiveUp(Reason.EXPIRED)
    if failure.permanent:
        return GiveUp(Reason.PERMANENT)
    if tries >= policy.max_retries:
        return GiveUp(Reason.TIMEOUT if failure.timed_out else Reason.EXHAUSTED)
    return TryAgain(tries + 1, policy.delay_s(tries + 1, rng))
