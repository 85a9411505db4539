"""The handler of `embedding_batch`: texts of several jobs become vectors and rows in one go."""

import logging
import os
from collections.abc import Iterable, Sequence

from jobworker.handlers.encoder import Encoder, TextTooLong, Vectors, load_encoder
from jobworker.handlers.fenced import Edition, FencedWriter
from jobworker.handlers.payload import DEFAULT_COLLECTION, Work, read_work
from jobworker.handlers.vector_types import Row, VectorStore, VectorStoreError
from jobworker.worker import Fence, Job, PermanentError, Settings, open_fence

log = logging.getLogger("jobworker.embed")


# Jobs go by their place in the batch, which is also where their outcome goes.
_Works = dict[int, Work]
_Group = dict[int, Edition]
_Outcomes = list[BaseException | None]


class EmbeddingBatch:
    """Embeds the texts of each job and upserts one row a text under its id.

    The same job run twice leaves the same rows; of two jobs in a batch that write the same id the later wins,
    and so does the later of two texts in one job. The field `text_content` holds 65,535 bytes: a longer text
    is stored up to there, cut between characters, while its vector covers all of it. A bad job fails alone.
    Where jobs carry a version, what a newer one wrote or removed stays so, in whatever order they come.
    """

    max_batch = 32
    timeout = 120.0

    def __init__(
        self, encoder: Encoder | None = None, store: VectorStore | None = None, fence: Fence | None = None
    ) -> None:
        self._given_encoder, self._given_store, self._given_fence = encoder, store, fence
        self._known: set[str] = set()
        #: Running totals of the encoder, kept up to date in place once `setup` has run.
        self.counters: dict[str, int] = {}

    def setup(self, settings: Settings) -> None:
        """Load the model, open the store, make the default collection.

        Raises ModelError without a usable model; VectorStoreError where the store does not answer or holds
        the collection with another dimension than the model's.
        """
        self._encoder = self._given_encoder or load_encoder(
            settings.model,
            settings.device,
            threads=settings.threads,
            long_text=settings.long_text,
            token_budget=settings.token_budget,
        )
        self._store = self._given_store or _open_store(settings)
        fence = self._given_fence or open_fence(settings.redis_url)
        self._writer = FencedWriter(self._store, fence, prefix=settings.milvus_prefix)
        self.counters = self._encoder.counters
        self._ensure(DEFAULT_COLLECTION)
        log.info(
            "model %s revision %s, %d dimensions, windows of %d tokens, process %d",
            self._encoder.name,
            self._encoder.revision,
            self._encoder.dim,
            self._encoder.max_tokens,
            os.getpid(),
        )

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
        works = _read_all(jobs, outcomes)
        groups: dict[str, _Group] = {}
        for place, vectors in self._embed(works, outcomes).items():
            work, job = works[place], jobs[place]
            rows = work.rows(vectors)
            _tell_clipped(job, work, rows)
            groups.setdefault(work.collection, {})[place] = Edition(job.id, rows, work.version, work.replace)
        for collection, group in groups.items():
            self._store_group(collection, group, outcomes)
        return outcomes

    def _embed(self, works: _Works, outcomes: _Outcomes) -> dict[int, Vectors]:
        """Vectors for each job; those that the model cannot take get their outcome and drop out."""
        if not works:
            return {}
        try:
            return self._embed_together(works)
        except TextTooLong as error:
            bad = _owners(works, error.indexes)
            for place in bad:
                outcomes[place] = PermanentError(str(error))
            return self._embed({place: works[place] for place in works if place not in bad}, outcomes)
        except Exception as error:
            if len(works) == 1:
                outcomes[next(iter(works))] = error
                return {}
            log.warning("%d jobs could not be embedded together, now one by one: %s", len(works), error)
            alone = [self._embed({place: work}, outcomes) for place, work in works.items()]
            return {place: vectors for one in alone for place, vectors in one.items()}

    def _embed_together(self, works: _Works) -> dict[int, Vectors]:
        vectors = self._encoder.encode([text for work in works.values() for text in work.texts])
        found = {}
        start = 0
        for place, work in works.items():
            found[place] = vectors[start : start + len(work.texts)]
            start += len(work.texts)
        return found

    def _store_group(self, collection: str, group: _Group, outcomes: _Outcomes) -> None:
        """One upsert for all; where it can never work, one a job, so that only the job at fault fails.

        A single job gets its second try too: the collection may have been dropped, and is then made again.
        """
        clash = _ids_clash(group)
        error = None if clash else self._upsert(collection, group)
        alone = clash or isinstance(error, PermanentError)
        for place, edition in group.items():
            outcomes[place] = self._upsert(collection, {place: edition}) if alone else error

    def _upsert(self, collection: str, group: _Group) -> Exception | None:
        try:
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


def _open_store(settings: Settings) -> VectorStore:
    # Only where no store was given: this imports the Milvus client.
    from jobworker.handlers.vectors import open_vectors

    return open_vectors(
        settings.milvus_uri,
        token=settings.milvus_token or None,
        prefix=settings.milvus_prefix,
        partitions="named" if settings.milvus_partitions == "named" else "key",
    )


def _read_all(jobs: Sequence[Job], outcomes: _Outcomes) -> _Works:
    """The jobs that have something to embed; those that cannot be read get their outcome."""
    works = {}
    for place, job in enumerate(jobs):
        try:
            work = read_work(job)
        except PermanentError as error:
            outcomes[place] = error
        else:
            if work.ids:
                works[place] = work
    return works


def _tell_clipped(job: Job, work: Work, rows: Sequence[Row]) -> None:
    for row, text in zip(rows, work.texts, strict=True):
        if len(row.text_content) < len(text):
            log.warning(
                "job %s: of the text %s %d of %d characters are stored, its vector covers all",
                *(job.id, row.id, len(row.text_content), len(text)),
            )


def _owners(works: _Works, texts: Iterable[int]) -> set[int]:
    """The places of the jobs that these texts, counted through all jobs, belong to."""
    places = [place for place, work in works.items() for _ in work.texts]
    return {places[text] for text in texts}


def _ids_clash(group: _Group) -> bool:
    """Whether two tenants or projects write the same id: the store has to judge them one after the other."""
    owner: dict[str, tuple[str, str]] = {}
    return any(
        owner.setdefault(row.id, (row.tenant_id, row.project_id)) != (row.tenant_id, row.project_id)
        for edition in group.values()
        for row in edition.rows
    )
