"""`embedding_batch` without a model, for services of process tests."""

from jobworker.handlers.embedding.handler import EmbeddingBatch
from jobworker.handlers.encoder.base import DummyEncoder
from jobworker.handlers.vectors.memory import MemoryVectors

DIM = 8


class Embedding(EmbeddingBatch):
    """The real handler with the dummy encoder; in small batches, so that a kill hits between two of them."""

    max_batch = 8

    def __init__(self) -> None:
        super().__init__(DummyEncoder(DIM))


class Forgetful(EmbeddingBatch):
    """The real handler with a store in memory, whose rows are lost with its process."""

    def __init__(self) -> None:
        super().__init__(DummyEncoder(DIM), MemoryVectors())
