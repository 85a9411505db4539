"""Plans of requests are joined into passes and divided again without a change of the vectors."""

import asyncio

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobworker.handlers.api.batcher import Batcher, divide, merge
from jobworker.handlers.api.errors import ApiError
from jobworker.handlers.encoder.base import DummyEncoder

TEXTS = st.lists(st.text("ab. ", max_size=40), min_size=1, max_size=12)


@given(TEXTS, st.integers(1, 60))
def test_parts_hold_every_text_once_and_in_order(texts: list[str], tokens: int) -> None:
    encoder = DummyEncoder(4, max_tokens=10)
    plan = encoder.tokenize(texts)
    parts = list(divide(plan, tokens))
    assert merge(parts) == plan
    assert all(part.texts == 1 or sum(map(len, part.windows)) <= tokens for part in parts)
    together = np.concatenate([encoder.forward(part) for part in parts])
    assert np.array_equal(together, encoder.forward(plan))


@given(st.lists(TEXTS, min_size=1, max_size=5))
def test_a_joined_plan_gives_the_vectors_of_its_parts(requests: list[list[str]]) -> None:
    encoder = DummyEncoder(4, max_tokens=10)
    plans = [encoder.tokenize(texts) for texts in requests]
    alone = np.concatenate([encoder.forward(plan) for plan in plans])
    assert np.array_equal(encoder.forward(merge(plans)), alone)


def test_a_model_that_is_replaced_answers_what_it_admitted_and_refuses_the_rest() -> None:
    async def scenario() -> None:
        batcher = Batcher(DummyEncoder(4), on_batch=lambda requests, tokens: None)
        admitted = [asyncio.create_task(batcher.embed([f"text {n}"], "query")) for n in range(5)]
        await asyncio.sleep(0)  # each task has begun
        batcher.close()
        assert [len((await one).vectors) for one in admitted] == [1] * 5
        for text in ("short", "long " * 10_000):
            with pytest.raises(ApiError, match="replaced") as refused:
                await asyncio.wait_for(batcher.embed([text], "query"), 10)
            assert refused.value.status == 503

    asyncio.run(scenario())
