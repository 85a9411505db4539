"""Event loop of a worker process: runs the coroutines of async handlers to their end, one at a time."""

import contextvars
import logging
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from .envelope import cancellation
from .fork_guard import ForkGuard

if TYPE_CHECKING:
    import asyncio

log = logging.getLogger("jobworker.event_loop")

T = TypeVar("T")

#: Interval at which a running coroutine is cancelled if its jobs were cancelled (seconds).
_CHECK_EVERY_S = 0.2


class EventLoop:
    """One asyncio loop for all handlers of a worker, kept between jobs so that their clients stay usable.

    The first coroutine creates the loop: a worker without async handlers never imports asyncio. The loop runs
    only while a coroutine of a handler runs. It is not the thread's current loop: a sync handler that calls
    ``asyncio.get_event_loop().close()`` does not close it.
    """

    def __init__(self) -> None:
        self._runner: asyncio.Runner | None = None
        # The coroutine that runs and was not cancelled.
        self._coroutine: Coroutine[Any, Any, Any] | None = None

    def run(self, coroutine: Coroutine[Any, Any, T], *, keep_tasks: bool = False) -> T:
        """Run the coroutine and return its result; what it raises passes through.

        Tasks that it leaves running are cancelled and waited for, except with ``keep_tasks``. The wait is
        part of the job: it ends at the job's timeout at the latest. Context variables of the caller are
        visible inside, changes to them are not visible outside. Raises RuntimeError inside a running loop.
        """
        import asyncio

        if _is_running():
            coroutine.close()
            raise RuntimeError("async handlers cannot run inside a running event loop: use a plain function")
        # Not asyncio.run's default factory, which would make this loop the thread's current one.
        runner = self._runner
        if runner is None:
            runner = self._runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
            self._check_again(runner)
        self._coroutine = coroutine
        earlier = asyncio.all_tasks(runner.get_loop())
        try:
            with ForkGuard():  # a child must not close the loop: it shares the parent's epoll
                result = runner.run(coroutine, context=contextvars.copy_context())
        except (SystemExit, KeyboardInterrupt):
            self.close()  # or asyncio reports at the interpreter's end that nothing retrieved the exception
            raise
        except BaseException:
            self._coroutine = None
            self._end_tasks(runner, earlier)
            raise
        self._coroutine = None
        if not keep_tasks:
            self._end_tasks(runner, earlier)
        return result

    def _check_again(self, runner: "asyncio.Runner") -> None:
        """Look for cancelled jobs now and, while the loop runs, again and again."""
        self.cancel_if_asked()
        runner.get_loop().call_later(_CHECK_EVERY_S, self._check_again, runner)

    def cancel_if_asked(self) -> None:
        """Cancel the running coroutine once if all jobs that it runs were cancelled."""
        import asyncio

        if self._runner is None or self._coroutine is None:
            return
        if cancellation.of_all is None or not cancellation.of_all():
            return
        for task in asyncio.all_tasks(self._runner.get_loop()):
            if task.get_coro() is self._coroutine:
                task.cancel("the job was cancelled")
        self._coroutine = None

    def _end_tasks(self, runner: "asyncio.Runner", earlier: "set[asyncio.Task[Any]]") -> None:
        import asyncio

        if tasks := asyncio.all_tasks(runner.get_loop()) - earlier:
            runner.run(_cancel(tasks), context=contextvars.copy_context())

    def close(self) -> None:
        """Cancel what is left and close the loop; the next coroutine creates a new one."""
        runner, self._runner = self._runner, None
        if runner is not None:
            runner.close()


def _is_running() -> bool:
    """Whether the caller itself runs inside a loop, as a test that is a coroutine does."""
    import asyncio

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


async def _cancel(tasks: "set[asyncio.Task[Any]]") -> None:
    import asyncio

    await asyncio.sleep(0)  # tasks that are about to end do so, and need no warning
    left = [task for task in tasks if not task.done()]
    names = [task.get_name() for task in left if not task.cancelling()]
    if names:
        log.warning("handler.tasks_cancelled", extra={"tasks": len(names), "names": ", ".join(names)[:1000]})
    for task in left:
        task.cancel()
    if left:
        await asyncio.wait(left)
