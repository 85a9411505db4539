"""Handlers: their interface, and how a type's name becomes one inside a worker."""

import functools
import inspect
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from itertools import islice
from numbers import Integral, Real
from types import AsyncGeneratorType, FunctionType, GeneratorType
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard, runtime_checkable

from .devices import NO_DEVICE
from .envelope import Job
from .errors import ConfigurationError, PermanentError
from .event_loop import EventLoop
from .extension import extension, instance_of, load
from .functions.job_function import FunctionHandler, job_type_of
from .results import Outcome, Returned
from .settings import Settings
from .telemetry.handler_counters import is_taken

log = logging.getLogger("jobworker.handler")

#: The members that a worker calls, with their arguments. Each is a plain function or an async one.
_ARGUMENTS = {"setup": ("settings",), "handle": ("job",), "handle_batch": ("jobs",), "healthy": ()}
_CALLED = tuple(_ARGUMENTS)
#: Deadline of ``healthy()``. The heartbeat of an idle worker waits for it, so it is below the stuck timeout.
HEALTHY_WITHIN_S = 5.0
#: How similar a name is to that of a member if it is probably a misspelling: `timout`, `handel`, `set_up`.
_SIMILARITY = 0.8
#: Methods that tell work under way from other values: futures of any library, results of
#: `multiprocessing.Pool`, threads and processes, `subprocess.Popen`.
_UNFINISHED = (("add_done_callback",), ("ready", "successful"), ("is_alive", "join"), ("poll", "communicate"))
#: Items of a returned container that are looked at.
_CHECKED_ITEMS = 32


@runtime_checkable
class Handler(Protocol):
    """Runs jobs of one type inside a worker process; made without arguments, once for each process.

    Everything but one of ``handle`` and ``handle_batch`` is optional. `JobHandler` and `BatchHandler` are
    typed bases with every member; inheriting one is optional too.

    - ``setup(settings)``: once, before the first job; raise here and the service does not start.
    - ``handle_batch(jobs)``: several jobs at once, at most ``max_batch`` (default 32); returns one outcome
      a job, in order: None, `Returned` with its result, or the exception that this job failed with.
    - ``max_batch_bytes``: the most bytes (of JSON) that go together, a single larger job aside; looked at
      before each batch, so that it may change.
    - ``batch_timeout``: seconds for all jobs of a batch (or the longest of their own limits); without it
      the sum of their limits.
    - ``timeout``: seconds a job may take (default: the service's ``--job-timeout``).
    - ``max_timeout``: with this, each `report_progress` starts the timeout again, at most until this many
      seconds after the start.
    - ``healthy()``: raises while something that the handler needs does not answer. It is called in a thread
      of its own; if it does not return within 5 s, jobs of the type wait until it does. An async one is
      cancelled then; one that blocks the event loop keeps the jobs of all async handlers waiting.
    - ``alone = True``: its jobs may take minutes, so no other job waits behind one in the same worker.
    - ``needs_device = True``: only workers with a device run it (``--device``).
    - ``exact_numbers = True``: numbers with a fraction in its payloads are ``decimal.Decimal``, not float.
    - ``counters``: a mapping of running totals, exported as metrics.

    ``setup``, ``handle``, ``handle_batch`` and ``healthy`` may each be ``async def``: all of them run on one
    event loop, which the worker keeps between jobs.
    """

    def handle(self, job: Job) -> object:
        """Run one job: return, or raise. `PermanentError` means that a retry is of no use.

        What it returns is kept as the result of a job that asks for it.
        """


#: What a batch gives back: one outcome a job, in order.
Outcomes = Sequence[Outcome]


class HandlerMembers:
    """Optional members of every handler, for editors and type checkers. A member that is not set is absent.

    Inheriting is optional: the service looks at the members of a handler, never at its base classes.
    """

    #: The type that it runs, for ``--app``; ``--handler`` names one itself.
    job_type: str
    #: Timeout of a job in seconds, if the job has none. Default: ``--job-timeout``.
    timeout: float
    #: Latest end in seconds after the start, for a handler that calls `report_progress`: each call starts the
    #: timeout again. Default: progress moves nothing.
    max_timeout: float
    #: An exclusive type: no other job is queued on a worker behind one of its jobs.
    alone: bool
    #: Only workers with a device run it (``--device``).
    needs_device: bool
    #: Numbers with a fraction or an exponent in ``job.payload`` are ``decimal.Decimal``, not ``float``.
    exact_numbers: bool
    #: Running totals; ``{"words": 5}`` is exported as ``z_novel_words_total``.
    counters: Mapping[str, float]

    if TYPE_CHECKING:

        def setup(self, settings: Settings) -> Awaitable[None] | None:
            """Once, inside each worker process, before the first job. An exception stops the start."""

        def healthy(self) -> Awaitable[None] | None:
            """Every few seconds in an idle worker: raise while a dependency is down."""


