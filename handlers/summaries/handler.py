"""Handler of `summary_write_back` and `memory_update`: stores and indexes summaries of chapters."""

import hashlib
import logging
import unicodedata
from collections import OrderedDict
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Protocol

import msgspec

from jobworker.worker import Job, PermanentError, StoreUnavailable, Unavailable, span

from ..encoder.base import Encoder, UnsuitableText, embed
from ..encoder.load import load_from_settings
from ..jobstore.erasures import id_name
from ..jobstore.fence import Fence, WriteIntent
from ..jobstore.open import open_fence, open_records
from ..jobstore.records import Put, Record, RecordKey, Records
from ..settings import HandlerSettings
from ..vectors.attribution import Attribution
from ..vectors.open import open_store, wanted_sparse, with_sparse
from ..vectors.ports import AnyRow, EntityRow, Row, SuspectStoreError, Vector, VectorStore
from ..vectors.schema import DEFAULT_COLLECTION, ENTITIES_COLLECTION, SUMMARY_PREFIX, clip, entity_row_id
from ..vectors.versioned_writer import VersionedWriter
from .extract import Sentence, select_sentences, shorten, split_sentences
from .payload import ChapterPayload
from .projection import ProjectedRecord, Projection
from .sinks import ChapterFindings, EntityUpdate, Findings, SummarySink, open_sink

log = logging.getLogger("jobworker.summaries")

#: Limits of fields that Milvus counts in UTF-8 bytes.
_NAME_BYTES, _TYPE_BYTES = 256, 32
#: Jobs whose findings of the language model are cached, for retries after a later failure.
_CACHED_FINDINGS = 32
#: Job timeout in seconds without a language model. A chapter takes seconds; a busy CPU may need longer.
_LOCAL_TIMEOUT_S = 300.0
#: Sentences of a chapter that are embedded, about a minute of one core with the small model. Of a longer
#: chapter, every second, third, ... sentence is used.
_MAX_SENTENCES = 5000
#: Characters of them. Without it, the time for a chapter without sentence marks would grow with its length.
_MAX_SENTENCE_CHARS = 200_000


class FindingsSource(Protocol):
    """Language model or other extractor of a chapter's findings."""

    counters: dict[str, int]
    #: The longest time for one chapter, in seconds.
    limit_s: float

    def extract_findings(self, content: str) -> Findings:
        """The findings of a chapter's text.

        Raises PermanentError if a retry cannot succeed, Unavailable if the source does not answer.
        """


