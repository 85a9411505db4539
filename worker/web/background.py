"""Background tasks of the page: each runs in a thread and reports its progress."""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from ..errors import JobworkerError

log = logging.getLogger("jobworker.web")

#: Tasks that may run at the same time. Each has a connection of its own.
_MAX_RUNNING = 4
#: Tasks that are kept, including finished ones.
_MAX_KEPT = 50


class TooManyTasks(Exception):
    """As many tasks as allowed are running."""


@dataclass
class BackgroundTask:
    """One task. ``scanned`` of ``total`` items are done; ``total`` is 0 if it is not known.

    ``outcome`` or ``error`` is set before ``ended``.
    """

    number: int
    title: str
    back: str
    total: int = 0
    scanned: int = 0
    outcome: str = ""
    error: str = ""
    wall_began_s: float = field(default_factory=time.time)
    ended: threading.Event = field(default_factory=threading.Event)

    def add_scanned(self, count: int) -> None:
        """Report progress."""
        self.scanned += count


class BackgroundTasks:
    """The running tasks and the latest finished ones."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tasks: OrderedDict[int, BackgroundTask] = OrderedDict()
        self._count = 0

    def start(self, title: str, back: str, run: Callable[[BackgroundTask], str]) -> BackgroundTask:
        """Run a function in a thread; it returns the outcome as text. Raises `TooManyTasks`."""
        with self._lock:
            if sum(not task.ended.is_set() for task in self._tasks.values()) >= _MAX_RUNNING:
                raise TooManyTasks
            self._count += 1
            task = self._tasks[self._count] = BackgroundTask(self._count, title, back)
            while len(self._tasks) > _MAX_KEPT:
                self._tasks.popitem(last=False)
        # A daemon thread: every step is atomic in the store, so the process may end at any moment.
        name = f"task {task.number}"
        threading.Thread(target=self._run, args=(task, run), name=name, daemon=True).start()
        return task

    def get(self, number: int) -> BackgroundTask | None:
        """A task by its number; None if it is no longer kept."""
        return self._tasks.get(number)

    @staticmethod
    def _run(task: BackgroundTask, run: Callable[[BackgroundTask], str]) -> None:
        try:
            task.outcome = run(task)
        except JobworkerError as error:
            task.error = str(error)
        except Exception as error:  # whatever failed, the page must show that the task has ended
            log.exception("web.task_failed", extra={"title": task.title})
            task.error = f"{type(error).__name__}: {error}"
        finally:
            task.ended.set()
