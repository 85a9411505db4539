"""The embedded stores as processes: start them before the roles, start them again, end them last."""

import logging
import os
import signal
import sys
import time

from .embedded import DataDir, Embedded, EmbeddedMilvus, EmbeddedValkey
from .errors import Exit
from .process import Process
from .respawn import Respawn
from .settings import Settings

log = logging.getLogger("jobworker.stores")

#: A store gets this long to write its data out before it is killed; both are safe against a kill.
_STOP_WITHIN_S = 10.0


class _Kept:
    """One store and its process."""

    def __init__(self, store: Embedded) -> None:
        self.store = store
        self.process: Process | None = None
        self.respawn = Respawn()
        self.asked_at = 0.0


class Stores:
    """All embedded stores of a service; none where both urls were given."""

    def __init__(self, settings: Settings, data: DataDir | None, stores: list[Embedded]) -> None:
        self._settings = settings
        self._data = data
        self._kept = [_Kept(store) for store in stores]
        self._mono_give_up_s = time.monotonic() + settings.connect_timeout_s
        self._was_ready = False

    @property
    def redis_url(self) -> str:
        """The given one, or that of the embedded store."""
        return self._settings.redis_url or self._url(EmbeddedValkey)

    @property
    def milvus_uri(self) -> str:
        """The given one, or that of the embedded store; empty where no handler needs one.

        Holds the embedded store's token: never log it.
        """
        return self._settings.milvus_uri or self._url(EmbeddedMilvus)

    @property
    def milvus_token(self) -> str:
        """The given one; empty with the embedded store: clients would prefer it to the one in the uri."""
        return "" if self._url(EmbeddedMilvus) else self._settings.milvus_token

    def _url(self, kind: type[EmbeddedValkey] | type[EmbeddedMilvus]) -> str:
        return next((kept.store.url for kept in self._kept if isinstance(kept.store, kind)), "")

    @property
    def ready(self) -> bool:
        """Whether all have answered once since the start of the service: from then on the roles run, and
        bear with a store that is being started again."""
        return self._was_ready

    def reasons(self) -> list[str]:
        """Which stores do not answer now."""
        return [f"{k.store.name} is starting" for k in self._kept if not (k.process and k.process.ready)]

    def turn(self, mono_now_s: float) -> Exit | None:
        """Hold each store up; an exit code where one could not be brought up at the service's start."""
        for kept in self._kept:
            self._keep_up(kept, mono_now_s)
        if not self._was_ready:
            self._was_ready = all(kept.process and kept.process.ready for kept in self._kept)
            if not self._was_ready and mono_now_s > self._mono_give_up_s:
                names = ", ".join(k.store.name for k in self._kept if not (k.process and k.process.ready))
                log.critical("embedded store not up", extra={"stores": names})
                return Exit.STORE_UNREACHABLE
        return None

    def _keep_up(self, kept: _Kept, now: float) -> None:
        process = kept.process
        if process is None:
            if not kept.respawn.wait_s(now):
                kept.process = self._start(kept.store, now)
            return
        ended = process.collect()
        if ended is not None:
            log.error("store ended", extra={"store": kept.store.name, "cause": ended.cause})
            kept.respawn.ended(now, was_ready=process.ready, lived_s=now - process.mono_started_s)
            process.close()
            kept.process = None
        elif not process.ready and kept.store.answers():
            process.ready = True
            log.info("store up", extra={"store": kept.store.name})

    def _start(self, store: Embedded, now: float) -> Process:
        tether = [sys.executable, "-m", "jobworker.worker.tether", str(os.getpid())]
        assert self._data is not None
        return Process(store.name, [*tether, *store.command()], [self._data.lock_fd], now)

    def stop(self) -> None:
        """Ask all to end, then make them."""
        running = [kept.process for kept in self._kept if kept.process]
        for process in running:
            process.kill(signal.SIGTERM)
        give_up_at = time.monotonic() + _STOP_WITHIN_S
        for process in running:
            if not process.wait(give_up_at - time.monotonic()):
                process.kill(signal.SIGKILL)
                process.wait(_STOP_WITHIN_S)
            process.close()