class WriteBack:
    """Stores summaries by chapter version: an older version never replaces a newer one.

    The record in Redis is authoritative; rows in Milvus are projected from it (see `projection`). A job with
    an outdated version stores nothing, but updates the rows from the newest record.
    """

    needs_device = True
    timeout = _LOCAL_TIMEOUT_S

    def __init__(
        self,
        encoder: Encoder | None = None,
        store: VectorStore | None = None,
        fence: Fence | None = None,
        records: Records | None = None,
        model: FindingsSource | None = None,
        sink: SummarySink | None = None,
    ) -> None:
        """Arguments replace the parts that `setup` would create from the settings."""
        self._given_encoder, self._given_store, self._given_fence = encoder, store, fence
        self._given_records, self._given_model, self._given_sink = records, model, sink
        self._findings_cache: OrderedDict[tuple[str, int, str], Findings] = OrderedDict()
        #: Running totals of this process.
        self.counters: dict[str, int] = {"summaries_stored": 0, "summaries_outdated": 0}

    def setup(self, settings: HandlerSettings) -> None:
        """Load the model, open the stores, create the collections.

        Raises ModelError, ConfigurationError or VectorStoreError if one of them cannot be used.
        """
        self._summary_chars = settings.summary_chars
        self._encoder = self._given_encoder or load_from_settings(settings)
        self._store = self._given_store or open_store(settings)
        self._records = self._given_records or open_records(settings.redis_url)
        fence = self._given_fence or open_fence(settings.redis_url)
        self._writer = VersionedWriter(
            self._store, fence, prefix=settings.milvus_prefix, model=self._encoder.name
        )
        self._projection = Projection(self._records, self._writer, self._build_rows)
        self._source = self._given_model or _open_model(settings)
        self._sink = self._given_sink or open_sink(settings)
        sparse = wanted_sparse(settings, of_model=self._encoder.has_sparse)
        self._gives_sparse = self._store.supported_sparse(sparse) == "model"
        for collection in (DEFAULT_COLLECTION, ENTITIES_COLLECTION):
            self._store.ensure_collection(collection, self._encoder.dim, sparse)
        if self._source is not None:
            # One mapping for the metrics of both.
            self._source.counters = self.counters = self.counters | self._source.counters
            self.timeout = _LOCAL_TIMEOUT_S + self._source.limit_s

    def healthy(self) -> None:
        """Raise the error of a store or sink that does not answer."""
        self._store.ping()
        if (sink_healthy := getattr(self._sink, "healthy", None)) is not None:
            sink_healthy()

    def handle(self, job: Job) -> None:
        """Store one chapter's summary.

        Raises PermanentError for a bad payload or a chapter without sentences. Raises Unavailable if a store
        or the language model does not answer, and other errors of the stores and the model.
        """
        chapter = ChapterPayload.parse(job)
        try:
            self._store_chapter(job, chapter)
        except StoreUnavailable as error:
            raise Unavailable(str(error)) from error
        except UnsuitableText as error:
            raise PermanentError(str(error)) from error
        except SuspectStoreError as error:
            raise Attribution(self._store).attribute(error) from error

    def _store_chapter(self, job: Job, chapter: ChapterPayload) -> None:
        key = RecordKey("summary", chapter.tenant_id, chapter.project_id, chapter.chapter_id)
        stored = self._records.get(key)
        if stored is not None and stored.version > chapter.chapter_version:
            self._skip_stale(job, key, chapter, stored.version)
            return
        with span("summarise", characters=len(chapter.content)):
            findings = self._findings(job.id, chapter)
        put = self._put_records(job, key, chapter, findings)
        if put is None:
            log.info("summary.erased_skipped", extra={"job_id": job.id, "chapter_id": chapter.chapter_id})
            return
        if put.verdict == "older":
            self._skip_stale(job, key, chapter, put.record.version if put.record else 0)
            return
        self.counters["summaries_stored"] += put.verdict == "stored"
        self._update_rows(job, key)
        self._sink.store(
            ChapterFindings(
                chapter.tenant_id, chapter.project_id, chapter.chapter_id, chapter.chapter_version, findings
            )
        )
        self._findings_cache.pop((job.id, chapter.chapter_version, chapter.chapter_id), None)

    def _skip_stale(self, job: Job, key: RecordKey, chapter: ChapterPayload, version: int) -> None:
        """Store nothing, since a newer version is stored; but update its row, because its job may have been
        killed between record and row."""
        self.counters["summaries_outdated"] += 1
        fields = {
            "chapter_id": chapter.chapter_id,
            "version": version,
            "stale_version": chapter.chapter_version,
        }
        log.info("summary.stale_skipped", extra={"job_id": job.id, **fields})
        self._update_rows(job, key)

    def _update_rows(self, job: Job, key: RecordKey) -> None:
        """Update the chapter's row and those of all entities that any version of it mentioned.

        All of them, because a killed job may have left an outdated row, and the model may find other entities
        in the next try.
        """
        mentioned = (key._replace(kind="entity", id=id_) for id_ in self._records.mentioned(key))
        entities = [ProjectedRecord(entity, ENTITIES_COLLECTION) for entity in mentioned]
        with span("upsert", collection=DEFAULT_COLLECTION):
            self._projection.update(
                job.id, _delivery(job), [ProjectedRecord(key, DEFAULT_COLLECTION), *entities]
            )

    # ---- the summary

    def _findings(self, job_id: str, chapter: ChapterPayload) -> Findings:
        if chapter.summary:
            return Findings(chapter.summary)
        if self._source is None:
            return Findings(self._summarise(chapter.content))
        cache_key = (job_id, chapter.chapter_version, chapter.chapter_id)
        if cache_key not in self._findings_cache:
            findings = self._source.extract_findings(chapter.content)
            summary = shorten(findings.summary, self._summary_chars)
            self._findings_cache[cache_key] = msgspec.structs.replace(findings, summary=summary)
            if len(self._findings_cache) > _CACHED_FINDINGS:
                self._findings_cache.popitem(last=False)
        return self._findings_cache[cache_key]

    def _summarise(self, content: str) -> str:
        sentences = split_sentences(content)
        if not sentences:
            raise PermanentError("content holds no sentence to make a summary from")
        sentences = _spread(sentences)
        vectors = self._encoder.encode([sentence.text for sentence in sentences])
        return select_sentences(sentences, vectors, self._summary_chars)

    # ---- records and rows

    def _put_records(
        self, job: Job, key: RecordKey, chapter: ChapterPayload, findings: Findings
    ) -> Put | None:
        """Store summary and entities; None if the chapter was deleted after the job was created.

        A deletion waits until the records are stored, and then deletes them.
        """
        ids = [entity_id(update.name) for update in findings.entity_updates]
        intent = WriteIntent(
            "", "", f"{job.id}@records", (SUMMARY_PREFIX + chapter.chapter_id,),
            chapters=("/".join((*key[1:3], chapter.chapter_id)),),
            tenant_id=key.tenant_id, project_id=key.project_id, created_us=chapter.created_us,
            delivery=_delivery(job),
        )  # fmt: skip
        row_ids = {id_: entity_row_id(*key[1:3], id_) for id_ in ids}
        of_entities = intent._replace(ids=tuple(row_ids.values()))
        with (
            self._writer.admitted(DEFAULT_COLLECTION, intent) as erased,
            self._writer.admitted(ENTITIES_COLLECTION, of_entities) as erased_entities,
        ):
            if erased:
                return None
            put = self._put_summary(key, chapter, findings)
            if put.verdict == "older":
                return put
            single = {id_name(*key[1:3], row_id) for row_id in row_ids.values()}
            kept = [
                update
                for update, id_ in zip(findings.entity_updates, ids, strict=True)
                if erased_entities <= single - {id_name(*key[1:3], row_ids[id_])}
            ]
            self._records.mention(key, [entity_id(update.name) for update in kept])
            for update in kept:
                self._put_entity(chapter, update)
            return put

    def _put_summary(self, key: RecordKey, chapter: ChapterPayload, findings: Findings) -> Put:
        fields = {"summary": findings.summary}
        put = self._records.put(key, chapter.chapter_version, fields, _now(), chapter.created_us)
        if put.verdict == "foreign":
            raise PermanentError(
                f"summary of {chapter.chapter_id}: the key belongs to another tenant or project"
            )
        return put

    def _put_entity(self, chapter: ChapterPayload, update: EntityUpdate) -> None:
        """Store an entity's profile, unless a later version of the chapter has stored one."""
        key = RecordKey("entity", chapter.tenant_id, chapter.project_id, entity_id(update.name))
        fields = {
            "name": update.name,
            "entity_type": update.entity_type,
            "description": update.description,
            "chapter_id": chapter.chapter_id,
        }
        put = self._records.put(key, chapter.chapter_version, fields, _now(), chapter.created_us)
        if put.verdict == "foreign":
            raise PermanentError(f"entity {key.id}: the key belongs to another tenant or project")

    def _build_rows(self, records: Sequence[tuple[ProjectedRecord, Record]]) -> list[AnyRow]:
        plan = self._encoder.tokenize([_embedded_text(item.key, record) for item, record in records])
        vectors, sparse = embed(self._encoder, plan, sparse=self._gives_sparse)
        rows = [
            _summary_row(item.key, record, vector)
            if item.key.kind == "summary"
            else _entity_row(item.key, record, vector)
            for (item, record), vector in zip(records, vectors, strict=True)
        ]
        return with_sparse(rows, sparse or [])


