"""Health checks of an idle worker's handlers, each with a deadline."""

import threading
from collections.abc import Callable, Iterable

from .fork_guard import ForkGuard
from .handler import HEALTHY_WITHIN_S, BoundHandler
from .telemetry.failure import error_text

_NO_ANSWER = f"healthy() has not returned within {HEALTHY_WITHIN_S:g} s"
_LOOP_IS_BUSY = f"an async {_NO_ANSWER} and blocks the loop of all async handlers of the worker"
#: In place of a handler's number, for the loop; `id` returns no negative number.
_LOOP = -1
#: An async one is cancelled after its deadline; it gets this long to end.
_CANCEL_WITHIN_S = 1.0


class HealthChecks:
    """Calls ``healthy()`` of handlers.

    Each runs in a daemon thread, because nothing can interrupt code that blocks. A call that exceeds the
    deadline continues there, and its handler gets no second call and no job until it returns. An async one
    runs on the worker's loop: one that blocks keeps the jobs of all async handlers waiting.
    """

    def __init__(self, handlers: Iterable[BoundHandler], within_s: float = HEALTHY_WITHIN_S) -> None:
        self._handlers = [handler for handler in handlers if handler.healthy is not None]
        self._within_s = within_s
        self._unfinished: dict[int, _Call] = {}

    def trouble(self, on_progress: Callable[[], None]) -> str | None:
        """Check the handlers up to the first that is not healthy; returns its type and error.

        ``on_progress`` is called after each check. Raises SystemExit and KeyboardInterrupt of a handler.
        """
        for handler in self._handlers:
            try:
                error = self._check(handler)
            finally:
                on_progress()
            if error:
                return f"{handler.type_name}: {error}"
        return None

    def unfinished(self, handler: BoundHandler) -> str:
        """Why the handler must not get a job now; empty if it may."""
        if not self._unfinished:
            return ""
        if self._runs(handler.instance):
            return _NO_ANSWER
        return _LOOP_IS_BUSY if handler.is_async and self._runs(_LOOP) else ""

    def _runs(self, number: int) -> bool:
        call = self._unfinished.get(number)
        if call is not None and not call.is_alive():
            del self._unfinished[number]
            return False
        return call is not None

    def _check(self, handler: BoundHandler) -> str:
        if error := self.unfinished(handler):
            return error
        assert handler.healthy is not None
        call = _Call(handler.healthy)
        call.start()
        call.join(self._within_s + (_CANCEL_WITHIN_S if handler.healthy_is_async else 0.0))
        if call.is_alive():
            self._unfinished[handler.instance] = call
            if handler.healthy_is_async:
                self._unfinished[_LOOP] = call
            return _NO_ANSWER
        return _text(call.error)


class _Call(threading.Thread):
    """One call of ``healthy()``; ``error`` is what it raised."""

    def __init__(self, healthy: Callable[[], object]) -> None:
        super().__init__(name="healthy", daemon=True)
        self._healthy = healthy
        self.error: BaseException | None = None

    def run(self) -> None:
        self.error = _error_of(self._healthy)


def _error_of(healthy: Callable[[], object]) -> BaseException | None:
    try:
        with ForkGuard():
            healthy()
    except BaseException as error:  # among them asyncio's cancellation
        return error
    return None


def _text(error: BaseException | None) -> str:
    if isinstance(error, SystemExit | KeyboardInterrupt):
        raise error
    return error_text(error) if error else ""
