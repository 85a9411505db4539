"""The handler of `summary_write_back` and `memory_update`: chapters' summaries, stored and searchable."""

import hashlib
import logging
import unicodedata
from collections import OrderedDict
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Protocol

import msgspec

from jobworker.worker import Job, PermanentError, StoreUnavailable, Unavailable, span

from ..encoder.base import Encoder, TextTooLong
from ..encoder.load import load_encoder
from ..jobstore.fence import Fence
from ..jobstore.open import open_fence, open_records
from ..jobstore.records import Record, RecordKey, Records
from ..settings import HandlerSettings
from ..vectors.ports import AnyRow, EntityRow, Row, Vector, VectorStore
from ..vectors.schema import DEFAULT_COLLECTION, clip
from ..vectors.versioned_writer import VersionedWriter
from .extract import choose, sentences, shorten
from .payload import SUMMARY_PREFIX, ChapterWork, read_chapter
from .projection import Followed, Projection
from .sinks import ChapterFindings, EntityUpdate, Findings, SummarySink, open_sink

log = logging.getLogger("jobworker.summaries")

ENTITIES = "entity_profiles"
#: Limits of fields that Milvus counts in UTF-8 bytes.
_NAME_BYTES, _TYPE_BYTES = 256, 32
#: Jobs whose findings of the language model are kept, for retries that fail after it.
_FINDINGS_KEPT = 32
#: A chapter without a language model takes seconds; this is for a processor that is very busy.
_LOCAL_LIMIT_S = 300.0
#: Sentences of a chapter whose vectors are made: about a minute's work for one core with the small model. Of
#: more every second, third, ... is taken.
_MOST_SENTENCES = 5000


class FindingsSource(Protocol):
    """What finds out what happens in a chapter."""

    counters: dict[str, int]
    #: What one chapter takes at most.
    limit_s: float

    def read(self, content: str) -> Findings:
        """See `LanguageModel.read`."""


