"""Extractive summaries: within the limit, complete sentences in order, varied and reproducible."""

from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

from jobworker.handlers.encoder.base import DummyEncoder
from jobworker.handlers.summaries import extract
from jobworker.handlers.summaries.extract import (
    Sentence,
    join_sentences,
    select_sentences,
    shorten,
    split_sentences,
)

TEXTS = st.lists(
    st.sampled_from(
        ["风雪夜归人，他推开门愣住了。", "“走吧。”她说。", "He closed the old door behind him. ", "No! ",
         "甲。", "The road below the inn was gone by the morning. ", "\n", "“未完的话",
         "3.14 is a number. ", "……"]
    ),
    max_size=30,
).map("".join)  # fmt: skip


def split(text: str) -> list[str]:
    return [sentence.text for sentence in split_sentences(text)]


def letters(text: str) -> str:
    return "".join(char for char in text if char.isalnum())


def complete(*texts: str) -> list[Sentence]:
    return [Sentence(text, True) for text in texts]


def test_chinese_and_western_sentences_are_split() -> None:
    text = "他来了。她问：“谁？是你吗？”“是我。”\n第二段！"
    text += "Tom came at 3.14 p.m. and left. Mr. Smith stayed (he said. Really.) there."
    assert split(text) == [
        "他来了。",
        "她问：“谁？是你吗？”",
        "“是我。”",
        "第二段！",
        "Tom came at 3.14 p.m. and left.",
        "Mr. Smith stayed (he said. Really.) there.",
    ]


def test_an_open_quotation_does_not_swallow_the_chapter() -> None:
    text = "“他说。" + "这一句没有引号在后面。" * 40
    assert max(map(len, split(text))) < 140
    assert "".join(split(text)) == text


@given(st.text(max_size=300) | TEXTS)
def test_no_word_is_lost_between_sentences(text: str) -> None:
    assert letters("".join(split(text))) == letters(text)


@given(TEXTS, st.integers(1, 120))
def test_a_summary_fits_the_limit_keeps_the_order_and_is_reproducible(text: str, limit: int) -> None:
    sentences = split_sentences(text)
    texts = [sentence.text for sentence in sentences]
    if not texts:
        return
    vectors = DummyEncoder(8).encode(texts)
    summary = select_sentences(sentences, vectors, limit)
    assert 0 < len(summary) <= limit
    assert summary == select_sentences(sentences, vectors, limit)
    if not summary.endswith("…") and any(len(sentence) <= limit for sentence in texts):
        assert made_of(summary, texts) or summary in "".join(texts)


def made_of(summary: str, texts: list[str]) -> bool:
    """Whether it consists of some of the sentences, in order; one may be a prefix of another."""

    @cache
    def fits(rest: str, first: int) -> bool:
        rest = rest.lstrip()
        return not rest or any(
            rest.startswith(texts[i]) and fits(rest[len(texts[i]) :], i + 1) for i in range(first, len(texts))
        )

    return fits(summary, 0)


def test_central_sentences_are_selected_without_near_duplicates() -> None:
    found = [f"{name}这一句话说的是同一件事情。" for name in "甲乙丙丁"] + ["另外还有一件不同的事情发生了。"]
    vectors = np.array([[1, 0.1, 0], [1, 0.1, 0.01], [1, 0.1, 0.02], [1, 0.12, 0], [0.3, 1, 0]], np.float32)
    summary = select_sentences(complete(*found), vectors, 32)
    assert summary.endswith(found[4]), "a second sentence that says the same adds nothing"
    assert summary.startswith(tuple(found[:4]))


def test_a_sentence_without_content_is_not_selected() -> None:
    found = ["好。", "他把雪地里捡来的信交给了掌柜。"]
    assert select_sentences(complete(*found), np.array([[1, 0], [0, 1]], np.float32), 100) == found[1]
    assert (
        select_sentences(complete("好。", "是。"), np.array([[1, 0], [0, 1]], np.float32), 100) == "好。是。"
    )


def test_a_repeated_sentence_is_selected_once() -> None:
    found = ["雪一直下到了天亮才停下来。"] * 3
    assert select_sentences(complete(*found), np.ones((3, 2), np.float32), 100) == found[0]


def test_the_most_central_sentence_is_shortened_if_none_fits() -> None:
    sentence = "他推开那扇很久没有人推过的门，愣住了，手里的灯落在雪地上，灭了。"
    assert (
        select_sentences(complete(sentence), np.ones((1, 2), np.float32), 22)
        == "他推开那扇很久没有人推过的门，愣住了…"
    )
    assert select_sentences(complete(sentence), np.ones((1, 2), np.float32), 5) == "他推开那…"
    assert select_sentences(complete(sentence), np.ones((1, 2), np.float32), 1) == "他"