def _spread(sentences: list[Sentence]) -> list[Sentence]:
    """All sentences, or every second, third, ... so that their number and length are within the limits."""
    step = -(-len(sentences) // _MAX_SENTENCES)
    while sum(len(sentence.text) for sentence in sentences[::step]) > _MAX_SENTENCE_CHARS:
        step += 1
    return sentences[::step]


def entity_id(name: str) -> str:
    """Id of an entity, derived from its name: case, width and spacing of the name make no difference."""
    normalised = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
    return "name-" + hashlib.blake2b(normalised.encode(), digest_size=16).hexdigest()


def _embedded_text(key: RecordKey, record: Record) -> str:
    if key.kind == "summary":
        return clip(record.fields.get("summary", ""))  # as much as the row holds
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
        created_us=record.created_us,
    )


def _entity_row(key: RecordKey, record: Record, vector: Vector) -> EntityRow:
    fields = record.fields
    return EntityRow(
        entity_row_id(key.tenant_id, key.project_id, key.id),
        vector,
        key.tenant_id,
        key.project_id,
        entity_id=key.id,
        entity_type=clip(fields.get("entity_type", ""), _TYPE_BYTES),
        name=clip(fields.get("name", ""), _NAME_BYTES),
        description=clip(fields.get("description", "")),
        version=record.version,
        created_us=record.created_us,
    )


def _delivery(job: Job) -> str:
    return f"{job.stream}/{job.entry_id}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _open_model(settings: HandlerSettings) -> FindingsSource | None:
    if not settings.llm_url:
        return None
    # Imported here: without a language model, the HTTP client is not loaded.
    from .llm import open_model

    return open_model(settings)
