"""The builtin handlers as strings: importing this costs nothing."""

_WRITE_BACK = "jobworker.handlers.writeback:WriteBack"

#: Type -> where its handler is.
BUILTIN = {
    "embedding_batch": "jobworker.handlers.embed:EmbeddingBatch",
    "index_rebuild": "jobworker.handlers.reindex:IndexRebuild",
    "summary_write_back": _WRITE_BACK,
    "memory_update": _WRITE_BACK,
    "audit": "jobworker.handlers.archive:Archive",
}

#: Handlers that need a vector store.
NEEDS_VECTORS = frozenset(
    {"jobworker.handlers.embed:EmbeddingBatch", "jobworker.handlers.reindex:IndexRebuild", _WRITE_BACK}
)
