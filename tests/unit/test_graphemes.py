"""A character that a reader perceives is never torn, and finding its end takes linear time."""

import pytest
import regex
from hypothesis import example, given
from hypothesis import strategies as st

from jobworker.handlers import graphemes
from jobworker.handlers.encoder.segmenter import cut
from jobworker.handlers.graphemes import Graphemes
from jobworker.handlers.vectors.schema import TEXT_LIMIT_BYTES, clip
from support.graphemes import GRAPHEMES

TEXTS = st.lists(st.sampled_from(GRAPHEMES), max_size=30).map("".join)


def ends(text: str) -> set[int]:
    return {0, *(match.end() for match in regex.finditer(r"\X", text))}


@given(TEXTS, st.randoms(use_true_random=False))
@example("🇨🇳🇨🇳🇨🇳a🇨🇳🇨", None)
def test_a_boundary_is_never_inside_a_grapheme(text: str, order: object) -> None:
    """Whatever was asked before."""
    positions = list(range(len(text) + 1))
    if order is not None:
        order.shuffle(positions)  # type: ignore[attr-defined]
    one = Graphemes(text)
    found = {position for position in positions if one.is_boundary(position)}
    assert found <= ends(text)
    assert found == {position for position in positions if Graphemes(text).is_boundary(position)}


def test_the_halves_of_a_surrogate_pair_stay_together() -> None:
    assert not Graphemes("a\ud83d\ude00b").is_boundary(2)


@given(TEXTS | st.text(max_size=40), st.integers(0, 120))
def test_a_clipped_text_ends_with_a_whole_grapheme(text: str, limit: int) -> None:
    kept = clip(text, limit)
    assert text.startswith(kept)
    assert len(kept.encode()) <= limit
    if kept != text:
        fitting = [at for at in range(1, len(text)) if len(text[:at].encode()) <= limit]
        boundaries = [at for at in fitting if Graphemes(text).is_boundary(at)]
        assert len(kept) == max(boundaries or fitting, default=0)


@pytest.mark.parametrize("grapheme", ["👨‍👩‍👧", "🇨🇳", "👍🏽", "e\u0301\u0323", "각", "क्षि", "\r\n"])
def test_a_stored_text_ends_with_a_whole_grapheme(grapheme: str) -> None:
    for spare in range(1, 25):
        head, tail = "宝" * ((TEXT_LIMIT_BYTES - spare) // 3), "x" * ((TEXT_LIMIT_BYTES - spare) % 3)
        tail += grapheme * 20
        kept = clip(head + tail)
        assert len(kept) - len(head) in ends(tail), spare
        assert len(kept.encode()) > TEXT_LIMIT_BYTES - 2 * len(grapheme.encode()), spare


def test_a_grapheme_longer_than_the_limit_is_cut_between_its_characters() -> None:
    assert clip("e" + "\u0301" * 50, 10) == "e" + "\u0301" * 4


@pytest.mark.parametrize("unit", ["🇨", "🇨🇳", "e\u0301", "👨‍", "क्", "각", "\u0600"])
def test_looking_for_boundaries_takes_linear_time(unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in questions about a character: twice the text, twice as many."""
    real, counts = graphemes._is_flag, []

    def counted(char: str) -> bool:
        counts[-1] += 1
        return real(char)

    monkeypatch.setattr(graphemes, "_is_flag", counted)
    for length in (2000, 4000):
        text = (unit * length)[:length]
        counts.append(0)
        cut(text, [(at, at + 1) for at in range(length)], 7)
        clip(text, length * 2)
        one = Graphemes(text)
        for position in (*range(length), *range(length, 0, -1)):
            one.is_boundary(position)
    assert counts[1] <= 2.2 * counts[0] + 100
