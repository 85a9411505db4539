"""Factory of the vector store that the settings name."""

from ..settings import HandlerSettings
from .ports import VectorStore


def open_store(settings: HandlerSettings) -> VectorStore:
    """The vector store of the service; it connects at its first call."""
    # Imported here: a handler that is given a store does not load pymilvus.
    from .milvus.store import open_vectors

    return open_vectors(
        settings.milvus_uri,
        token=settings.milvus_token or None,
        prefix=settings.milvus_prefix,
        partitions="named" if settings.milvus_partitions == "named" else "key",
    )