def test_a_complete_sentence_has_an_end_and_is_outside_quotations() -> None:
    text = (
        "她说：“你来了。"
        + "我等了你一夜。" * 20
        + "坐吧。”他坐下了。按那石上书云：\n第一行诗\n— —你道为何？他走了。"
    )
    text += "It’s late. “Not yet.” He left (as always)."
    whole = [sentence.text for sentence in split_sentences(text) if sentence.complete]
    assert whole == ["他坐下了。", "他走了。", "It’s late.", "“Not yet.”", "He left (as always)."]


def test_narration_is_preferred_to_dialogue() -> None:
    dialogue = ["她笑着问道：“你昨天夜里到底去了什么地方？”", "这一件事情你们难道从来没有听人说过么？"]
    narration = "他把雪地里捡来的信交给了客栈的老掌柜。"
    found = split_sentences("".join([dialogue[0], narration, dialogue[1]]))
    vectors = np.array([[1, 0.1], [0.1, 1], [1, 0]], np.float32)
    assert select_sentences(found, vectors, 38) == narration
    assert select_sentences(found, vectors, 46) == dialogue[0] + narration, "narration fills less than half"


def test_zero_vectors_still_give_a_summary() -> None:
    assert select_sentences(
        complete("第一句话在这里说完了。", "第二句话在这里说完了。"), np.zeros((2, 3), np.float32), 11
    )


def test_a_text_without_sentences_is_an_error() -> None:
    assert split_sentences(" \n……—— ") == []
    with pytest.raises(ValueError, match="no sentence"):
        select_sentences([], np.zeros((0, 3), np.float32), 100)


def test_only_western_sentences_are_joined_with_a_space() -> None:
    assert (
        join_sentences(["He left.", "She stayed.", "他走了。", "她没走。"])
        == "He left. She stayed.他走了。她没走。"
    )


@given(st.text(min_size=1, max_size=200), st.integers(1, 60))
def test_a_shortened_text_fits_and_is_a_prefix(text: str, limit: int) -> None:
    short = shorten(text, limit)
    assert len(short) <= limit
    assert text.strip().startswith(short.removesuffix("…"))


EMOJI = "👨\u200d👩\u200d👧\u200d👦"


@pytest.mark.parametrize("grapheme", [EMOJI, "🇨🇳", "👍🏽", "e\u0301\u0323", "!\ufe0f", "각"])
@pytest.mark.parametrize("before", ["", "雪", "He left. ", "雪一直下，"])
def test_a_cut_tears_no_grapheme(grapheme: str, before: str) -> None:
    text = before + grapheme * 40
    ends = {match.end() for match in regex.finditer(r"\X", text)} | {0}
    for limit in range(1, 60):
        short = shorten(text, limit)
        assert 0 < len(short) <= limit
        assert len(short.removesuffix("…")) in ends
        summary = select_sentences(complete(text), np.ones((1, 2), np.float32), limit)
        assert len(summary.removesuffix("…")) in ends


@given(
    st.lists(st.sampled_from(["!\ufe0f", "。", EMOJI, "🇨🇳", "e\u0301", "a", " ", "，", "…\u200d"])).map(
        "".join
    )
)
def test_sentences_end_between_graphemes(text: str) -> None:
    whole = regex.findall(r"\X", text)
    for sentence in split(text):
        assert all(one in whole for one in regex.findall(r"\X", sentence))


@pytest.mark.parametrize(
    "unit", ["雪", "snow ", "雪一直下，", EMOJI, "a", "🇨🇳", "e\u0301", "Mr. ", "“", "雪\u0301\u0301"]
)
def test_a_text_without_a_sentence_mark_is_divided(unit: str) -> None:
    text = (unit * 3000)[:3000].strip() + "雪"
    parts = split(text)
    assert max(map(len, parts)) <= 500
    assert len(parts) <= 3001 / 500 * 2 + 1
    assert letters("".join(parts)) == letters(text)
    assert not any(sentence.complete for sentence in split_sentences(text))


def test_selecting_compares_each_sentence_a_few_times_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many sentences most do not fit: each is tried once, not once for each other."""
    real, tried = extract._fits, []

    def counted(texts: Sequence[str], indexes: Sequence[int], limit_chars: int) -> bool:
        tried.append(indexes)
        return real(texts, indexes, limit_chars)

    monkeypatch.setattr(extract, "_fits", counted)
    found = [f"第{number}句话说的是另外一件事情。" for number in range(500)]
    vectors = DummyEncoder(8).encode(found)
    assert len(select_sentences(complete(*found), vectors, 100)) <= 100
    assert len(tried) <= len(found)
