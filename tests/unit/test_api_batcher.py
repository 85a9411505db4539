"""Plans of requests are joined into passes and divided again without a change of the vectors."""

import asyncio
import threading
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobworker.handlers.api.batcher import BYTES_PER_TOKEN, INLINE_CHARS, Batcher, divide, merge
from jobworker.handlers.api.errors import ApiError
from jobworker.handlers.encoder.base import DummyEncoder, Plan, Purpose
from support.service import SOON_S

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


class SlowTokenizer(DummyEncoder):
    """Long texts wait for the gate; counts the calls, and those at once."""

    def __init__(self) -> None:
        super().__init__(4)
        self.gate, self.calls, self.now, self.most = threading.Event(), 0, 0, 0

    def tokenize(self, texts: Sequence[str], purpose: Purpose = "document") -> Plan:
        self.calls, self.now = self.calls + 1, self.now + 1
        self.most = max(self.most, self.now)
        if len(texts[0]) > INLINE_CHARS:
            assert self.gate.wait(SOON_S)
        self.now -= 1
        return super().tokenize(texts, purpose)


def test_the_tokenizer_of_a_request_beyond_its_deadline_runs_alone() -> None:
    async def scenario() -> None:
        encoder = SlowTokenizer()
        batcher = Batcher(encoder)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(batcher.embed(["x" * (INLINE_CHARS + 1)], "query"), 0.05)
        next_one = asyncio.create_task(batcher.embed(["small"], "query"))
        await asyncio.sleep(0)  # it has begun
        encoder.gate.set()
        assert len((await next_one).vectors) == 1
        assert (encoder.calls, encoder.most, batcher.waiting_tokens) == (2, 1, 0)
        batcher.close()

    asyncio.run(asyncio.wait_for(scenario(), SOON_S))


def test_texts_that_have_too_many_tokens_by_their_length_are_not_tokenised() -> None:
    async def scenario() -> None:
        encoder = SlowTokenizer()
        batcher = Batcher(encoder)
        longest = "长" * (batcher.max_tokens * BYTES_PER_TOKEN // 3 + 1)
        with pytest.raises(ApiError, match="bytes") as refused:
            await batcher.embed([longest], "document")
        assert (refused.value.status, encoder.calls) == (413, 0)
        half = asyncio.create_task(batcher.embed([longest[: len(longest) // 2 + 9]], "document"))
        await asyncio.sleep(0)
        with pytest.raises(ApiError) as busy:
            await batcher.embed([longest[: len(longest) // 2 + 9]], "document")
        assert busy.value.status == 429
        encoder.gate.set()
        with pytest.raises(ApiError, match="tokens"):
            await half
        assert batcher.waiting_tokens == 0
        batcher.close()

    asyncio.run(asyncio.wait_for(scenario(), SOON_S))
