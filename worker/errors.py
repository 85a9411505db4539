"""Exceptions shared by handlers and roles, and the exit codes of the service."""

from enum import IntEnum


class Exit(IntEnum):
    """What the supervisor's exit status says (documented for operators; never renumber)."""

    STOPPED = 0
    USAGE = 2
    BOOT_FAILED = 3
    CRASH_LOOP = 4
    STORE_UNREACHABLE = 5


#: Longest wait that `RateLimited` may ask for (seconds).
LONGEST_WAIT_S = 86400.0


class JobworkerError(Exception):
    """Base of every error that this package raises on purpose."""


class PermanentError(JobworkerError):
    """Raised by a handler: this job can never succeed, so dead-letter it without a retry."""


class Unavailable(JobworkerError):
    """Raised by a handler: something it needs does not answer. Its type is paused and tried again now and
    then; no retry is used up. (Any exception with a true attribute ``transient`` is taken so.)"""

    transient = True


class JobCancelled(JobworkerError):
    """Raised by a handler that saw `Job.cancelled`: the job is settled as cancelled, not retried.

    For a job that was not cancelled it is a failed try."""


class RateLimited(JobworkerError):
    """Raised by a handler: a dependency takes no more for now. The job waits for ``after_s`` seconds, and so
    do the other jobs of its type with the same ``key``; no retry is used up.

    ``key``: tenant (the default), global, the key of a ``[[limit]]`` of the type, or job: no other job waits.
    """

    def __init__(self, after_s: float, key: str | None = None) -> None:
        super().__init__(f"again in {after_s} s, by {key or 'tenant'}")
        if not 0.0 <= after_s <= LONGEST_WAIT_S:
            raise ValueError(f"after_s is {after_s}: a wait takes 0 to {LONGEST_WAIT_S:.0f} seconds")
        self.after_s = float(after_s)
        self.key = key or "tenant"


class ConfigurationError(JobworkerError):
    """The service cannot start with this configuration; the message says what to change."""


class MalformedJob(JobworkerError):
    """An entry that is not a job: not JSON, not an object, a field missing or of the wrong kind."""


class MalformedPayload(MalformedJob):
    """A payload that is not of the type that its handler takes; the message names the field by its path."""


class StoreUnavailable(JobworkerError):
    """The job store did not answer or refused for now; the same call may work later."""


class StoreRefused(StoreUnavailable):
    """The store refused a command because of the keys of one stream; commands of other streams may work."""


class AnswerTooLarge(JobworkerError):
    """The answer to a read was more than can be held and was dropped; what it gave is this consumer's now."""


class Fenced(JobworkerError):
    """Another reader has taken this consumer's name over; whatever we held is no longer ours."""


class NameHeld(Fenced):
    """Another service holds this consumer's name. ``by`` says which; its lease ends in ``left_s`` seconds.

    ``renewal`` differs for every renewal: two that differ for one ``stream`` prove that the holder lives.
    """

    def __init__(self, stream: str, by: str, left_s: float, renewal: str) -> None:
        super().__init__(f"held by {by}")
        self.stream = stream
        self.by = by
        self.left_s = left_s
        self.renewal = renewal
