"""Factory of the vector store that the settings name, and the sparse vectors that they want."""

from collections.abc import Sequence

from ..settings import HandlerSettings
from ..sparse_vector import SparseVector
from .ports import AnyRow, SparseKind, VectorStore


def wanted_sparse(settings: HandlerSettings, *, of_model: bool) -> SparseKind:
    """Sparse vectors of new collections: those of the model if it gives them, else the store's BM25."""
    if settings.sparse == "off":
        return "none"
    return "model" if of_model else "bm25"


def with_sparse(rows: Sequence[AnyRow], sparse: Sequence[SparseVector]) -> list[AnyRow]:
    """The rows with a sparse vector each; `sparse` is empty if there are none."""
    if not sparse:
        return list(rows)
    return [row._replace(sparse=one) for row, one in zip(rows, sparse, strict=True)]


def open_store(settings: HandlerSettings) -> VectorStore:
    """The vector store of the service; it connects at its first call."""
    # Imported here: a handler that is given a store does not load pymilvus.
    from .milvus.store import open_vectors

    return open_vectors(
        settings.milvus_uri,
        token=settings.milvus_token or None,
        prefix=settings.milvus_prefix,
        partitions="named" if settings.milvus_partitions == "named" else "key",
        sparse_on_lite=settings.sparse == "on",
    )
