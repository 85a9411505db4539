"""Failed try of a job as text: error and traceback, bounded, encodable, without secrets."""

import traceback
from types import TracebackType

from ..errors import RateLimited
from ..outcome import MAX_ERROR_CHARS, Failure
from .log import bounded, redacted

#: Longest traceback of a failed try. The ring of outcomes has to hold those of a batch.
MAX_TRACEBACK_CHARS = 8192
#: Innermost frames that are shown of each exception: endless recursion has a thousand.
_MAX_FRAMES = 40
#: Causes, contexts and members of groups that are shown beside the exception itself.
_MAX_RELATED = 16
_WORKER = __name__.rpartition(".telemetry.")[0]
#: Modules between the runner and a handler. Their frames say nothing about an error of the handler.
_ENGINE = frozenset({
    f"{_WORKER}.runner", f"{_WORKER}.handler", f"{_WORKER}.job_function", f"{_WORKER}.payload_types",
    f"{_WORKER}.event_loop", f"{_WORKER}.testing", "asyncio.runners", "asyncio.base_events",
})  # fmt: skip


def failure_of(error: BaseException, permanent: bool) -> Failure:
    """The failure that an exception means.

    An exception with a true attribute ``transient`` says that something the handler needs is unavailable.
    """
    if issubclass(type(error), RateLimited):  # not isinstance: it asks a class that may be broken
        assert isinstance(error, RateLimited)
        return Failure(error_text(error), wait_s=error.after_s, wait_key=error.key)
    unavailable = not permanent and is_transient(error)
    return Failure(error_text(error), permanent, unavailable=unavailable, traceback=traceback_text(error))


def is_transient(error: BaseException) -> bool:
    """Whether the exception says that something which the handler needs is unavailable; it never raises."""
    try:
        return bool(getattr(error, "transient", False))
    except Exception:  # a property of a handler's own class
        return False


def error_text(error: BaseException) -> str:
    """``<class>: <message>``; it never raises."""
    try:
        message = str(error)
    except Exception as trouble:  # a handler's own exception class; it must fail its job, not the worker
        message = f"(its message raised {type(trouble).__name__})"
    return _encodable(redacted(f"{type(error).__name__}: {message}")[:MAX_ERROR_CHARS])


def traceback_text(error: BaseException) -> str:
    """The traceback from the handler's first frame on, with causes and members of groups; it never raises.

    Empty for an exception that was returned, not raised, and has nothing to add to its message.
    """
    try:
        text = _format(error)
        if error.__traceback__ is None and "\n" not in text:
            return ""
    except Exception as trouble:  # a handler's own exception class may break any attribute
        text = f"(the traceback cannot be formatted: {type(trouble).__name__})"
    return _encodable(bounded(redacted(text), MAX_TRACEBACK_CHARS))


def _format(error: BaseException) -> str:
    trace = _from_handler(error.__traceback__)
    if _has_many_related(error):
        frames = traceback.format_list(traceback.extract_tb(trace, limit=-_MAX_FRAMES))
        left_out = f"[... more than {_MAX_RELATED} related exceptions ...]\n"
        return "".join([left_out, "Traceback (most recent call last):\n", *frames, error_text(error)])
    return "".join(traceback.format_exception(type(error), error, trace, limit=-_MAX_FRAMES)).rstrip("\n")


def _from_handler(trace: TracebackType | None) -> TracebackType | None:
    """The traceback without the frames of the engine in front; all of it if the engine itself raised."""
    inner = trace
    while inner is not None and inner.tb_frame.f_globals.get("__name__") in _ENGINE:
        inner = inner.tb_next
    return inner or trace


def _has_many_related(error: BaseException) -> bool:
    """Whether formatting all related exceptions takes long: a loop that retries can chain thousands."""
    seen: set[int] = set()
    unseen = [error]
    while unseen:
        one = unseen.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if len(seen) > 1 + _MAX_RELATED:
            return True
        unseen += [other for other in (one.__cause__, one.__context__) if other is not None]
        if isinstance(one, BaseExceptionGroup):
            unseen += one.exceptions
    return False


def _encodable(text: str) -> str:
    """The text with unpaired surrogates escaped: neither JSON nor UTF-8 can hold them."""
    return text.encode("utf-8", "backslashreplace").decode()
