"""Summaries out of a chapter's own sentences: short enough, in order, whole, varied and always the same."""

from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobworker.handlers.encoder.base import DummyEncoder
from jobworker.handlers.summaries.extract import Sentence, choose, join, sentences, shorten

TEXTS = st.lists(
    st.sampled_from(
        ["风雪夜归人，他推开门愣住了。", "“走吧。”她说。", "He closed the old door behind him. ", "No! ",
         "甲。", "The road below the inn was gone by the morning. ", "\n", "“未完的话",
         "3.14 is a number. ", "……"]
    ),
    max_size=30,
).map("".join)  # fmt: skip


def split(text: str) -> list[str]:
    return [sentence.text for sentence in sentences(text)]


def told(*texts: str) -> list[Sentence]:
    return [Sentence(text, True) for text in texts]


def test_chinese_and_western_sentences_are_found() -> None:
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
    def letters(text: str) -> str:
        return "".join(char for char in text if char.isalnum())

    assert letters("".join(split(text))) == letters(text)


@given(TEXTS, st.integers(1, 120))
def test_a_summary_is_short_in_order_and_always_the_same(text: str, limit: int) -> None:
    whole = sentences(text)
    found = [sentence.text for sentence in whole]
    if not found:
        return
    vectors = DummyEncoder(8).encode(found)
    summary = choose(whole, vectors, limit)
    assert 0 < len(summary) <= limit
    assert summary == choose(whole, vectors, limit)
    if not summary.endswith("…") and any(len(sentence) <= limit for sentence in found):
        assert made_of(summary, found) or summary in "".join(found)


def made_of(summary: str, found: list[str]) -> bool:
    """Whether it is some of the sentences, in their order. One may be the beginning of another."""

    @cache
    def fits(rest: str, first: int) -> bool:
        rest = rest.lstrip()
        return not rest or any(
            rest.startswith(found[i]) and fits(rest[len(found[i]) :], i + 1) for i in range(first, len(found))
        )

    return fits(summary, 0)


def test_it_is_the_central_sentences_and_no_two_alike() -> None:
    found = [f"{name}这一句话说的是同一件事情。" for name in "甲乙丙丁"] + ["另外还有一件不同的事情发生了。"]
    vectors = np.array([[1, 0.1, 0], [1, 0.1, 0.01], [1, 0.1, 0.02], [1, 0.12, 0], [0.3, 1, 0]], np.float32)
    summary = choose(told(*found), vectors, 32)
    assert summary.endswith(found[4]), "a second sentence that says the same adds nothing"
    assert summary.startswith(tuple(found[:4]))


def test_a_sentence_that_says_nothing_is_not_chosen() -> None:
    found = ["好。", "他把雪地里捡来的信交给了掌柜。"]
    assert choose(told(*found), np.array([[1, 0], [0, 1]], np.float32), 100) == found[1]
    assert choose(told("好。", "是。"), np.array([[1, 0], [0, 1]], np.float32), 100) == "好。是。"


def test_sentences_that_stand_twice_are_told_once() -> None:
    found = ["雪一直下到了天亮才停下来。"] * 3
    assert choose(told(*found), np.ones((3, 2), np.float32), 100) == found[0]


def test_where_no_sentence_fits_the_best_one_is_cut() -> None:
    sentence = "他推开那扇很久没有人推过的门，愣住了，手里的灯落在雪地上，灭了。"
    assert choose(told(sentence), np.ones((1, 2), np.float32), 22) == "他推开那扇很久没有人推过的门，愣住了…"
    assert choose(told(sentence), np.ones((1, 2), np.float32), 5) == "他推开那…"
    assert choose(told(sentence), np.ones((1, 2), np.float32), 1) == "他"


def test_a_sentence_is_whole_outside_quotations_and_with_its_end() -> None:
    text = (
        "她说：“你来了。"
        + "我等了你一夜。" * 20
        + "坐吧。”他坐下了。按那石上书云：\n第一行诗\n— —你道为何？他走了。"
    )
    text += "It’s late. “Not yet.” He left (as always)."
    whole = [sentence.text for sentence in sentences(text) if sentence.whole]
    assert whole == ["他坐下了。", "他走了。", "It’s late.", "“Not yet.”", "He left (as always)."]


def test_what_is_told_goes_before_what_is_said() -> None:
    said = ["她笑着问道：“你昨天夜里到底去了什么地方？”", "这一件事情你们难道从来没有听人说过么？"]
    tells = "他把雪地里捡来的信交给了客栈的老掌柜。"
    found = sentences("".join([said[0], tells, said[1]]))
    vectors = np.array([[1, 0.1], [0.1, 1], [1, 0]], np.float32)
    assert choose(found, vectors, 38) == tells
    assert choose(found, vectors, 46) == said[0] + tells, "too little is told for so long a summary"


def test_zero_vectors_are_no_trouble() -> None:
    assert choose(told("第一句话在这里说完了。", "第二句话在这里说完了。"), np.zeros((2, 3), np.float32), 11)


def test_nothing_to_summarise_is_an_error() -> None:
    assert sentences(" \n……—— ") == []
    with pytest.raises(ValueError, match="no sentence"):
        choose([], np.zeros((0, 3), np.float32), 100)


def test_blanks_stand_between_western_sentences_only() -> None:
    assert join(["He left.", "She stayed.", "他走了。", "她没走。"]) == "He left. She stayed.他走了。她没走。"


@given(st.text(min_size=1, max_size=200), st.integers(1, 60))
def test_shortened_is_short_and_a_beginning(text: str, limit: int) -> None:
    short = shorten(text, limit)
    assert len(short) <= limit
    assert text.strip().startswith(short.removesuffix("…"))
