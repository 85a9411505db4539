"""Click types for durations, sizes and numbers: with units, finite and bounded.

A number without a unit means what the option says: seconds, bytes or MiB.
"""

import re
from typing import Any

import click

from .durations import MAX_DURATION_S, PLAIN_NUMBER, UNITS_S, finite, parse_duration

__all__ = ["Count", "Duration", "Number", "Size", "parse_duration", "parse_size"]

_SIZE = re.compile(r"([0-9]{1,18})([KMGT]?)(?:i?B)?", re.IGNORECASE)
_UNITS_OF_SIZE = "KMGT"

#: Largest count of any option. All of them fit the integers of every library.
MAX_COUNT = 1_000_000_000


def parse_size(text: str, unit_bytes: int = 1) -> int:
    """``8388608``, ``512MiB`` or ``2G`` (always powers of 1024), in bytes; a plain number counts units of
    ``unit_bytes``. Raises ValueError."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"{text[:40]!r} is not a size: say a size such as 512MiB or 2GiB")
    number, prefix = int(found[1]), found[2].upper()
    if not prefix and found[0].isdecimal():
        return number * unit_bytes
    return number << 10 * (_UNITS_OF_SIZE.index(prefix) + 1 if prefix else 0)


class Duration(click.ParamType[float]):
    """Seconds, from a number or a text with units, between two bounds."""

    name = "duration"
    expected = 'a duration: a number of seconds, or a text such as "5m"'
    kinds = (int, float, str)

    def __init__(self, least_s: float = 0.0, most_s: float = MAX_DURATION_S) -> None:
        self.least_s, self.most_s = least_s, most_s

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Seconds. Raises `click.BadParameter`."""
        try:
            seconds = parse_duration(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if not self.least_s <= seconds <= self.most_s:
            self.fail(f"{value} is not between {_as_s(self.least_s)} and {_as_s(self.most_s)}", param, ctx)
        return seconds


class Number(click.ParamType[float]):
    """A finite number between two bounds."""

    name = "number"
    expected = "a number"
    kinds = (int, float, str)

    def __init__(self, least: float, most: float) -> None:
        self.least, self.most = least, most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number. Raises `click.BadParameter`."""
        text = str(value).strip()
        try:
            number = finite(text if PLAIN_NUMBER.fullmatch(text) else "no number")
        except ValueError:
            self.fail(f"{text[:40]!r} is not a number", param, ctx)
        if not self.least <= number <= self.most:
            self.fail(f"{text} is not between {self.least:g} and {self.most:g}", param, ctx)
        return number


class Count(click.IntRange):
    """A whole number between two bounds."""

    expected = "a whole number"
    kinds = (int, str)

    def __init__(self, least: int, most: int = MAX_COUNT) -> None:
        super().__init__(least, most)
        self.least, self.most = least, most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number. Raises `click.BadParameter`."""
        try:
            number = int(value)
        except (TypeError, ValueError):
            self.fail(f"{str(value)[:40]!r} is not a whole number", param, ctx)
        if not self.least <= number <= self.most:
            self.fail(f"{str(value)[:40]} is not between {self.least} and {self.most}", param, ctx)
        return number


class Size(click.ParamType[int]):
    """A size in units of ``unit_bytes``, from a number of them or a text with a unit, between two bounds.

    ``off``: whether this word is taken too, as 0.
    """

    name = "size"
    expected = 'a size: a number, or a text such as "512MiB"'
    kinds = (int, str)

    def __init__(self, least: int, most: int, *, unit_bytes: int = 1, off: bool = False) -> None:
        self.least, self.most = least, most
        self._unit_bytes = unit_bytes
        self._off = off

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The size, rounded up to whole units. Raises `click.BadParameter`."""
        if self._off and value == "off":
            return 0
        choice = "off or " if self._off else ""
        bounds = f"{self._shown(self.least)} to {self._shown(self.most)}"
        try:
            size = -(-parse_size(str(value), self._unit_bytes) // self._unit_bytes)
        except ValueError:
            size = -1
        if not self.least <= size <= self.most:
            text = f"{str(value)[:40]!r}: say {choice}a size from {bounds}, for example 512MiB"
            self.fail(text, param, ctx)
        return size

    def _shown(self, size: int) -> str:
        size_bytes = size * self._unit_bytes
        for exponent, prefix in reversed([*enumerate(_UNITS_OF_SIZE, 1)]):
            if size_bytes and not size_bytes % (1 << 10 * exponent):
                return f"{size_bytes >> 10 * exponent}{prefix}iB"
        return str(size_bytes)


def _as_s(seconds: float) -> str:
    for unit in ("d", "h", "m", "s"):
        if seconds and not seconds % UNITS_S[unit]:
            return f"{seconds / UNITS_S[unit]:.0f}{unit}"
    return f"{seconds * 1000:g}ms" if seconds else "0"
