"""The builtin handlers as strings: importing this costs nothing."""

_WRITE_BACK = "jobworker.handlers.summaries.handler:WriteBack"

#: Type -> where its handler is.
BUILTIN = {
    "embedding_batch": "jobworker.handlers.embedding.handler:EmbeddingBatch",
    "index_rebuild": "jobworker.handlers.rebuild.handler:IndexRebuild",
    "summary_write_back": _WRITE_BACK,
    "memory_update": _WRITE_BACK,
    "audit": "jobworker.handlers.audit.handler:Archive",
}

#: Handlers that need a vector store.
NEEDS_VECTORS = frozenset(
    {
        "jobworker.handlers.embedding.handler:EmbeddingBatch",
        "jobworker.handlers.rebuild.handler:IndexRebuild",
        _WRITE_BACK,
    }
)
