"""`embedding_batch` without a model, for services of process tests."""

import time

from jobworker.handlers.embedding.handler import EmbeddingBatch
from jobworker.handlers.encoder.base import DummyEncoder, Plan, Vectors
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


class SlowEncoder(DummyEncoder):
    """Takes 10 ms a text."""

    def forward(self, plan: Plan) -> Vectors:
        time.sleep(0.01 * plan.texts)  # the work of a model on a slow processor
        return super().forward(plan)


class Slow(EmbeddingBatch):
    """The real handler with a slow model and a timeout that is short against a large job."""

    timeout = batch_timeout = 2.0

    def __init__(self) -> None:
        super().__init__(SlowEncoder(DIM), MemoryVectors())
