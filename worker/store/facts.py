"""What a server and its streams look like to `jobworker doctor`: plain values, no judgement."""

from typing import NamedTuple

from ..keys import Source
from .operator import Consumer


class ServerFacts(NamedTuple):
    """One server: INFO and CONFIG by name (empty where this user may not ask), how far its clock is ahead
    of ours and how long it takes to answer (seconds)."""

    info: dict[str, str]
    config: dict[str, str]
    skew_s: float
    round_trip_s: float


class StreamFacts(NamedTuple):
    """One stream. ``lags`` of every group: undelivered entries by the server's count (None: it cannot tell).
    ``missing``: pending entries, of the oldest, that the stream has no more."""

    source: Source
    exists: bool
    length: int
    lags: dict[str, int | None]
    pendings: dict[str, int]
    consumers: list[Consumer]
    missing: int
    overdue_s: float
    dead: int
