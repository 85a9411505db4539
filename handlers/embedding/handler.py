"""Handler of `embedding_batch`: the texts of several jobs become vectors and rows together."""

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from jobworker.worker import Job, PermanentError, report_progress, span

from ..encoder.base import Encoded, Encoder
from ..encoder.load import load_from_settings
from ..jobstore.fence import Fence
from ..jobstore.open import open_erasures, open_fence
from ..jobstore.usage import Usage, UsageMeter, open_usages
from ..settings import HandlerSettings
from ..vectors.attribution import Attribution
from ..vectors.open import open_store, wanted_sparse, with_sparse
from ..vectors.ports import (
    AnyRow,
    CollectionUnavailable,
    SuspectStoreError,
    TransientStoreError,
    VectorStore,
    VectorStoreError,
    WriteRefused,
)
from ..vectors.schema import DEFAULT_COLLECTION, ENTITIES_COLLECTION, owner
from ..vectors.versioned_writer import Contended, VersionedRows, VersionedWriter
from .cache_erasures import CacheErasures
from .embedder import Computed, Embedder, EmbedRequest, Prepared, divide, size_bytes
from .payload import EmbedPayload, EntityPayload, Payload
from .pipeline import run_pipeline
from .vector_cache import Origin, VectorCache

log = logging.getLogger("jobworker.embed")


# Work of one batch at the recent rate: its jobs are acknowledged together, and a graceful stop waits for
# them. The lower limit fills a few forward passes.
BATCH_S = 4.0
BATCH_BYTES = (24 * 1024, 4 * 1024 * 1024)
# A chunk goes through the model at once, while the next one is tokenised and the last one is written. It is
# short compared with the batch, because its two ends have nothing to overlap with, and a few passes long.
CHUNK_S = 0.5
CHUNKS_PER_BATCH = 4
MIN_CHUNK_BYTES = 6 * 1024
# A longer job is divided into parts of this duration: each is cached and stored when it is computed, so that
# a retry continues there. Some forward passes long, so that division costs no throughput.
PART_S = 2.5
CACHE_FILE = "embedding-cache.sqlite3"


# A job is named by its index in the batch, which is also that of its outcome.
_Payloads = dict[int, Payload]
_Group = dict[int, VersionedRows]
_Outcomes = list[BaseException | None]


@dataclass(frozen=True)
class _Batch:
    """Jobs of one `handle_batch` call. `store_errors`: by collection, the error of a store that did not
    answer, or of the whole collection; the rest of the batch does not wait for it again. `unwritten`: vectors
    of the latest parts of a job; `written`: the number of its texts before them."""

    jobs: Sequence[Job]
    payloads: _Payloads
    outcomes: _Outcomes
    attribution: Attribution
    unwritten: dict[int, list[Encoded]] = field(default_factory=dict)
    written: dict[int, int] = field(default_factory=dict)
    store_errors: dict[str, Exception] = field(default_factory=dict)

    def fail(self, index: int, error: BaseException | None) -> None:
        """Set the outcome of a job if there is an error; the first one stays.

        Two threads call it for parts of one job, so a success never takes the place of an error.
        """
        if error is not None and self.outcomes[index] is None:
            self.outcomes[index] = error

    def fail_unfinished(self) -> None:
        """Fail the jobs whose rows are not all written; none is expected."""
        for index, payload in self.payloads.items():
            if self.written.get(index, 0) < len(payload.texts):
                self.fail(index, RuntimeError("not all texts were embedded"))


