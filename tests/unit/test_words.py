"""Durations, display width and control characters in what operators read."""

import json
import math
from decimal import Decimal
from typing import Any, NamedTuple

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobworker.worker.admin.words import (
    columns,
    format_duration,
    format_latency,
    pad,
    pluralise,
    strip_control,
)
from jobworker.worker.safe_text import safe_json


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


CONTROLS = ["\x1b", "\x9b", "\x07", "\x7f", "\u200f", "\u061c", "\u202e", "\u2066", "\u2028", "\ud800"]


@pytest.mark.parametrize("indent", [False, True])
@pytest.mark.parametrize("char", CONTROLS)
def test_json_escapes_control_characters_and_keeps_the_value(char: str, indent: bool) -> None:
    value = {f"长{char}": [f"a{char}b\\"]}
    text = safe_json(value, indent=indent)
    assert char not in text
    assert "长" in text
    assert json.loads(text) == value


class _Pair(NamedTuple):
    left: Any
    right: Any


@pytest.mark.parametrize("indent", [False, True])
@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ([math.nan, -math.inf, 1.5], [None, None, 1.5]),
        ([2**64, -(10**30), math.nan], [2**64, -(10**30), None]),
        ({2: "a", None: "b", True: "c"}, {"2": "a", "null": "b", "true": "c"}),
        (_Pair(1, [2**70]), [1, [2**70]]),
        ({"\ud800": "\udcff"}, {"\ud800": "\udcff"}),
        ([frozenset({1})], [[1]]),
        (orjson.Fragment(b'{"n":1234567890123456789.50}'), {"n": Decimal("1234567890123456789.50")}),
        ([orjson.Fragment(b'{"n":"\xff"}')], [{"n": "\ufffd"}]),
        ([orjson.Fragment(b"[1]"), 2**64], [[1], 2**64]),
    ],
    ids=["nan", "large", "keys", "tuple", "surrogates", "set", "fragment", "bad UTF-8", "fragment and large"],
)
def test_json_holds_what_the_library_refuses(value: Any, shown: Any, indent: bool) -> None:
    text = safe_json(value, list, indent=indent)
    assert json.loads(text, parse_constant=pytest.fail, parse_float=Decimal) == shown
    assert text.isprintable() or indent


def test_what_is_no_json_is_refused() -> None:
    with pytest.raises(TypeError, match="object"):
        safe_json([object()])


@pytest.mark.parametrize("char", CONTROLS)
def test_characters_that_control_a_terminal_are_replaced(char: str) -> None:
    assert strip_control(f"a{char}b") == "a\N{REPLACEMENT CHARACTER}b"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0004, "0.4 ms"), (0.0251, "25.1 ms"), (1.25, "1.25 s"), (61, "61 s"), (600, "10 min")],
)
def test_a_latency_has_three_digits(seconds: float, text: str) -> None:
    assert format_latency(seconds) == text


@pytest.mark.parametrize(
    ("text", "width", "padded"), [("ab", 4, "ab  "), ("ab", -4, "  ab"), ("长", 4, "长  ")]
)
def test_padding_counts_columns(text: str, width: int, padded: str) -> None:
    assert pad(text, width) == padded