class JobHandler(HandlerMembers, ABC):
    """Typed base of a handler that runs one job at a time."""

    @abstractmethod
    def handle(self, job: Job) -> object:
        """Run one job: return, or raise. May be ``async def``."""


class BatchHandler(HandlerMembers, ABC):
    """Typed base of a handler that runs several jobs of its type in one call."""

    #: Most jobs of one call. Default: 32.
    max_batch: int
    #: Most bytes (of JSON) of one call; a single larger job is passed alone. Read before each batch.
    max_batch_bytes: float
    #: Timeout of a batch in seconds. Default: the sum of the timeouts of its jobs.
    batch_timeout: float

    @abstractmethod
    def handle_batch(self, jobs: Sequence[Job]) -> Awaitable[Outcomes] | Outcomes:
        """Run the jobs: one outcome a job, in order. May be ``async def``."""


class BoundHandler:
    """A handler as the runner uses it: one batch call, a limit, and defaults for what it leaves out.

    Every call returns after the work: async members run on ``loop``, which the handlers of a worker share.
    Raises `ConfigurationError` where a member is a generator function or a value of the wrong type.
    """

    def __init__(
        self, type_name: str, handler: Any, default_timeout_s: float, loop: EventLoop | None = None
    ) -> None:
        loop = loop or EventLoop()
        _check_members(type_name, handler)
        _check_values(type_name, handler)
        self.type_name = type_name
        self._handler = handler
        self.timeout_s = float(getattr(handler, "timeout", default_timeout_s))
        self.batch_timeout_s = float(getattr(handler, "batch_timeout", math.inf))
        self.max_timeout_s = float(getattr(handler, "max_timeout", 0.0))
        handle, batch, healthy = (getattr(handler, name, None) for name in _CALLED[1:])
        self.alone = bool(getattr(handler, "alone", False))
        self.exact_numbers = bool(getattr(handler, "exact_numbers", False))
        self.max_batch = int(getattr(handler, "max_batch", 32)) if batch else 1
        function = handler if isinstance(handler, FunctionHandler) else None
        #: Whether the handler parses and validates payloads itself, from their bytes.
        self.validates = function is not None and function.validates
        name = function.name if function else ""
        self.handle_batch = _batch_of(name or "handle_batch", batch, loop) if batch else None
        if self.validates and function and self.handle_batch:
            self.handle_batch = _batch_of_valid(function.validate, self.handle_batch)
        self.handle: Callable[[Job], object] = (
            _handle_of(name or "handle", handle, loop) if handle else _alone(self.handle_batch)
        )
        self.healthy_is_async = healthy is not None and _is(inspect.iscoroutinefunction, healthy)
        #: Whether any of its calls needs the worker's loop.
        self.is_async = any(
            _is(inspect.iscoroutinefunction, method)
            for method in (handle, batch, healthy)
            if method is not None
        )
        check = _with_deadline(healthy) if healthy is not None and self.healthy_is_async else healthy
        self.healthy: Callable[[], object] | None = _call_of("healthy", check, loop) if check else None
        #: The same number for all types that one handler object serves.
        self.instance = id(handler)
        self.counters: Mapping[str, float] = getattr(handler, "counters", {})

    @property
    def max_batch_bytes(self) -> float:
        """The most bytes of jobs that go together, as the handler says now."""
        return float(getattr(self._handler, "max_batch_bytes", math.inf))


def _alone(batch: Any) -> Callable[[Job], object]:
    """``handle`` for a handler that has only ``handle_batch``."""

    def handle(job: Job) -> object:
        (outcome,) = batch([job])
        if isinstance(outcome, Returned):
            return outcome.value
        if outcome is not None:
            raise outcome
        return None

    return handle


