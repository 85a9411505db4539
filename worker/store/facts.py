"""Facts that `jobworker doctor` judges: plain values about a server and its streams."""

from collections.abc import Sequence
from typing import NamedTuple

from ..keys import Source
from .operator import Consumer
from .ports import KeyFault


class ServerFacts(NamedTuple):
    """One server: INFO and CONFIG by name (empty where this user has no permission), the lead of its clock
    over ours and its round trip (seconds), and which of its newer commands are used."""

    info: dict[str, str]
    config: dict[str, str]
    skew_s: float
    round_trip_s: float
    newer_commands: Sequence[str] = ()


class StreamFacts(NamedTuple):
    """One stream. ``lags``: undelivered entries of every group by the server's count (None: unknown).
    ``missing``: how many of the oldest pending entries are gone from the stream. ``faults``: keys that the
    server refuses; what depends on them is empty."""

    source: Source
    exists: bool
    length: int
    lags: dict[str, int | None]
    pendings: dict[str, int]
    consumers: list[Consumer]
    missing: int
    overdue_s: float
    dead: int
    faults: Sequence[KeyFault] = ()
