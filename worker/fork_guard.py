"""Fork guard: ends a child that a handler forked and that leaves the handler's code.

It would run the code of the worker: take jobs from the ring and write to the sockets a second time.
"""

import logging
import os
from types import TracebackType

from .telemetry import line_writer

log = logging.getLogger("jobworker.fork_guard")

#: Number of forks between the first process and this one.
_generation = 0


def _count_fork() -> None:
    global _generation
    _generation += 1


os.register_at_fork(after_in_child=_count_fork)


class ForkGuard:
    """Around a call of a handler: what returns or raises in a forked child ends the child at once."""

    __slots__ = ("_entered",)

    def __enter__(self) -> None:
        self._entered = _generation

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if _generation != self._entered:
            _leave(error)


def generation() -> int:
    """Number of forks between the first process and this one; see `leave_if_forked`."""
    return _generation


def leave_if_forked(entered: int, error: BaseException | None = None) -> None:
    """What `ForkGuard` does at its end, for calls that each job makes: it takes a fifth of the time.

    ``entered`` is the `generation` before the call.
    """
    if _generation != entered:
        _leave(error)


def _leave(error: BaseException | None) -> None:
    """Exit without the interpreter's shutdown, which would write the parent's buffers once more."""
    has_exited = isinstance(error, SystemExit)
    try:
        log.warning("handler.forked_child_ended", exc_info=None if has_exited else error, extra={
            "process_id": os.getpid(), "hint": "end a forked child by os._exit, or start a subprocess",
        })  # fmt: skip
        if line_writer.log_writer is not None:
            line_writer.log_writer.flush()
    finally:
        os._exit(_exit_code(error) & 0xFF)


def _exit_code(error: BaseException | None) -> int:
    if not isinstance(error, SystemExit):
        return 1
    return error.code if isinstance(error.code, int) else int(error.code is not None)
