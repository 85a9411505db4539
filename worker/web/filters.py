"""Which dead letters a person means: out of a form or a link, and back into a link (pure)."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Self
from urllib.parse import urlencode

from ..admin.dead_letters import Cursor, LetterFilter, aged
from ..admin.words import parse_age


@dataclass(frozen=True)
class DeadFilter:
    """Which dead letters; an empty field says nothing. Ages are written as on the command line: 15m, 2h."""

    stream: str = ""
    reason: str = ""
    type: str = ""
    tenant: str = ""
    error: str = ""
    newer: str = ""
    older: str = ""

    @classmethod
    def read(cls, value_of: Callable[[str], str]) -> Self:
        """By the fields' own names."""
        return cls(**{field.name: value_of(field.name).strip() for field in fields(cls)})

    def choice(self, wall_now_s: float) -> LetterFilter:
        """Letters that were there by then. Raises `InvalidAge` for an age that is none."""
        one = LetterFilter(
            reasons=_alone(self.reason), types=_alone(self.type), tenants=_alone(self.tenant),
            error=self.error,
        )  # fmt: skip
        choice = aged(one, wall_now_s, _age(self.older), _age(self.newer))
        return replace(choice, before_wall_s=min(choice.before_wall_s, wall_now_s))

    @property
    def query(self) -> str:
        """For a link, with an ampersand at its end where it says anything."""
        said = urlencode({name: value for name, value in asdict(self).items() if value})
        return said + "&" if said else ""

    @property
    def words(self) -> list[str]:
        """For a person who is to confirm it."""
        says = {
            "stream": f"of {self.stream}", "reason": f"reason {self.reason}", "type": f"type {self.type}",
            "tenant": f"tenant {self.tenant}", "error": f"error holds “{self.error}”",
            "newer": f"given up within the last {self.newer}",
            "older": f"given up longer ago than {self.older}",
        }  # fmt: skip
        return [says[name] for name, value in asdict(self).items() if value]


def _alone(value: str) -> frozenset[str]:
    return frozenset([value] if value else [])


def _age(text: str) -> float | None:
    return parse_age(text) if text else None


def read_place(text: str, streams: list[str]) -> Cursor | None:
    """``<stream> <id>``, as a page wrote it; None where it is no place of these streams."""
    stream, _, id = text.rpartition(" ")
    ms, _, sequence = id.partition("-")
    plain = ms.isdigit() and sequence.isdigit() and id.isascii() and len(id) <= 41
    return Cursor(stream, id.encode()) if plain and stream in streams else None


def write_place(place: Cursor) -> str:
    """What `read_place` reads."""
    return f"{place.stream} {place.id.decode()}"
