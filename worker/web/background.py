"""What the page was asked to do and is doing: each in a thread of its own, its progress there to be shown."""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from ..errors import JobworkerError

log = logging.getLogger("jobworker.web")

#: Each has a connection of its own; a fifth that is asked for meanwhile is refused.
_AT_ONCE = 4
#: Works that are remembered, finished ones too.
_KEPT = 50


class TooManyTasks(Exception):
    """As many works as may be are under way."""


@dataclass
class BackgroundTask:
    """One piece of work. ``total`` and ``looked_at`` count what it goes through, 0 where nobody can say."""

    number: int
    title: str
    back: str
    total: int = 0
    looked_at: int = 0
    outcome: str = ""
    trouble: str = ""
    wall_began_s: float = field(default_factory=time.time)
    ended: threading.Event = field(default_factory=threading.Event)

    def seen(self, count: int) -> None:
        """So many more were gone through."""
        self.looked_at += count


class BackgroundTasks:
    """Everything that was asked for since the page was started."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[int, BackgroundTask] = OrderedDict()
        self._count = 0

    def start(self, title: str, back: str, deed: Callable[[BackgroundTask], str]) -> BackgroundTask:
        """Begin; `deed` returns what came of it. Raises `TooManyTasks`."""
        with self._lock:
            if sum(not work.ended.is_set() for work in self._known.values()) >= _AT_ONCE:
                raise TooManyTasks
            self._count += 1
            work = self._known[self._count] = BackgroundTask(self._count, title, back)
            while len(self._known) > _KEPT:
                self._known.popitem(last=False)
        # A daemon: every step is atomic in the store, so that the page may end at any moment.
        threading.Thread(target=self._run, args=(work, deed), name=f"work {work.number}", daemon=True).start()
        return work

    def get(self, number: int) -> BackgroundTask | None:
        """A work by its number, while it is remembered."""
        return self._known.get(number)

    @staticmethod
    def _run(work: BackgroundTask, deed: Callable[[BackgroundTask], str]) -> None:
        try:
            work.outcome = deed(work)
        except JobworkerError as error:
            work.trouble = str(error)
        except Exception as error:  # a person waits for an answer, whatever it is
            log.exception("a work of the page failed")
            work.trouble = f"{type(error).__name__}: {error}"
        finally:
            work.ended.set()
