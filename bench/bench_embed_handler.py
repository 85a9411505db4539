"""Handler of the GPU benchmark: Milvus Lite takes fewer rows a second than a fast GPU computes."""

from jobworker.handlers.embedding.handler import EmbeddingBatch
from jobworker.handlers.vectors.memory import MemoryVectors


class EmbedWithoutStore(EmbeddingBatch):
    """`embedding_batch` with a store that keeps the rows of its process in memory."""

    def __init__(self) -> None:
        super().__init__(store=MemoryVectors())
