"""Deletions for the vector cache of this host, read from their log in the job store."""

import logging
import threading
import time
from collections.abc import Callable

from jobworker.worker import StoreUnavailable

from ..jobstore.erasures import Erasures
from .vector_cache import VectorCache

log = logging.getLogger("jobworker.cache")

#: Interval between two looks at the log. A deletion is done within a minute on all hosts.
POLL_S = 5.0
#: Interval at which an unchanged position is noted again.
_NOTE_S = 3600.0


class CacheErasures:
    """Applies the log of deletions to a cache, in a thread of this worker. All workers of a host may do so.

    A host that was off for as long as the log is kept has missed deletions: its cache is emptied.
    """

    def __init__(
        self,
        cache: VectorCache,
        erasures: Erasures,
        *,
        kept_s: float,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        self._cache, self._erasures, self._kept_s, self._wall_s = cache, erasures, kept_s, wall_s

    def start(self) -> None:
        """Start the thread, which ends with the process."""
        threading.Thread(target=self._run, name="cache-erasures", daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                self.apply()
            except StoreUnavailable:
                pass  # the jobs of this worker report it
            except Exception as error:
                log.warning("cache.erasures_failed", extra={"error": f"{type(error).__name__}: {error}"})
            time.sleep(POLL_S)

    def apply(self) -> None:
        """Apply what was published since the last call of any worker. Raises StoreUnavailable."""
        now = self._wall_s()
        if (noted := self._cache.position()) is None:
            return
        position, read_s = noted
        if read_s and now - read_s > self._kept_s * 0.9 and not self._cache.clear():
            return
        while page := self._erasures.published(position):
            for one in page:
                if not self._cache.erase(one.names, one.cutoff_us):
                    return
            position = page[-1].id
            self._cache.move_on(position, now)
        if now - read_s > _NOTE_S:
            self._cache.move_on(position, now)
