"""What a handler is, and how a type's name becomes one inside the worker process."""

import importlib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from .devices import NO_MODEL
from .envelope import Job
from .errors import ConfigurationError
from .settings import Settings


@runtime_checkable
class Handler(Protocol):
    """Runs jobs of one type inside a worker process; made without arguments, once for each process.

    Everything but one of ``handle`` and ``handle_batch`` is optional:

    - ``setup(settings)``: once, before the first job; raise here and the service does not start.
    - ``handle_batch(jobs)``: several jobs at once, at most ``max_batch`` (default 32); returns one outcome
      a job, in order: None, or the exception that this job failed with.
    - ``max_batch_bytes``: the most bytes (of JSON) that go together, a single larger job aside; looked at
      before each batch, so that it may change.
    - ``batch_timeout``: seconds for all jobs of a batch (or the longest of their own limits); without it
      the sum of their limits.
    - ``timeout``: seconds a job may take (default: the service's ``--job-timeout``).
    - ``healthy()``: raises while something that the handler needs does not answer.
    - ``alone = True``: its jobs may take minutes, so no other job waits behind one in the same worker.
    - ``needs_model = True``: a worker that is not to hold the model does not run it (``--model-copies``).
    - ``counters``: a mapping of running totals, exported as metrics.
    """

    def handle(self, job: Job) -> None:
        """Run one job: return, or raise. `PermanentError` means that a retry is of no use."""


class BoundHandler:
    """A handler as the runner uses it: one batch call, a limit, and defaults for what it leaves out."""

    def __init__(self, kind: str, handler: Any, default_timeout_s: float) -> None:
        self.kind = kind
        self._handler = handler
        self.timeout_s = float(getattr(handler, "timeout", default_timeout_s))
        self.batch_timeout_s = float(getattr(handler, "batch_timeout", math.inf))
        batch = getattr(handler, "handle_batch", None)
        self.alone = bool(getattr(handler, "alone", False))
        self.max_batch = max(1, int(getattr(handler, "max_batch", 32))) if batch else 1
        self.handle: Callable[[Job], None] = getattr(handler, "handle", None) or _alone(batch)
        self.handle_batch: Callable[[Sequence[Job]], Sequence[BaseException | None]] | None = batch
        self.healthy: Callable[[], None] | None = getattr(handler, "healthy", None)
        self.counters: Mapping[str, int] = getattr(handler, "counters", {})

    @property
    def max_batch_bytes(self) -> float:
        """The most bytes of jobs that go together, as the handler says now."""
        return float(getattr(self._handler, "max_batch_bytes", math.inf))


def _alone(batch: Any) -> Callable[[Job], None]:
    """``handle`` for a handler that has only ``handle_batch``."""

    def handle(job: Job) -> None:
        (outcome,) = batch([job])
        if outcome is not None:
            raise outcome

    return handle


def load_handlers(settings: Settings) -> dict[str, BoundHandler]:
    """Import, make and set up the handler of every type.

    Raises `ConfigurationError` where a target cannot be imported or has no ``handle``; what a handler's
    own ``setup`` raises passes through. One class that serves several types is made once. A worker that is
    to hold no model has no handler of the types that need one.
    """
    made: dict[str, Any] = {}
    for target in settings.handlers.values():
        if target not in made:
            made[target] = _make(target)
    return set_up({kind: made[target] for kind, target in settings.handlers.items()}, settings)


def set_up(handlers: Mapping[str, Any], settings: Settings) -> dict[str, BoundHandler]:
    """Let each object be set up, once though it may serve several types; those that need a model which this
    worker is not to hold are left out."""
    if settings.device == NO_MODEL:
        handlers = {kind: one for kind, one in handlers.items() if not getattr(one, "needs_model", False)}
    for handler in {id(one): one for one in handlers.values()}.values():
        setup = getattr(handler, "setup", None)
        if setup is not None:
            setup(settings)
    return {kind: BoundHandler(kind, one, settings.job_timeout_s) for kind, one in handlers.items()}


def _make(target: str) -> Any:
    module_name, _, class_name = target.partition(":")
    # As `python -m` does: a handler beside the place where the service was started is found.
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        handler = getattr(importlib.import_module(module_name), class_name)()
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(f"handler {target}: {error}") from error
    if not (hasattr(handler, "handle") or hasattr(handler, "handle_batch")):
        raise ConfigurationError(f"handler {target} has neither handle(job) nor handle_batch(jobs)")
    return handler