def _with_deadline(healthy: Callable[[], object]) -> Callable[[], Coroutine[Any, Any, object]]:
    """An async ``healthy`` that raises TimeoutError after its deadline."""

    async def check() -> object:
        import asyncio

        try:
            async with asyncio.timeout(HEALTHY_WITHIN_S) as deadline:
                result = healthy()
                return (
                    await result if isinstance(result, Awaitable) else result
                )  # a decorator may have run it
        except TimeoutError:
            if deadline.expired():
                raise TimeoutError(f"healthy() has not returned within {HEALTHY_WITHIN_S:g} s") from None
            raise

    return check


def _handle_of(name: str, method: Callable[[Job], object], loop: EventLoop) -> Callable[[Job], object]:
    """``handle`` as the runner calls it, once a job: its own function, for one argument costs half of any."""
    if _is(inspect.iscoroutinefunction, method):
        return _call_of(name, method, loop)

    def handle(job: Job) -> object:
        if (result := method(job)) is not None:
            _refuse_unrun(name, result)
        return result

    return handle


def _batch_of(
    name: str, method: Callable[[Sequence[Job]], object], loop: EventLoop
) -> Callable[[Sequence[Job]], Outcomes]:
    """``handle_batch`` with its answer checked: one outcome a job, each None, `Returned` or an exception."""
    call = _call_of(name, method, loop, is_batch=True)

    def handle_batch(jobs: Sequence[Job]) -> Outcomes:
        outcomes = call(jobs)
        if not isinstance(outcomes, Sequence) or isinstance(outcomes, str | bytes):
            raise PermanentError(
                f"{name} returned {type(outcomes).__name__}: return a list with one outcome a job, "
                "each None, Returned(value) or an exception; [None] * len(jobs) if all succeeded"
            )
        if len(outcomes) != len(jobs):
            raise PermanentError(f"{name}: {len(outcomes)} outcomes for {len(jobs)} jobs")
        # One call for the usual case, where all jobs are done.
        return outcomes if outcomes.count(None) == len(jobs) else [_outcome(name, one) for one in outcomes]

    return handle_batch


def _batch_of_valid(
    validate: Callable[[Job], object], batch: Callable[[Sequence[Job]], Outcomes]
) -> Callable[[Sequence[Job]], Outcomes]:
    """``handle_batch`` that is called with the jobs whose payload is valid, and fails the others."""

    def handle_batch(jobs: Sequence[Job]) -> Outcomes:
        refused: dict[int, Exception] = {}
        for number, job in enumerate(jobs):
            try:
                validate(job)
            except Exception as error:  # also of a validator in the user's type
                refused[number] = error
        if not refused:
            return batch(jobs)
        valid = [job for number, job in enumerate(jobs) if number not in refused]
        outcomes = iter(_outcomes_of(batch, valid))
        return [refused[number] if number in refused else next(outcomes) for number in range(len(jobs))]

    return handle_batch


def _outcomes_of(batch: Callable[[Sequence[Job]], Outcomes], jobs: Sequence[Job]) -> Outcomes:
    """One outcome for each job, also if the handler raises."""
    try:
        return batch(jobs) if jobs else []
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:  # asyncio's cancellation among them
        return [error] * len(jobs)


def _outcome(name: str, given: object) -> Outcome:
    if given is None or isinstance(given, BaseException | Returned):
        return given
    return PermanentError(
        f"{name} returned {type(given).__name__} as this job's outcome: return None, Returned(value) or an "
        "exception"
    )


def _call_of(
    name: str,
    method: Callable[..., Any],
    loop: EventLoop,
    *,
    keep_tasks: bool = False,
    is_batch: bool = False,
) -> Callable[..., Any]:
    """A member as a function that returns after the work."""
    is_async = _is(inspect.iscoroutinefunction, method)

    def call(*arguments: object) -> Any:
        result = method(*arguments)
        if is_async and isinstance(result, Coroutine):  # a decorator may have run it already
            result = loop.run(result, keep_tasks=keep_tasks)
        if result is not None:
            _refuse_unrun(name, result, is_batch=is_batch)
        return result

    return call


