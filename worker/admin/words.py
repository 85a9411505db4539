"""Text for terminals and pages: durations, plurals, display width, and no control characters."""

import unicodedata
from itertools import accumulate

from ..safe_text import CONTROL


def strip_control(text: str, width: int = 0) -> str:
    """The text without control characters, cut to a width in columns (0: not cut)."""
    text = CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
    if not width or columns(text) <= width:
        return text
    ends = accumulate(columns(char) for char in text)
    return "".join(char for char, end in zip(text, ends, strict=True) if end < width) + "…"


def columns(text: str) -> int:
    """Columns on a terminal: two for a Chinese character, none for a combining mark."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1
        for char in text
    )


def pad(text: str, width: int) -> str:
    """The text filled with blanks up to a width in columns; a negative width aligns right."""
    blanks = " " * (abs(width) - columns(text))
    return blanks + text if width < 0 else text + blanks


def format_duration(seconds: float) -> str:
    """A duration with one unit: ``0.4 s``, ``12 s``, ``3 min``, ``5 h``, ``9 d``.

    A negative one, by two clocks that differ a little, is 0.
    """
    seconds = max(0.0, seconds)
    for limit, unit_s, unit in ((10, 0, ""), (120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds:.1f} s" if not unit else f"{seconds / unit_s:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"


def format_latency(seconds: float) -> str:
    """A duration with three digits: ``0.4 ms``, ``25 ms``, ``1.25 s``; from 100 s on as `format_duration`."""
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 100 else format_duration(seconds)


def pluralise(count: int, singular: str, plural: str = "") -> str:
    """``1 worker``, ``2 workers``."""
    return f"{count} {singular if count == 1 else plural or singular + 's'}"
