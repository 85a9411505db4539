"""The handler of `embedding_batch`: texts of several jobs become vectors and rows in one go."""

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from jobworker.worker import Job, PermanentError, span

from ..encoder.base import Encoder
from ..encoder.load import load_encoder
from ..jobstore.fence import Fence
from ..jobstore.open import open_fence
from ..settings import HandlerSettings
from ..vectors.ports import Row, VectorStore, VectorStoreError
from ..vectors.schema import DEFAULT_COLLECTION
from ..vectors.versioned_writer import VersionedRows, VersionedWriter
from .embedder import Computed, Embedder, EmbedRequest, Prepared, size_bytes
from .payload import EmbedPayload, read_work
from .pipeline import flow
from .vector_cache import VectorCache

log = logging.getLogger("jobworker.embed")


# Work of one batch at the recent rate: its jobs are acknowledged together, and a stopping service waits for
# them. The least is what a few forward passes need to be full.
BATCH_S = 4.0
BATCH_BYTES = (24 * 1024, 4 * 1024 * 1024)
# What goes through the model at once within a batch, while the next part is tokenised and the last one is
# written: short against the batch, so that little stands alone at its two ends, and a few passes long.
CHUNK_S = 0.5
CHUNKS_A_BATCH = 4
LEAST_CHUNK_BYTES = 6 * 1024
CACHE_FILE = "embedding-cache.sqlite3"


# Jobs go by their place in the batch, which is also where their outcome goes.
_Works = dict[int, EmbedPayload]
_Group = dict[int, VersionedRows]
_Outcomes = list[BaseException | None]


@dataclass(frozen=True)
class _Batch:
    """What one call was given. `away` has, for each collection, the error of a store that does not answer:
    the rest of the batch does not wait for it again."""

    jobs: Sequence[Job]
    works: _Works
    outcomes: _Outcomes
    away: dict[str, Exception] = field(default_factory=dict)


class EmbeddingBatch:
    """Embeds the texts of each job and upserts one row a text under its id.

    The same job run twice leaves the same rows; of two jobs in a batch that write the same id the later wins,
    and so does the later of two texts in one job. The field `text_content` holds 65,535 bytes: a longer text
    is stored up to there, cut between characters, while its vector covers all of it. A bad job fails alone.
    Where jobs carry a version, what a newer one wrote or removed stays so, in whatever order they come.
    """

    # A worker's death is charged to all that it had started, and each of these then runs alone: so not more
    # than some seconds of that. Fast models are limited by this, slow ones by `max_batch_bytes`.
    max_batch = 128
    needs_device = True
    timeout = 120.0
    # Of any number of jobs, for together they are a few seconds of work: a pass that hangs is found by then.
    batch_timeout = 120.0

    def __init__(
        self, encoder: Encoder | None = None, store: VectorStore | None = None, fence: Fence | None = None
    ) -> None:
        self._given_encoder, self._given_store, self._given_fence = encoder, store, fence
        self._known: set[str] = set()
        #: How much the runner may hand over at once; follows the pace of the model.
        self.max_batch_bytes = BATCH_BYTES[0]
        #: Running totals of the encoder, kept up to date in place once `setup` has run.
        self.counters: dict[str, int] = {}

    def setup(self, settings: HandlerSettings) -> None:
        """Load the model, open the store, make the default collection.

        Raises ModelError without a usable model; VectorStoreError where the store does not answer or holds
        the collection with another dimension than the model's.
        """
        with ThreadPoolExecutor(1) as beside:
            # Milvus's client takes as long to import as the model to load: a killed worker is back sooner.
            opening = beside.submit(lambda: self._given_store or open_store(settings))
            self._encoder = self._given_encoder or load_model(settings)
            self._store = opening.result()
        self._prefix = settings.milvus_prefix
        fence = self._given_fence or open_fence(settings.redis_url)
        self._writer = VersionedWriter(self._store, fence, prefix=self._prefix, model=self._encoder.name)
        self.counters = self._encoder.counters
        self._embedder = Embedder(
            self._encoder, _open_cache(settings, self._encoder), long_text=settings.long_text
        )
        self._ensure(DEFAULT_COLLECTION)
        fields = {"model": self._encoder.name, "revision": self._encoder.revision, "dim": self._encoder.dim}
        log.info("embed.ready", extra={**fields, "max_tokens": self._encoder.max_tokens, "pid": os.getpid()})

    def healthy(self) -> None:
        """Raise what the store raises where it does not answer."""
        self._store.ping()

    def handle(self, job: Job) -> None:
        """Embed one job. Raises PermanentError for a bad payload, else what the store or the model raised."""
        (outcome,) = self.handle_batch([job])
        if outcome is not None:
            raise outcome

    def handle_batch(self, jobs: Sequence[Job]) -> list[BaseException | None]:
        """Embed several jobs at once; one outcome a job, in order."""
        outcomes: _Outcomes = [None] * len(jobs)
        works = _read_all(jobs, outcomes, self._prefix)
        if works:
            flow(
                self._chunks(works),
                self._embedder.prepare,
                partial(self._compute, jobs),
                partial(self._finish, _Batch(jobs, works, outcomes)),
            )
            self.max_batch_bytes = int(_within(self._embedder.pace_bytes_s * BATCH_S, *BATCH_BYTES))
        return outcomes

    def _chunks(self, works: _Works) -> list[dict[int, EmbedRequest]]:
        """The jobs in order, cut where enough for some passes is together; a job is never cut."""
        asks = {place: EmbedRequest(work.tenant_id, work.texts) for place, work in works.items()}
        sizes = {place: size_bytes(ask) for place, ask in asks.items()}
        most = self._embedder.pace_bytes_s * CHUNK_S
        limit = max(LEAST_CHUNK_BYTES, min(most, sum(sizes.values()) / CHUNKS_A_BATCH))
        chunks: list[dict[int, EmbedRequest]] = []
        filled = limit
        for place, ask in asks.items():
            if filled >= limit:
                chunks.append({})
                filled = 0
            chunks[-1][place] = ask
            filled += sizes[place]
        return chunks

    def _compute(self, jobs: Sequence[Job], prepared: Prepared) -> Computed:
        texts, known = len(prepared.texts), len(prepared.texts) - len(prepared.missing)
        with span("embed", [jobs[place] for place in prepared.asks], texts=texts, known=known):
            return self._embedder.compute(prepared)

    def _finish(self, batch: _Batch, computed: Sequence[Computed]) -> None:
        """Store what was computed; rows of several jobs go together."""
        self._embedder.keep(computed)
        groups: dict[str, _Group] = {}
        for one in computed:
            for place, error in one.failed.items():
                batch.outcomes[place] = error
            for place, vectors in one.vectors.items():
                work, job = batch.works[place], batch.jobs[place]
                rows = work.rows(vectors)
                _tell_clipped(job, work, rows)
                edition = VersionedRows(job.id, rows, work.version, work.replace)
                groups.setdefault(work.collection, {})[place] = edition
        for collection, group in groups.items():
            self._store_group(collection, group, batch)

    def _store_group(self, collection: str, group: _Group, batch: _Batch) -> None:
        """One upsert for all; where it can never work, one a job, so that only the job at fault fails.

        A single job gets its second try too: the collection may have been dropped, and is then made again.
        """
        clash = _ids_clash(group)
        error = None if clash else self._try(collection, group, batch)
        alone = clash or isinstance(error, PermanentError)
        for place, edition in group.items():
            batch.outcomes[place] = self._try(collection, {place: edition}, batch) if alone else error

    def _try(self, collection: str, group: _Group, batch: _Batch) -> Exception | None:
        jobs = [batch.jobs[place] for place in group]
        error = batch.away.get(collection) or self._upsert(collection, group, jobs)
        if isinstance(error, VectorStoreError):
            batch.away[collection] = error
        return error

    def _upsert(self, collection: str, group: _Group, jobs: Sequence[Job]) -> Exception | None:
        """What went wrong: a VectorStoreError where the store did, a PermanentError where the rows did."""
        try:
            rows = sum(len(edition.rows) for edition in group.values())
            with span("upsert", jobs, collection=collection, rows=rows):
                self._ensure(collection)
                self._writer.write(collection, list(group.values()))
        except VectorStoreError as error:
            # The next try looks whether the collection is still there.
            self._known.discard(collection)
            return error if error.transient else PermanentError(str(error))
        except Exception as error:
            return error
        return None

    def _ensure(self, collection: str) -> None:
        if collection not in self._known:
            self._store.ensure_collection(collection, self._encoder.dim)
            self._known.add(collection)


