"""A long text is cut at pauses of a reader, and no grapheme cluster is split."""

import pytest
import regex
from hypothesis import example, given
from hypothesis import strategies as st

from jobworker.handlers.encoder.segmenter import Offsets, cut
from support.graphemes import GRAPHEMES

CHINESE = "宝玉看罢，因笑道：“这个妹妹我曾见过的。”贾母笑道：“可又是胡说！你何曾见过她？”宝玉笑道……"
TEXTS = st.one_of(st.lists(st.sampled_from(GRAPHEMES), max_size=80).map("".join), st.text(max_size=80))


def one_each(text: str) -> Offsets:
    """Offsets of a tokenizer with one token a character."""
    return [(place, place + 1) for place in range(len(text))]


def pieces(text: str, limit: int, offsets: Offsets | None = None) -> list[str]:
    found = offsets if offsets is not None else one_each(text)
    return [text[found[start][0] : found[stop - 1][1]] for start, stop in cut(text, found, limit)]


@st.composite
def tokenised(draw: st.DrawFn) -> tuple[str, Offsets]:
    """A text and tokens of it: some characters dropped, some joined, some in several tokens."""
    text = draw(TEXTS)
    offsets: list[tuple[int, int]] = []
    place = 0
    while place < len(text):
        length = draw(st.integers(1, 3))
        kind = draw(st.sampled_from(["whole", "dropped", "bytes"]))
        span = (place, min(len(text), place + (1 if kind == "bytes" else length)))
        offsets += [span] * {"whole": 1, "dropped": 0, "bytes": 3}[kind]
        place = span[1]
    return text, offsets


@given(tokenised(), st.integers(1, 20))
def test_windows_cover_every_token_in_order_within_the_limit(case: tuple[str, Offsets], limit: int) -> None:
    windows = cut(*case, limit)
    assert [token for start, stop in windows for token in range(start, stop)] == list(range(len(case[1])))
    assert all(0 < stop - start <= limit for start, stop in windows) or not case[1]


@given(tokenised())
def test_no_character_is_torn_while_it_fits(case: tuple[str, Offsets]) -> None:
    text, offsets = case
    for start, _ in cut(text, offsets, 3)[1:]:
        assert offsets[start - 1][1] <= offsets[start][0]


@given(TEXTS)
@example("🇨🇳🇨🇳🇨🇳" * 4)
@example("各\u1100\u1161\u11a8" * 5)
def test_no_grapheme_is_torn_while_it_fits(text: str) -> None:
    longest = max(map(len, regex.findall(r"\X", text)), default=1)
    ends = {match.end() for match in regex.finditer(r"\X", text)}
    # Twice as long, because joined flags and consonants are held together beyond what Unicode asks.
    for start, _ in cut(text, one_each(text), 2 * longest + 40)[1:]:
        assert start in ends


def test_chinese_is_cut_after_marks_with_their_closing_quotes() -> None:
    assert pieces(CHINESE, 25) == [
        "宝玉看罢，因笑道：“这个妹妹我曾见过的。”",
        "贾母笑道：“可又是胡说！你何曾见过她？”",
        "宝玉笑道……",
    ]


def test_the_last_end_that_fits_is_taken() -> None:
    assert pieces("一。二。三。四。五。", 5) == ["一。二。", "三。四。", "五。"]


@pytest.mark.parametrize(
    ("text", "limit", "wanted"),
    [
        ("He paid 3.14 at shop.com today. She left.", 34, ["He paid 3.14 at shop.com today.", " She left."]),
        ("“Go!” he said. Then no", 16, ["“Go!” he said.", " Then no"]),
        ("第一段没有句号\n第二段也没有\n\n第三段", 9, ["第一段没有句号\n", "第二段也没有\n\n", "第三段"]),
        ("no mark here, only a comma and words", 20, ["no mark here, only ", "a comma and words"]),
        ("一二三四五六七八九十", 4, ["一二三四", "五六七八", "九十"]),
        ("他说「走吧……」然后", 8, ["他说「走吧……」", "然后"]),
    ],
)
def test_where_a_text_is_cut(text: str, limit: int, wanted: list[str]) -> None:
    assert pieces(text, limit) == wanted


def test_newlines_that_a_tokenizer_drops_still_end_a_paragraph() -> None:
    text = "甲乙丙\n丁戊己"
    offsets = [(0, 1), (1, 2), (2, 3), (4, 5), (5, 6), (6, 7)]
    assert cut(text, offsets, 5) == [(0, 3), (3, 6)]


def test_a_text_that_fits_is_one_window() -> None:
    assert cut("一。二。", one_each("一。二。"), 4) == [(0, 4)]
    assert cut("", [], 4) == [(0, 0)]


def test_a_grapheme_longer_than_the_window_is_cut_between_characters() -> None:
    assert cut("e" + "\u0301" * 9, one_each("e" + "\u0301" * 9), 4) == [(0, 4), (4, 8), (8, 10)]


def test_a_window_must_hold_something() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        cut("a", [(0, 1)], 0)
