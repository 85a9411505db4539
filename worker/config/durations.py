"""Durations as people write them, in seconds."""

import math
import re

UNITS_S = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
#: ``0.5s``, ``1h30m``; bounded, so that no text takes long.
_DURATION = re.compile(r"(?:[0-9.]{1,20}(?:ms|[smhdw])){1,6}")
_DURATION_PART = re.compile(r"([0-9.]{1,20})(ms|[smhdw])")
#: ``1e-3`` and the like; without underscores and digits of other scripts, which `float` takes too.
PLAIN_NUMBER = re.compile(r"[+-]?[0-9]{0,20}(?:\.[0-9]{0,20})?(?:[eE][+-]?[0-9]{1,3})?")

#: Longest duration of any option: a year. Waits of the kernel and of libraries overflow far beyond it.
MAX_DURATION_S = 366 * 86400.0
DURATION_HINT = "say a duration such as 30, 0.5s, 250ms, 5m, 1h30m or 7d"


class InvalidDuration(ValueError):
    """The text is not a duration such as ``15m``."""


def parse_duration(text: str) -> float:
    """``90`` (seconds), ``250ms``, ``5m``, ``1h30m``, ``7d``, in seconds. Raises `InvalidDuration`."""
    text = text.strip()
    if text and PLAIN_NUMBER.fullmatch(text):
        seconds = _finite(text)
    elif _DURATION.fullmatch(text):
        seconds = math.fsum(_finite(number) * UNITS_S[unit] for number, unit in _DURATION_PART.findall(text))
    else:
        raise InvalidDuration(f"{text[:40]!r} is not a duration: {DURATION_HINT}")
    if seconds < 0:
        raise InvalidDuration(f"{text[:40]!r} is not a duration, because it is negative: {DURATION_HINT}")
    return seconds


def _finite(text: str) -> float:
    try:
        return finite(text)
    except ValueError as error:
        raise InvalidDuration(f"{error}: {DURATION_HINT}") from None


def finite(text: str) -> float:
    """The number. Raises ValueError for a text that is none, NaN or infinite."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]!r} is not a number")
    return value
