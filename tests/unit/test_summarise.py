"""Summaries out of a chapter's own sentences: short enough, in order, whole, varied and always the same."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobworker.handlers.encoder import DummyEncoder
from jobworker.handlers.summarise import choose, join, sentences, shorten

TEXTS = st.lists(
    st.sampled_from(
        ["风雪夜归人，他推开门愣住了。", "“走吧。”她说。", "He closed the old door behind him. ", "No! ",
         "甲。", "The road below the inn was gone by the morning. ", "\n", "“未完的话",
         "3.14 is a number. ", "……"]
    ),
    max_size=30,
).map("".join)  # fmt: skip


def test_chinese_and_western_sentences_are_found() -> None:
    text = "他来了。她问：“谁？是你吗？”“是我。”\n第二段！"
    text += "Tom came at 3.14 p.m. and left. Mr. Smith stayed (he said. Really.) there."
    assert sentences(text) == [
        "他来了。",
        "她问：“谁？是你吗？”",
        "“是我。”",
        "第二段！",
        "Tom came at 3.14 p.m. and left.",
        "Mr. Smith stayed (he said. Really.) there.",
    ]


def test_an_open_quotation_does_not_swallow_the_chapter() -> None:
    text = "“他说。" + "这一句没有引号在后面。" * 40
    assert max(map(len, sentences(text))) < 140
    assert "".join(sentences(text)) == text


@given(st.text(max_size=300) | TEXTS)
def test_no_word_is_lost_between_sentences(text: str) -> None:
    def letters(text: str) -> str:
        return "".join(char for char in text if char.isalnum())

    assert letters("".join(sentences(text))) == letters(text)


@given(TEXTS, st.integers(1, 120))
def test_a_summary_is_short_in_order_and_always_the_same(text: str, limit: int) -> None:
    found = sentences(text)
    if not found:
        return
    vectors = DummyEncoder(8).encode(found)
    summary = choose(found, vectors, limit)
    assert 0 < len(summary) <= limit
    assert summary == choose(found, vectors, limit)
    if not summary.endswith("…") and any(len(sentence) <= limit for sentence in found):
        place = 0
        while place < len(summary):
            sentence = next((s for s in found if summary[place:].lstrip().startswith(s)), None)
            if sentence is None:
                assert summary in "".join(found)
                break
            place = summary.index(sentence, place) + len(sentence)


def test_it_is_the_central_sentences_and_no_two_alike() -> None:
    found = [f"{name}这一句话说的是同一件事情。" for name in "甲乙丙丁"] + ["另外还有一件不同的事情发生了。"]
    vectors = np.array([[1, 0.1, 0], [1, 0.1, 0.01], [1, 0.1, 0.02], [1, 0.12, 0], [0.3, 1, 0]], np.float32)
    summary = choose(found, vectors, 32)
    assert summary.endswith(found[4]), "a second sentence that says the same adds nothing"
    assert summary.startswith(tuple(found[:4]))


def test_a_sentence_that_says_nothing_is_not_chosen() -> None:
    found = ["好。", "他把雪地里捡来的信交给了掌柜。"]
    assert choose(found, np.array([[1, 0], [0, 1]], np.float32), 100) == found[1]
    assert choose(["好。", "是。"], np.array([[1, 0], [0, 1]], np.float32), 100) == "好。是。"


def test_sentences_that_stand_twice_are_told_once() -> None:
    found = ["雪一直下到了天亮才停下来。"] * 3
    assert choose(found, np.ones((3, 2), np.float32), 100) == found[0]


def test_where_no_sentence_fits_the_best_one_is_cut() -> None:
    sentence = "他推开那扇很久没有人推过的门，愣住了，手里的灯落在雪地上，灭了。"
    assert choose([sentence], np.ones((1, 2), np.float32), 22) == "他推开那扇很久没有人推过的门，愣住了…"
    assert choose([sentence], np.ones((1, 2), np.float32), 5) == "他推开那…"
    assert choose([sentence], np.ones((1, 2), np.float32), 1) == "他"


def test_zero_vectors_are_no_trouble() -> None:
    assert choose(["第一句话在这里说完了。", "第二句话在这里说完了。"], np.zeros((2, 3), np.float32), 11)


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
