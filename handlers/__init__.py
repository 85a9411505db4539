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
    }
)
