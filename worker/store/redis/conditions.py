"""Arguments and reply of ``screen.lua``, which compares jobs with others of their keys."""

from collections.abc import Iterator, Sequence
from typing import Any

from ..ports import Claim, Screened
from .base import chunks_by_size
from .lua import Argument

#: Time for which the newest job of a series is known, from its due time on: no older one waits as long.
_KEEP_NEWEST_MS = 24 * 3600 * 1000


class ScreenCall:
    """One call of ``screen.lua``: its arguments, and the jobs in their order."""

    def __init__(self, claims: Sequence[Claim], window_s: float) -> None:
        simple = [one for one in claims if not one.series and not one.data]
        others = [one for one in claims if one.series or one.data]
        self._claims = simple + others
        # At least 1 ms: the server refuses shorter times.
        self.arguments: list[Argument] = [max(1, round(window_s * 1000)), _KEEP_NEWEST_MS, len(simple)]
        for one in simple:
            self.arguments += (one.first_id, one.unique)
        for one in others:
            due = f"{one.due_s:.6f}" if one.data else "0"
            self.arguments += (one.id, one.first_id, one.unique, one.series, due, one.data)

    def add_reply(self, reply: Sequence[Any], screened: Screened) -> None:
        """Add the jobs that may not run."""
        for number, verdict, by in zip(reply[::3], reply[1::3], reply[2::3], strict=True):
            id = self._claims[number - 1].id
            match verdict:
                case b"duplicate":
                    screened.duplicates[id] = by
                case b"superseded":
                    screened.superseded[id] = by
                case b"delayed":
                    screened.delayed.add(id)
                case _:
                    screened.lost.add(id)


def screen_calls(claims: Sequence[Claim], window_s: float) -> Iterator[ScreenCall]:
    """The calls for these jobs, the newest of each series first."""
    in_order = sorted(claims, key=lambda one: _age(one) if one.series else (0, 0), reverse=True)
    for part in chunks_by_size(in_order, lambda one: len(one.data)):
        yield ScreenCall(part, window_s)


def _age(claim: Claim) -> tuple[int, int]:
    ms, _, sequence = claim.first_id.partition(b"-")
    return int(ms), int(sequence)
