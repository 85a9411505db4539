"""`embedding_batch` without a model, for services of process tests."""

from jobworker.handlers.embedding.handler import EmbeddingBatch
from jobworker.handlers.encoder.base import DummyEncoder
from jobworker.handlers.vectors.memory import MemoryVectors

DIM = 8


class Embedding(EmbeddingBatch):
    """The real handler, vectors by the text alone; in small batches, so that a kill parts them."""

    max_batch = 8

    def __init__(self) -> None:
        super().__init__(DummyEncoder(DIM))


class Forgetful(EmbeddingBatch):
    """The real handler, whose rows are gone with its process."""

    def __init__(self) -> None:
        super().__init__(DummyEncoder(DIM), MemoryVectors())
