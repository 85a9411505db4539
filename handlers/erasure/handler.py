"""Handler of `vectors_delete`: deletes rows, records and cached vectors of a scope."""

import logging
import time
from collections.abc import Callable

from jobworker.worker import Job, StoreUnavailable, Unavailable

from ..jobstore.erasures import Erasures
from ..jobstore.fence import Fence
from ..jobstore.open import open_erasures, open_fence, open_records
from ..jobstore.records import Records
from ..settings import HandlerSettings
from ..vectors.attribution import Attribution
from ..vectors.open import open_store
from ..vectors.ports import SuspectStoreError, VectorStore
from .erase import Eraser, EraseRequest
from .payload import DeletePayload

log = logging.getLogger("jobworker.erasure")


class VectorsDelete:
    """Deletes a scope. Work that was created before the job and runs later, or again, stores nothing.

    Idempotent: a second run deletes what is left. What was created after the job stays.
    """

    # Of each page; progress starts it again.
    timeout = 120.0
    max_timeout = 12 * 3600.0

    def __init__(
        self,
        store: VectorStore | None = None,
        fence: Fence | None = None,
        erasures: Erasures | None = None,
        records: Records | None = None,
        mono_s: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Arguments replace the parts that `setup` would create from the settings."""
        self._given = (store, fence, erasures, records)
        self._mono_s, self._sleep = mono_s, sleep
        #: Running totals of this process.
        self.counters = {"scopes_erased": 0, "erased_rows": 0}

    def setup(self, settings: HandlerSettings) -> None:
        """Open the stores; they connect at the first job. Raises ConfigurationError."""
        store, fence, erasures, records = self._given
        self._prefix = settings.milvus_prefix
        self._store = store or open_store(settings)
        self._eraser = Eraser(
            self._store,
            fence or open_fence(settings.redis_url),
            erasures or open_erasures(settings.redis_url),
            records or open_records(settings.redis_url),
            prefix=settings.milvus_prefix,
            ttl_ms=int(settings.tombstone_ttl_s * 1000),
            mono_s=self._mono_s,
            sleep=self._sleep,
        )

    def healthy(self) -> None:
        """Raise the error of a store that does not answer."""
        self._store.ping()

    def handle(self, job: Job) -> None:
        """Delete one scope.

        Raises PermanentError for a bad payload, Busy if other jobs are in the way for too long, Unavailable
        if a store does not answer, and other errors of the stores.
        """
        payload = DeletePayload.parse(job, self._prefix)
        owner = "/".join((*payload.scope[:2], f"{job.id}@erase"))
        request = EraseRequest(owner, payload.scope, payload.cutoff_us, payload.collections)
        try:
            erased = self._eraser.erase(request)
        except StoreUnavailable as error:
            raise Unavailable(str(error)) from error
        except SuspectStoreError as error:
            raise Attribution(self._store).attribute(error) from error
        rows = sum(erased.rows.values())
        self.counters["scopes_erased"] += 1
        self.counters["erased_rows"] += rows
        counts = {"rows": rows, "summaries": erased.summaries, "entities": erased.entities}
        log.info("scope.erased", extra={"job_id": job.id, **counts})