def _refuse_unrun(name: str, result: object, *, is_batch: bool = False) -> None:
    """Raise `PermanentError` where a member returned work that has not run or may not have ended.

    It is a coroutine, another awaitable, a generator or the context manager made of one, a lazy iterator, a
    future, a thread or a process; or one of these in a list. Load time cannot see it behind a decorator.
    """
    # The items of a batch's answer are checked as outcomes.
    parts = [result, *(() if is_batch else _items(result))]
    for one in parts:
        if not (advice := _advice(name, one)):
            continue
        for coroutine in parts:
            if isinstance(coroutine, Coroutine):
                with suppress(
                    Exception
                ):  # of its own clean-up, if it has begun: it would hide the error below
                    coroutine.close()
        where = "" if one is result else f"a {type(result).__name__} with "
        raise PermanentError(f"{name} returned {where}{type(one).__name__}, {advice}")


def _items(result: object) -> Iterable[object]:
    """Items of a returned container."""
    if not isinstance(result, list | tuple | set | frozenset | dict):
        return ()
    return islice(result.values() if isinstance(result, dict) else result, _CHECKED_ITEMS)


def _advice(name: str, result: object) -> str:
    """What to write instead of returning this; empty for a value that stands for no work."""
    if isinstance(getattr(result, "gen", result), GeneratorType | AsyncGeneratorType):
        return "which nothing runs: remove its `yield`"
    if isinstance(result, Awaitable):
        return f"which nothing runs: write `async def {name}` and await it there"
    if isinstance(result, map | filter):
        return "which nothing runs: write a loop"
    # Looked up in the class: a test's mock has every attribute.
    if any(all(hasattr(type(result), one) for one in names) for names in _UNFINISHED):
        return f"whose end nothing waits for: wait for it in {name}, for example by result(), get() or join()"
    return ""


def _check_values(type_name: str, handler: Any) -> None:
    """Raise `ConfigurationError` where a member that is a value has another type or range."""
    for name, (is_valid, expected) in _VALUES.items():
        value = getattr(handler, name, _ABSENT)
        if value is not _ABSENT and not is_valid(value):
            raise ConfigurationError(
                f"handler of {type_name}: {name} is {_shown(value)}: give {expected}, or leave it out"
            )
    if taken := [counter for counter in getattr(handler, "counters", {}) if is_taken(counter)]:
        raise ConfigurationError(
            f"handler of {type_name}: the service has counters of its own called {', '.join(taken):.200}: "
            "give those in `counters` other names"
        )


def _shown(value: object) -> str:
    try:
        return f"{value!r:.80}"
    except ValueError:  # of a number with more digits than Python writes
        return "a number that is too large"


def _is_number(value: object) -> TypeGuard[float]:
    if value is True or value is False:
        return False
    try:
        return isinstance(value, Real) and not math.isnan(float(value))
    except OverflowError:  # of a number with more than 308 digits
        return False


def _is_positive(value: object) -> TypeGuard[float]:
    return _is_number(value) and value > 0


def _is_finite(value: object) -> bool:
    return _is_positive(value) and math.isfinite(value)


def _is_count(value: object) -> bool:
    return _is_positive(value) and isinstance(value, Integral)


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _is_counters(value: object) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and _is_number(total) for name, total in value.items()
    )


_ABSENT = object()
#: Members that are values: whether one is valid, and what to give.
_VALUES: dict[str, tuple[Callable[[object], bool], str]] = {
    "timeout": (_is_finite, "a number of seconds above 0"),
    "batch_timeout": (_is_positive, "a number of seconds above 0"),
    "max_timeout": (lambda value: value == 0 or _is_finite(value), "a number of seconds"),
    "max_batch": (_is_count, "a whole number of jobs above 0"),
    "max_batch_bytes": (_is_positive, "a number of bytes above 0"),
    "alone": (_is_flag, "True or False"),
    "needs_device": (_is_flag, "True or False"),
    "exact_numbers": (_is_flag, "True or False"),
    "counters": (_is_counters, "a mapping of names to numbers"),
}


def _check_members(type_name: str, handler: Any) -> None:
    """Raise `ConfigurationError` where a call of a member would run nothing, or a member has an old name."""
    for old, new in extension().moved_members.items():
        if hasattr(handler, old):
            raise ConfigurationError(f"handler of {type_name}: {old} is called {new}")
    for name in _CALLED:
        method = getattr(handler, name, None)
        if method is None:
            continue
        if not callable(method):
            raise ConfigurationError(f"handler of {type_name}: {name} is not a function")
        if _is(inspect.isgeneratorfunction, method) or _is(inspect.isasyncgenfunction, method):
            raise ConfigurationError(
                f"handler of {type_name}: {name} contains `yield`, so a call of it runs nothing: "
                f"write `def {name}` or `async def {name}` without `yield`"
            )
        if not _takes(method, len(_ARGUMENTS[name])):
            raise ConfigurationError(
                f"handler of {type_name}: {name} cannot be called with the arguments that it is given: "
                f"write `def {name}({', '.join(('self', *_ARGUMENTS[name]))})`"
            )