class EmbeddingBatch:
    """Handler of `embedding_batch`: embeds the texts of each job and upserts one row a text under its id.

    Idempotent: a second run leaves the same rows. Of two writes to one id in a batch, or in a job, the later
    one wins. A bad job fails alone. With versions, an older job never overwrites or restores rows that a
    newer one wrote or removed, whatever the order of arrival. The field `text_content` holds 65,535 bytes: a
    longer text is clipped there, between two characters, while its vector covers the whole text.
    """

    # A worker's death is charged to every started job, and each of them then runs isolated. This bounds a
    # batch of a fast model to a few seconds; slow models are bounded by `max_batch_bytes`.
    max_batch = 128
    needs_device = True
    timeout = 120.0
    # Not multiplied by the number of jobs: a batch is a few seconds of work, so a hung pass is found by then.
    batch_timeout = 120.0
    # A job of 8 MiB takes minutes or hours; each pass and each write starts the timeout again.
    max_timeout = 12 * 3600.0
    #: Collection that `setup` creates, and the parser of a payload.
    collection = DEFAULT_COLLECTION
    parse: Callable[[Job, str], Payload] = staticmethod(EmbedPayload.parse)

    def __init__(
        self, encoder: Encoder | None = None, store: VectorStore | None = None, fence: Fence | None = None
    ) -> None:
        self._given_encoder, self._given_store, self._given_fence = encoder, store, fence
        self._ensured_collections: set[str] = set()
        #: Limit of the next batch; follows the rate of the model.
        self.max_batch_bytes = BATCH_BYTES[0]
        #: Running totals of the encoder, updated in place after `setup`.
        self.counters: dict[str, float] = {}

    def setup(self, settings: HandlerSettings) -> None:
        """Load the model, open the store, create the default collection.

        Raises ModelError if the model cannot be used, VectorStoreError if the store does not answer or its
        collection has another dimension than the model.
        """
        with ThreadPoolExecutor(1) as executor:
            # In parallel, because importing pymilvus takes as long as loading the model. A worker that
            # replaces a killed one is ready sooner.
            opening = executor.submit(lambda: self._given_store or open_store(settings))
            self._encoder = self._given_encoder or load_from_settings(settings)
            self._store = opening.result()
        self._prefix = settings.milvus_prefix
        fence = self._given_fence or open_fence(settings.redis_url)
        self._writer = VersionedWriter(self._store, fence, prefix=self._prefix, model=self._encoder.name)
        self.counters = self._encoder.counters
        cache = _open_cache(settings, self._encoder)
        self._sparse = wanted_sparse(settings, of_model=self._encoder.has_sparse)
        self._embedder = Embedder(
            self._encoder,
            cache,
            long_text=settings.long_text,
            sparse=self._store.supported_sparse(self._sparse) == "model",
        )
        if cache is not None and settings.redis_url:
            erasures = open_erasures(settings.redis_url)
            CacheErasures(cache, erasures, kept_s=settings.tombstone_ttl_s).start()
        self._usage = UsageMeter(open_usages(settings.redis_url))
        for collection in dict.fromkeys((DEFAULT_COLLECTION, self.collection)):
            self._ensure(collection)
        fields = {"model": self._encoder.name, "revision": self._encoder.revision, "dim": self._encoder.dim}
        log.info("embed.ready", extra={**fields, "max_tokens": self._encoder.max_tokens, "pid": os.getpid()})

    def healthy(self) -> None:
        """Raise the error of a store that does not answer."""
        self._store.ping()

    def handle(self, job: Job) -> None:
        """Embed one job. Raises PermanentError for a bad payload, or the error of the store or model."""
        (outcome,) = self.handle_batch([job])
        if outcome is not None:
            raise outcome

    def handle_batch(self, jobs: Sequence[Job]) -> list[BaseException | None]:
        """Embed several jobs at once; one outcome a job, in order."""
        outcomes: _Outcomes = [None] * len(jobs)
        payloads = self._parse_all(jobs, outcomes)
        if payloads:
            batch = _Batch(jobs, payloads, outcomes, Attribution(self._store))
            run_pipeline(
                self._chunks(payloads),
                self._embedder.prepare,
                partial(self._compute, batch),
                partial(self._finish, batch),
            )
            batch.fail_unfinished()
            self._usage.flush()
            self.max_batch_bytes = int(_clamp(self._embedder.rate_bytes_s * BATCH_S, *BATCH_BYTES))
        return outcomes

    def _parse_all(self, jobs: Sequence[Job], outcomes: _Outcomes) -> _Payloads:
        """The payloads with texts; a job with an invalid payload gets its outcome."""
        payloads: _Payloads = {}
        for index, job in enumerate(jobs):
            try:
                payload = self.parse(job, self._prefix)
            except PermanentError as error:
                outcomes[index] = error
            else:
                if payload.ids:
                    payloads[index] = payload
        return payloads

    def _chunks(self, payloads: _Payloads) -> list[dict[int, EmbedRequest]]:
        """The jobs in order, divided into chunks of some forward passes each.

        A chunk holds one part of a job that takes longer than a part, and all texts of any other job.
        """
        requests = {index: _request(one) for index, one in payloads.items()}
        max_bytes = self._embedder.rate_bytes_s * CHUNK_S
        limit = max(
            MIN_CHUNK_BYTES, min(max_bytes, sum(map(size_bytes, requests.values())) / CHUNKS_PER_BATCH)
        )
        part_bytes = max(MIN_CHUNK_BYTES, self._embedder.rate_bytes_s * PART_S)
        chunks: list[dict[int, EmbedRequest]] = []
        filled = limit
        for index, request in requests.items():
            for part in divide(request, part_bytes):
                if filled >= limit or index in chunks[-1]:
                    chunks.append({})
                    filled = 0
                chunks[-1][index] = part
                filled += size_bytes(part)
        return chunks

    def _compute(self, batch: _Batch, prepared: Prepared) -> Computed:
        if all(batch.outcomes[index] is not None for index in prepared.requests):
            return Computed({}, {}, [])  # earlier parts of the jobs have failed
        texts, cached = len(prepared.texts), len(prepared.texts) - len(prepared.uncached)
        with span("embed", [batch.jobs[index] for index in prepared.requests], texts=texts, known=cached):
            computed = self._embedder.compute(prepared)
        for index, error in computed.failed.items():
            batch.fail(index, error)
        report_progress()
        return computed

    def _finish(self, batch: _Batch, computed: Sequence[Computed]) -> None:
        """Write the vectors to the cache and the store; the rows of several jobs share requests."""
        self._embedder.save_to_cache(computed)
        for part in computed:
            self._usage.add(part.usage)
            for index, vectors in part.vectors.items():
                batch.unwritten.setdefault(index, []).append(vectors)
        groups: dict[str, _Group] = {}
        for index in list(batch.unwritten):
            if (versioned := _take_rows(batch, index)) is not None:
                groups.setdefault(batch.payloads[index].collection, {})[index] = versioned
        for collection, group in groups.items():
            self._store_group(collection, group, batch)

    def _store_group(self, collection: str, group: _Group, batch: _Batch) -> None:
        """One upsert for the group. If it is refused, one a job, so that only the job at fault fails.

        A group of one job is tried again too: if its collection was dropped, the second try creates it.
        """
        clash = _ids_clash(group)
        error = None if clash else self._try_upsert(collection, group, batch)
        split = clash or isinstance(error, PermanentError | SuspectStoreError | WriteRefused)
        for index, rows in group.items():
            own = self._try_upsert(collection, {index: rows}, batch) if split else error
            if isinstance(own, Contended) and not own.concerns(rows):
                own = None
            batch.fail(index, own)
            if own is None:
                self._usage.add({owner(rows.rows[0])[0]: Usage(rows=len(rows.rows))})

    def _try_upsert(self, collection: str, group: _Group, batch: _Batch) -> Exception | None:
        if (error := batch.store_errors.get(collection)) is not None:
            return error
        error = self._upsert(collection, group, [batch.jobs[index] for index in group])
        concerns_all = isinstance(error, CollectionUnavailable)
        if isinstance(error, SuspectStoreError):
            if len(group) > 1 and not concerns_all:
                return error  # the jobs are tried one by one
            error = batch.attribution.attribute(error)
        if error is not None and (concerns_all or isinstance(error, TransientStoreError)):
            batch.store_errors[collection] = error
        return error

    def _upsert(self, collection: str, group: _Group, jobs: Sequence[Job]) -> Exception | None:
        """The error, if any: VectorStoreError by the store, PermanentError by the rows or the collection."""
        try:
            rows = sum(len(versioned.rows) for versioned in group.values())
            with span("upsert", jobs, collection=collection, rows=rows):
                self._ensure(collection)
                self._writer.write(collection, list(group.values()))
        except VectorStoreError as error:
            # It may have been dropped: the next try ensures it again.
            self._ensured_collections.discard(collection)
            return error if error.transient else PermanentError(str(error))
        except Exception as error:
            return error
        return None

    def _ensure(self, collection: str) -> None:
        if collection not in self._ensured_collections:
            self._store.ensure_collection(collection, self._encoder.dim, self._sparse)
            self._ensured_collections.add(collection)


