"""The built-in job types as plain values: importing this costs nothing."""

from jobworker.worker.extension import Extension, Metric, Source

_WRITE_BACK = "jobworker.handlers.summaries.handler:WriteBack"
_ENTITIES = "jobworker.handlers.embedding.handler:EntityUpsert"
_DELETE = "jobworker.handlers.erasure.handler:VectorsDelete"

#: Type -> where its handler is.
BUILTIN = {
    "embedding_batch": "jobworker.handlers.embedding.handler:EmbeddingBatch",
    "index_rebuild": "jobworker.handlers.rebuild.handler:IndexRebuild",
    "summary_write_back": _WRITE_BACK,
    "memory_update": _WRITE_BACK,
    "entity_upsert": _ENTITIES,
    "vectors_delete": _DELETE,
    "audit": "jobworker.handlers.audit.handler:Archive",
}

#: Targets of earlier releases, which users may have in `--handler`, and where these classes are now.
MOVED = {
    "jobworker.handlers.embed:EmbeddingBatch": BUILTIN["embedding_batch"],
    "jobworker.handlers.reindex:IndexRebuild": BUILTIN["index_rebuild"],
    "jobworker.handlers.writeback:WriteBack": _WRITE_BACK,
    "jobworker.handlers.archive:Archive": BUILTIN["audit"],
}

#: Handlers that need a vector store.
NEEDS_VECTORS = frozenset(
    {
        "jobworker.handlers.embedding.handler:EmbeddingBatch",
        "jobworker.handlers.rebuild.handler:IndexRebuild",
        _WRITE_BACK,
        _ENTITIES,
        _DELETE,
    }
)

_STORY, _MEMORY, _AUDIT = "stream:story:gen", "stream:memory:update", "stream:audit:log"

#: What these job types add to the service.
EXTENSION = Extension(
    handlers=BUILTIN,
    moved=MOVED,
    moved_members={"needs_model": "needs_device"},
    streams=(
        Source(_STORY, "cg-gen-worker"),
        Source(_MEMORY, "cg-mem-writer"),
        Source(_AUDIT, "cg-archiver"),
    ),
    stream_of_type={
        "embedding_batch": _STORY,
        "index_rebuild": _STORY,
        "summary_write_back": _MEMORY,
        "memory_update": _MEMORY,
        "entity_upsert": _MEMORY,
        "vectors_delete": _MEMORY,
        "audit": _AUDIT,
    },
    settings="jobworker.handlers.settings:HandlerSettings",
    options="jobworker.handlers.options",
    embedded=("jobworker.handlers.vectors.milvus.embedded:EmbeddedMilvus",),
    endpoints=("milvus_uri",),
    progress="jobworker.handlers.rebuild.progress:read_progress",
    doctor="jobworker.handlers.doctor",
    verbs=(
        "jobworker.handlers.erasure.verbs:add_to",
        "jobworker.handlers.api.verbs:add_to",
        "jobworker.handlers.book.verbs:add_to",
    ),
    pages=("jobworker.handlers.api.page:search_page",),
    copy_size="jobworker.handlers.copy_size:copy_size",
    copied="the model",
    copies_option="--model-copies",
    needs=dict.fromkeys(NEEDS_VECTORS, ("numpy", "pymilvus", "sentence_transformers", "torch")),
    extra="embedding",
    api="jobworker.handlers.api.role:run",
    api_needs=("numpy", "sentence_transformers", "starlette", "torch", "uvicorn"),
    packages=("torch", "sentence-transformers", "pymilvus", "milvus-lite"),
    metrics={
        "z_novel_embedded_tokens_total": Metric("counter", "Model tokens that were embedded"),
        "z_novel_truncated_tokens_total": Metric(
            "counter", "Model tokens that were cut off and not embedded"
        ),
        "z_novel_embedding_cache_hits_total": Metric("counter", "Texts whose vectors were known"),
        "z_novel_embedding_cache_misses_total": Metric("counter", "Texts whose vectors were not known"),
        "z_novel_forward_seconds_total": Metric("counter", "Time of all workers in forward passes"),
        "z_novel_summaries_stored_total": Metric("counter", "Summaries that were stored"),
        "z_novel_summaries_outdated_total": Metric("counter", "Summaries that a newer version had overtaken"),
        "z_novel_llm_requests_total": Metric("counter", "Requests to the language model"),
        "z_novel_llm_retries_total": Metric("counter", "Requests that were sent once more after a failure"),
        "z_novel_llm_repairs_total": Metric(
            "counter", "Answers that were no answer and were asked for again"
        ),
        "z_novel_scopes_erased_total": Metric("counter", "Deletions that were done"),
        "z_novel_erased_rows_total": Metric("counter", "Rows that deletions removed"),
        "z_novel_audit_entries_total": Metric("counter", "Events that were archived"),
        "z_novel_audit_duplicates_total": Metric("counter", "Events that the archive had already"),
        "z_novel_rebuilds_done_total": Metric("counter", "Collections that were rebuilt"),
        "z_novel_rebuilt_rows_total": Metric("counter", "Rows of rebuilt collections"),
    },
)
