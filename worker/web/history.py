"""Looks at the deployment again and again, so that the page has a past to draw when somebody opens it."""

import logging
import threading
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import Any, NamedTuple

from ..admin.overview import Overview

log = logging.getLogger("jobworker.web")

#: Looks that are kept: half an hour at the usual interval, and some 100 KB as the browser gets them.
_KEPT = 900
#: How long the first page waits for the first look: a store and a service that are silent take about this.
_FIRST_LOOK_S = 6.0


class Sample(NamedTuple):
    """What the charts draw of one look; rates are jobs a second, None where no service says."""

    wall_s: float
    done: float | None
    failed: float | None
    queued: int | None
    pending: int | None
    retrying: int | None
    dead: int | None
    oldest_s: float | None


class History:
    """The last look and those before it. Reads from any thread see whole looks."""

    def __init__(self, look: Callable[[], Overview], interval_s: float) -> None:
        self._look = look
        self._interval_s = interval_s
        self._seen: Overview | None = None
        self._samples: deque[Sample] = deque(maxlen=_KEPT)
        #: How many samples there were in all: the number of the last one.
        self._count = 0
        self._lock = threading.Lock()
        self._first = threading.Event()
        self._wake = threading.Event()
        self._ending = False
        self._thread = threading.Thread(target=self._keep_looking, name="board", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def close(self) -> None:
        """Look no more; a look under way ends by its own time limits."""
        self._ending = True
        self._wake.set()

    def look_now(self) -> None:
        """Something was changed: do not wait for the next turn."""
        self._wake.set()

    @property
    def seen(self) -> Overview:
        """The last look; one that says so where there was none in time."""
        self._first.wait(_FIRST_LOOK_S)
        with self._lock:
            return self._seen or Overview(0.0, trouble="it has not answered yet")

    def history(self, after: int) -> dict[str, Any]:
        """Samples behind number `after`: ``last``, the number of the last one, and a list for each field."""
        with self._lock:
            new = max(0, min(self._count - after, len(self._samples)))
            if after > self._count:  # numbers of the run before this one
                new = len(self._samples)
            fresh = list(islice(self._samples, len(self._samples) - new, None))
            return {
                "last": self._count,
                "whole": new == len(self._samples),
                "interval_s": self._interval_s,
                **{name: [getattr(one, name) for one in fresh] for name in Sample._fields},
            }

    def _keep_looking(self) -> None:
        while not self._ending:
            try:
                self._remember(self._look())
            except Exception:  # the page must outlive whatever a service says of itself
                log.exception("could not look at the deployment")
            self._wake.wait(self._interval_s)
            self._wake.clear()

    def _remember(self, seen: Overview) -> None:
        with self._lock:
            self._seen = seen
            self._samples.append(sample_of(seen))
            self._count += 1
        self._first.set()


def sample_of(seen: Overview) -> Sample:
    """What the charts draw of a look."""
    depths = [depths for _, depths in seen.streams]
    rated = seen.rates is not None and any(service.said for service in seen.services)

    def total(name: str) -> int | None:
        return sum(getattr(one, name) for one in depths) if depths else None

    return Sample(
        round(seen.wall_s, 3),
        round(seen.rate("done"), 2) if rated else None,
        round(seen.rate("failed"), 2) if rated else None,
        total("queued"), total("pending"), total("retrying"), total("dead"),
        round(max(one.oldest_age_s for one in depths), 1) if depths else None,
    )  # fmt: skip