def _takes(method: Any, count: int) -> bool:
    """Whether it can be called with ``count`` positional arguments; True if it does not say what it takes."""
    function = getattr(method, "__func__", None)
    if isinstance(function, FunctionType):
        code = function.__code__
        if code.co_argcount == 1 + count and not code.co_kwonlyargcount:
            return True  # the usual form, for which no worker copies the pages of `inspect` (0.2 MB)
    try:
        # Of a decorated function the outer one, which is called: a decorator may add arguments.
        signature = inspect.signature(method, follow_wrapped=False)
    except (TypeError, ValueError):  # of an extension module
        return True
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True


def _warn_of_misspellings(type_name: str, handler: Any) -> None:
    """Log attributes whose names are similar to those of members that the handler does not have."""
    for name in sorted({*dir(type(handler)), *getattr(handler, "__dict__", ())}):
        if name.startswith("_"):
            continue
        is_function = callable(inspect.getattr_static(handler, name, None))
        known = _CALLED if is_function else _VALUES
        missing = [member for member in known if not hasattr(handler, member)]
        if name not in known and (close := get_close_matches(name, missing, 1, _SIMILARITY)):
            hint = f"a handler has no member {name}: did you mean {close[0]}?"
            log.warning("handler.member_misspelt", extra={"task_type": type_name, "hint": hint})


def _is(form: Callable[[object], bool], method: Any) -> bool:
    """Whether a function has that form, or the one that a partial or a callable object calls."""
    while isinstance(method, functools.partial):
        method = method.func
    return form(method) or form(type(method).__call__)


def load_handlers(settings: Settings, loop: EventLoop | None = None) -> dict[str, BoundHandler]:
    """Import, make and set up the handler of every type; what is async runs on ``loop``.

    Raises `ConfigurationError` where a target cannot be imported or has no ``handle``, where a call of a
    member would run nothing, or where a member is not of its documented kind. What a handler's own ``setup``
    raises passes through. One class that serves several types is made once. A worker
    without a device has no handler of the types that need one.
    """
    made: dict[str, Any] = {}
    for target in settings.handlers.values():
        if target not in made:
            made[target] = _make(target)
    return set_up(
        {type_name: made[target] for type_name, target in settings.handlers.items()}, settings, loop
    )


def set_up(
    handlers: Mapping[str, Any], settings: Settings, loop: EventLoop | None = None
) -> dict[str, BoundHandler]:
    """Let each object be set up, once though it may serve several types; types that need a device are
    left out in a worker without one."""
    if settings.device == NO_DEVICE:
        handlers = {
            type_name: one for type_name, one in handlers.items() if not getattr(one, "needs_device", False)
        }
    loop = loop or EventLoop()
    for type_name, handler in handlers.items():
        _check_members(type_name, handler)
    done: list[object] = []
    for handler in handlers.values():
        setup = getattr(handler, "setup", None)
        # Functions often share one; an object may serve several types.
        owner = setup if isinstance(handler, FunctionHandler) else handler
        if setup is not None and not any(owner is one for one in done):
            done.append(owner)
            _call_of("setup", setup, loop, keep_tasks=True)(settings)
    for type_name, handler in {id(one): (name, one) for name, one in handlers.items()}.values():
        _warn_of_misspellings(type_name, handler)  # after setup, which may set values
    return {
        type_name: BoundHandler(type_name, one, settings.job_timeout_s, loop)
        for type_name, one in handlers.items()
    }


def _make(target: str) -> Any:
    found = load(target, "handler")
    if job_type_of(found) is not None:
        return FunctionHandler(found)
    handler = instance_of(found, target, "handler")
    if not (hasattr(handler, "handle") or hasattr(handler, "handle_batch")):
        close = get_close_matches("handle", dir(handler), 1, _SIMILARITY)
        hint = f": did you mean handle where it has {close[0]}?" if close else ""
        raise ConfigurationError(f"handler {target} has neither handle(job) nor handle_batch(jobs){hint}")
    return handler