def load_model(settings: HandlerSettings) -> Encoder:
    """The encoder that the settings name; within one process always the same. Raises ModelError."""
    return load_encoder(
        settings.model,
        settings.device,
        threads=settings.threads,
        long_text=settings.long_text,
        token_budget=settings.token_budget,
        dtype=settings.dtype,
    )


def open_store(settings: HandlerSettings) -> VectorStore:
    """The vector store that the settings name; it connects on its first call."""
    # Only where no store was given: this imports the Milvus client.
    from ..vectors.milvus.store import open_vectors

    return open_vectors(
        settings.milvus_uri,
        token=settings.milvus_token or None,
        prefix=settings.milvus_prefix,
        partitions="named" if settings.milvus_partitions == "named" else "key",
    )


def _open_cache(settings: HandlerSettings, encoder: Encoder) -> VectorCache | None:
    if not settings.cache_bytes:
        return None
    path = Path(settings.data_dir, CACHE_FILE)
    return VectorCache(path, encoder.dim, settings.cache_bytes, encoder.counters)


def _within(number: float, least: float, most: float) -> float:
    return max(least, min(number, most))


def _read_all(jobs: Sequence[Job], outcomes: _Outcomes, prefix: str) -> _Works:
    """The jobs that have something to embed; those that cannot be read get their outcome."""
    works = {}
    for place, job in enumerate(jobs):
        try:
            work = read_work(job, prefix)
        except PermanentError as error:
            outcomes[place] = error
        else:
            if work.ids:
                works[place] = work
    return works


def _tell_clipped(job: Job, work: EmbedPayload, rows: Sequence[Row]) -> None:
    for row, text in zip(rows, work.texts, strict=True):
        if len(row.text_content) < len(text):
            fields = {"job_id": job.id, "row_id": row.id, "chars": len(text), "stored": len(row.text_content)}
            log.warning("embed.text_clipped", extra={**fields, "hint": "the vector covers the whole text"})


def _ids_clash(group: _Group) -> bool:
    """Whether two tenants or projects write the same id: the store has to judge them one after the other."""
    owner: dict[str, tuple[str, str]] = {}
    return any(
        owner.setdefault(row.id, (row.tenant_id, row.project_id)) != (row.tenant_id, row.project_id)
        for edition in group.values()
        for row in edition.rows
    )