class EntityUpsert(EmbeddingBatch):
    """Handler of `entity_upsert`: one vector an entity, of its name and description. Promises as above."""

    collection = ENTITIES_COLLECTION
    parse: Callable[[Job, str], Payload] = staticmethod(EntityPayload.parse)


def _request(payload: Payload) -> EmbedRequest:
    places = zip(payload.chapter_ids, payload.ids, strict=True)
    scope = (payload.tenant_id, payload.project_id)
    origins = [Origin(*scope, chapter_id, row_id, payload.created_us) for chapter_id, row_id in places]
    return EmbedRequest(payload.tenant_id, payload.texts, origins)


def _open_cache(settings: HandlerSettings, encoder: Encoder) -> VectorCache | None:
    if not settings.cache_bytes:
        return None
    path = Path(settings.data_dir, CACHE_FILE)
    return VectorCache(path, encoder.dim, settings.cache_bytes, encoder.counters)


def _clamp(number: float, least: float, most: float) -> float:
    return max(least, min(number, most))


def _take_rows(batch: _Batch, index: int) -> VersionedRows | None:
    """The rows of a job that can be written now; None if there are none.

    A job with `replace` is written as a whole: its rows take the place of others.
    """
    payload, start = batch.payloads[index], batch.written.get(index, 0)
    stop = start + sum(len(part.vectors) for part in batch.unwritten[index])
    failed = batch.outcomes[index] is not None
    if payload.replace and stop < len(payload.texts) and not failed:
        return None
    parts = batch.unwritten.pop(index)
    if failed:
        return None
    batch.written[index] = stop
    part = payload.part(start, stop)
    rows = with_sparse(
        part.rows(np.concatenate([one.vectors for one in parts])),
        [sparse for one in parts for sparse in one.sparse or ()],
    )
    _log_clipped(batch.jobs[index], part, rows)
    job = batch.jobs[index]
    return VersionedRows(job.id, rows, payload.version, payload.replace, f"{job.stream}/{job.entry_id}")


def _log_clipped(job: Job, payload: Payload, rows: Sequence[AnyRow]) -> None:
    for row_id, chars, stored in payload.clipped_chars(rows):
        fields = {"job_id": job.id, "row_id": row_id, "chars": chars, "stored": stored}
        log.warning("embed.text_clipped", extra={**fields, "hint": "the vector covers the whole text"})


def _ids_clash(group: _Group) -> bool:
    """Whether two tenants or projects write the same id, which the store must check job by job."""
    owners: dict[str, tuple[str, str]] = {}
    return any(
        owners.setdefault(row.id, owner(row)) != owner(row)
        for versioned in group.values()
        for row in versioned.rows
    )
