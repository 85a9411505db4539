"""Context of one reader: what its parts share."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from ..flow import LaneRules
from ..ipc.crash_marks import CrashMarks
from ..settings import Settings
from ..store.faults import StreamFaults
from ..store.ports import ReaderStore
from ..telemetry.metrics import MetricsBuffer
from .held_outcomes import HeldOutcomes
from .lost_leases import LostLeases

#: Share of an interval after which what is done once an interval may be done, if the reader is awake for
#: something else. The intervals are multiples of one another, so that one wake-up serves all.
EARLY = 0.85


@dataclass(frozen=True)
class ReaderContext:
    """Dependencies of a reader. ``mono_s`` is its monotonic clock in seconds, ``wall_s`` the wall clock."""

    store: ReaderStore
    settings: Settings
    crash_marks: CrashMarks
    metrics: MetricsBuffer
    rng: random.Random
    mono_s: Callable[[], float]
    wall_s: Callable[[], float]
    faults: StreamFaults
    held: HeldOutcomes
    lost_leases: LostLeases
    #: By stream number: the rules by which its jobs are sorted, and their version on the server.
    lane_rules: dict[int, tuple[LaneRules, int]]
    #: Cancelled entries by stream number and id, and whether each becomes a dead letter. Some may have ended.
    cancels: dict[tuple[int, bytes], bool]

    @classmethod
    def create(
        cls, store: ReaderStore, settings: Settings, crash_marks: CrashMarks, rng: random.Random,
        mono_s: Callable[[], float], wall_s: Callable[[], float],
    ) -> Self:  # fmt: skip
        """The context of a new reader."""
        metrics = MetricsBuffer()
        faults = StreamFaults(store, settings.streams, metrics.gauge, "reader", rng, mono_s)
        lost_leases = LostLeases(settings.streams, metrics)
        held = HeldOutcomes()
        return cls(
            store, settings, crash_marks, metrics, rng, mono_s, wall_s, faults, held, lost_leases, {}, {}
        )
