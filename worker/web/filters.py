"""Filter and position of dead letters in forms and links.

No function here does input or output.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Self
from urllib.parse import urlencode

from ..admin.dead_letters import Cursor, LetterFilter
from ..config.durations import parse_duration


@dataclass(frozen=True)
class DeadFilter:
    """Form fields that select dead letters. An empty field sets no condition. Ages are text like ``15m``."""

    stream: str = ""
    reason: str = ""
    type: str = ""
    tenant: str = ""
    error: str = ""
    newer: str = ""
    older: str = ""

    @classmethod
    def read(cls, value_of: Callable[[str], str]) -> Self:
        """From a form or a query; `value_of` returns the value of a field by its name."""
        return cls(**{field.name: value_of(field.name).strip() for field in fields(cls)})

    def letter_filter(self, wall_now_s: float) -> LetterFilter:
        """The conditions, limited to letters that existed at `wall_now_s`. Raises `InvalidDuration`."""
        conditions = LetterFilter(
            reasons=_set_of(self.reason), types=_set_of(self.type), tenants=_set_of(self.tenant),
            error=self.error,
        ).with_ages(wall_now_s, _age(self.older), _age(self.newer))  # fmt: skip
        return replace(conditions, before_wall_s=min(conditions.before_wall_s, wall_now_s))

    @property
    def query(self) -> str:
        """The set fields as a query string that ends in ``&``; empty if none is set."""
        query = urlencode({name: value for name, value in asdict(self).items() if value})
        return query + "&" if query else ""

    @property
    def descriptions(self) -> list[str]:
        """Each condition in words, for the page that asks for confirmation."""
        words = {
            "stream": f"of {self.stream}", "reason": f"reason {self.reason}", "type": f"type {self.type}",
            "tenant": f"tenant {self.tenant}", "error": f"error contains “{self.error}”",
            "newer": f"dead for less than {self.newer}",
            "older": f"dead for more than {self.older}",
        }  # fmt: skip
        return [words[name] for name, value in asdict(self).items() if value]


def _set_of(value: str) -> frozenset[str]:
    return frozenset([value] if value else [])


def _age(text: str) -> float | None:
    return parse_duration(text) if text else None


def parse_cursor(text: str, streams: list[str]) -> Cursor | None:
    """``<stream> <id>``, as `format_cursor` writes it; None if it is not a position in one of the streams."""
    stream, _, id = text.rpartition(" ")
    ms, _, sequence = id.partition("-")
    is_id = ms.isdigit() and sequence.isdigit() and id.isascii() and len(id) <= 41
    return Cursor(stream, id.encode()) if is_id and stream in streams else None


def format_cursor(cursor: Cursor) -> str:
    """The cursor as text for a link or a form."""
    return f"{cursor.stream} {cursor.id.decode()}"
