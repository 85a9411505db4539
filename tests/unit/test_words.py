"""Ages, durations, display width and control characters in what operators read."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobworker.worker.admin.words import (
    InvalidAge,
    columns,
    format_duration,
    pad,
    parse_age,
    pluralise,
    strip_control,
)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("1.5m", 90), ("2h", 7200), ("7d", 604800), ("1w", 604800)]
)
def test_an_age_is_read(text: str, seconds: float) -> None:
    assert parse_age(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "-1", "1y", "2 h", "inf"])
def test_an_invalid_age_is_refused_with_examples(text: str) -> None:
    with pytest.raises(InvalidAge, match="write 90s, 15m, 2h or 7d"):
        parse_age(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (-0.3, "0.0 s"), (12.4, "12 s"), (200, "3 min"), (7300, "2 h"), (1e6, "12 d")],
)
def test_a_duration_has_one_unit(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_plurals() -> None:
    assert [pluralise(n, "worker") for n in (0, 1, 2)] == ["0 workers", "1 worker", "2 workers"]
    assert pluralise(2, "job waits", "jobs wait") == "2 jobs wait"


@given(st.text(max_size=50), st.integers(1, 40))
def test_cut_text_is_not_wider_than_its_width(text: str, width: int) -> None:
    cut = strip_control(text, width)
    assert columns(cut) <= width
    assert cut == strip_control(text) or cut.endswith("…")


@pytest.mark.parametrize("char", ["\x1b", "\x9b", "\x07", "\u202e", "\u2066", "\u2028"])
def test_characters_that_control_a_terminal_are_replaced(char: str) -> None:
    assert strip_control(f"a{char}b") == "a\N{REPLACEMENT CHARACTER}b"


@pytest.mark.parametrize(
    ("text", "width", "padded"), [("ab", 4, "ab  "), ("ab", -4, "  ab"), ("长", 4, "长  ")]
)
def test_padding_counts_columns(text: str, width: int, padded: str) -> None:
    assert pad(text, width) == padded
