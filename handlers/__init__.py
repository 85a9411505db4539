"""The builtin handlers as strings: importing this costs nothing."""

#: Type -> where its handler is.
BUILTIN = {
    "embedding_batch": "jobworker.handlers.embed:EmbeddingBatch",
    "index_rebuild": "jobworker.handlers.reindex:IndexRebuild",
    "audit": "jobworker.handlers.archive:Archive",
}

#: Handlers that need a vector store.
NEEDS_VECTORS = frozenset(
    {"jobworker.handlers.embed:EmbeddingBatch", "jobworker.handlers.reindex:IndexRebuild"}
)