class WriteBack:
    """Stores summaries by version: what a newer version of the chapter stored stays.

    The record in the job store decides; the rows in Milvus follow it (see `projection`). A job that is late
    changes nothing, but still makes sure that the rows are those of the newest record.
    """

    needs_device = True
    timeout = _LOCAL_LIMIT_S

    def __init__(
        self,
        encoder: Encoder | None = None,
        store: VectorStore | None = None,
        fence: Fence | None = None,
        records: Records | None = None,
        model: FindingsSource | None = None,
        sink: SummarySink | None = None,
    ) -> None:
        """What is not given is made by `setup` as the settings say."""
        self._given_encoder, self._given_store, self._given_fence = encoder, store, fence
        self._given_records, self._given_model, self._given_sink = records, model, sink
        self._known: OrderedDict[tuple[str, int, str], Findings] = OrderedDict()
        #: Running totals of this process.
        self.counters: dict[str, int] = {"summaries_stored": 0, "summaries_outdated": 0}

    def setup(self, settings: HandlerSettings) -> None:
        """Load the model, open the stores, make the collections.

        Raises ModelError, ConfigurationError or VectorStoreError where one of them cannot be used.
        """
        self._chars = settings.summary_chars
        self._encoder = self._given_encoder or load_encoder(
            settings.model,
            settings.device,
            threads=settings.threads,
            long_text=settings.long_text,
            token_budget=settings.token_budget,
            dtype=settings.dtype,
        )
        self._store = self._given_store or _open_store(settings)
        self._records = self._given_records or open_records(settings.redis_url)
        fence = self._given_fence or open_fence(settings.redis_url)
        writer = VersionedWriter(self._store, fence, prefix=settings.milvus_prefix, model=self._encoder.name)
        self._projection = Projection(self._records, writer, self._rows)
        self._model = self._given_model or _open_model(settings)
        self._sink = self._given_sink or open_sink(settings)
        for collection in (DEFAULT_COLLECTION, ENTITIES):
            self._store.ensure_collection(collection, self._encoder.dim)
        if self._model is not None:
            # One mapping for the metrics of both.
            self._model.counters = self.counters = self.counters | self._model.counters
            self.timeout = _LOCAL_LIMIT_S + self._model.limit_s

    def healthy(self) -> None:
        """Raise what a store raises where it does not answer."""
        self._store.ping()
        if (sink_healthy := getattr(self._sink, "healthy", None)) is not None:
            sink_healthy()

    def handle(self, job: Job) -> None:
        """Store one chapter's summary.

        Raises PermanentError for a bad payload or where no summary can be had, Unavailable where a store or
        the language model does not answer, else what the store or the model raised.
        """
        work = read_chapter(job)
        try:
            self._handle(job.id, work)
        except StoreUnavailable as error:
            raise Unavailable(str(error)) from error
        except TextTooLong as error:
            raise PermanentError(str(error)) from error

    def _handle(self, job_id: str, work: ChapterWork) -> None:
        key = RecordKey("summary", work.tenant_id, work.project_id, work.chapter_id)
        has = self._records.get(key)
        if has is not None and has.version > work.chapter_version:
            self._outdated(job_id, key, work, has.version)
            return
        with span("summarise", characters=len(work.content)):
            findings = self._find(job_id, work)
        put = self._records.put(key, work.chapter_version, {"summary": findings.summary}, _now())
        if put.verdict == "foreign":
            raise PermanentError(
                f"summary of {work.chapter_id}: the key belongs to another tenant or project"
            )
        if put.verdict == "older":
            self._outdated(job_id, key, work, put.record.version if put.record else 0)
            return
        self.counters["summaries_stored"] += put.verdict == "stored"
        self._records.mention(key, [entity_id(update.name) for update in findings.entity_updates])
        for update in findings.entity_updates:
            self._put_entity(work, update)
        self._follow(job_id, key)
        self._sink.store(_told(work, findings))
        self._known.pop((job_id, work.chapter_version, work.chapter_id), None)

    def _outdated(self, job_id: str, key: RecordKey, work: ChapterWork, version: int) -> None:
        """A newer version is stored. Its job may have ended between record and row: the row is seen to."""
        self.counters["summaries_outdated"] += 1
        fields = {"chapter_id": work.chapter_id, "version": version, "stale_version": work.chapter_version}
        log.info("summary.stale_skipped", extra={"job_id": job_id, **fields})
        self._follow(job_id, key)

    def _follow(self, job_id: str, chapter: RecordKey) -> None:
        """Bring the chapter's row up to date, and the rows of all entities that any try of any version of it
        wrote: a try that died may have left one behind, and a model finds others the next time."""
        mentioned = (chapter._replace(kind="entity", id=id_) for id_ in self._records.mentioned(chapter))
        entities = [Followed(key, ENTITIES) for key in mentioned]
        with span("upsert", collection=DEFAULT_COLLECTION):
            self._projection.follow(job_id, [Followed(chapter, DEFAULT_COLLECTION), *entities])

    # ---- the summary

    def _find(self, job_id: str, work: ChapterWork) -> Findings:
        if work.summary:
            return Findings(work.summary)
        if self._model is None:
            return Findings(self._extract(work.content))
        known = (job_id, work.chapter_version, work.chapter_id)
        if known not in self._known:
            found = self._model.read(work.content)
            self._known[known] = msgspec.structs.replace(found, summary=shorten(found.summary, self._chars))
            if len(self._known) > _FINDINGS_KEPT:
                self._known.popitem(last=False)
        return self._known[known]

    def _extract(self, content: str) -> str:
        found = sentences(content)
        if not found:
            raise PermanentError("content holds no sentence to make a summary of")
        found = found[:: -(-len(found) // _MOST_SENTENCES)]
        vectors = self._encoder.encode([sentence.text for sentence in found])
        return choose(found, vectors, self._chars)

    # ---- rows

    def _put_entity(self, work: ChapterWork, update: EntityUpdate) -> None:
        """Store what this chapter tells of an entity; a later version of the chapter may have told more."""
        key = RecordKey("entity", work.tenant_id, work.project_id, entity_id(update.name))
        fields = {
            "name": update.name,
            "entity_type": update.entity_type,
            "description": update.description,
            "chapter_id": work.chapter_id,
        }
        if self._records.put(key, work.chapter_version, fields, _now()).verdict == "foreign":
            raise PermanentError(f"entity {key.id}: the key belongs to another tenant or project")

    def _rows(self, behind: Sequence[tuple[Followed, Record]]) -> list[AnyRow]:
        vectors = self._encoder.encode([_searched(followed, record) for followed, record in behind])
        return [
            _summary_row(followed.key, record, vector)
            if followed.key.kind == "summary"
            else _entity_row(followed.key, record, vector)
            for (followed, record), vector in zip(behind, vectors, strict=True)
        ]


def entity_id(name: str) -> str:
    """The id of an entity that is known by its name: the same for every spelling that looks the same."""
    plain = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
    return "name-" + hashlib.blake2b(plain.encode(), digest_size=16).hexdigest()


def _searched(followed: Followed, record: Record) -> str:
    """The text that a record is found by."""
    if followed.key.kind == "summary":
        return record.fields.get("summary", "")
    return "\n".join(filter(None, (record.fields.get("name"), record.fields.get("description"))))


def _summary_row(key: RecordKey, record: Record, vector: Vector) -> Row:
    return Row(
        SUMMARY_PREFIX + key.id,
        vector,
        key.tenant_id,
        key.project_id,
        chapter_id=key.id,
        segment_type="summary",
        text_content=clip(record.fields.get("summary", "")),
        version=record.version,
    )


def _entity_row(key: RecordKey, record: Record, vector: Vector) -> EntityRow:
    """The row's own id is made of all three: names, unlike ids, are alike in many projects."""
    scope = "/".join((key.tenant_id, key.project_id, key.id))
    fields = record.fields
    return EntityRow(
        "entity:" + hashlib.blake2b(scope.encode(), digest_size=16).hexdigest(),
        vector,
        key.tenant_id,
        key.project_id,
        entity_id=key.id,
        entity_type=clip(fields.get("entity_type", ""), _TYPE_BYTES),
        name=clip(fields.get("name", ""), _NAME_BYTES),
        description=clip(fields.get("description", "")),
        version=record.version,
    )


def _told(work: ChapterWork, findings: Findings) -> ChapterFindings:
    return ChapterFindings(work.tenant_id, work.project_id, work.chapter_id, work.chapter_version, findings)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _open_model(settings: HandlerSettings) -> FindingsSource | None:
    if not settings.llm_url:
        return None
    # Only where it is used: the HTTP client takes its time to import.
    from .llm import open_model

    return open_model(settings)


def _open_store(settings: HandlerSettings) -> VectorStore:
    # Only where no store was given: this imports the Milvus client.
    from ..vectors.milvus.store import open_vectors

    return open_vectors(
        settings.milvus_uri,
        token=settings.milvus_token or None,
        prefix=settings.milvus_prefix,
        partitions="named" if settings.milvus_partitions == "named" else "key",
    )
