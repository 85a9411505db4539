"""Shared parts of the trials of several hosts: figures of one trial, services that record their starts."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from rig import Place, service

POLL_S = 0.05


class Trial(NamedTuple):
    """Figures of one trial; times in seconds.

    ``lost`` jobs never started, ``repeated`` started more than once. ``silence``: from the loss to the first
    job that was taken over, or the longest time without a start. ``done``: from the loss, or the release of
    the backlog, to the last start. ``per_s``: jobs per second in between. ``new_p50`` and ``new_max``: time
    that a new job waited meanwhile. ``shares``: jobs by service. ``bar``: longest silence that is allowed.
    """

    name: str
    jobs: int
    lost: int
    repeated: int
    silence: float
    done: float
    per_s: float
    new_p50: float | None
    new_max: float | None
    shares: list[int]
    bar: float | None = None

    @property
    def passed(self) -> bool:
        """Whether no job is lost and the silence is within its bar."""
        return not self.lost and (self.bar is None or self.silence <= self.bar)


class Starts(NamedTuple):
    """Starts of jobs: their number by job, the first by job (ns), all in order (ns), and jobs by service."""

    counts: Counter[int]
    first_ns: dict[int, int]
    all_ns: list[int]
    shares: list[int]

    @property
    def repeated(self) -> int:
        """Jobs that started more than once."""
        return sum(count > 1 for count in self.counts.values())

    def longest_gap_s(self, since_ns: int, until_ns: int) -> float:
        """Longest time without a start between two moments (seconds)."""
        within = [mono_ns for mono_ns in self.all_ns if since_ns < mono_ns < until_ns]
        gaps = [later - earlier for earlier, later in pairwise([since_ns, *within, until_ns])]
        return round(max(gaps) / 1e9, 2)


def read_starts(paths: Sequence[Path]) -> Starts:
    """What the services of a trial have recorded."""
    counts: Counter[int] = Counter()
    first_ns: dict[int, int] = {}
    all_ns: list[int] = []
    shares = []
    for path in paths:
        lines = path.read_text().splitlines() if path.exists() else []
        shares.append(len(lines))
        for job_id, stamp in (line.split() for line in lines):
            number, mono_ns = int(job_id.removeprefix("bench-")), int(stamp)
            counts[number] += 1
            first_ns[number] = min(first_ns.get(number, mono_ns), mono_ns)
            all_ns.append(mono_ns)
    return Starts(counts, first_ns, sorted(all_ns), shares)


def recording_service(
    url: str, place: Place, handler: str, procs: int, path: Path, lease_s: float, **environment: str
) -> AbstractContextManager[int]:
    """A service that records its starts in a file, after which it is named."""
    stamps, instance, lease = str(path), path.name, str(lease_s)
    own = {"BENCH_STAMPS": stamps, "JOBWORKER_INSTANCE": instance, "JOBWORKER_LEASE": lease}
    return service(url, place, handler, procs, 0, **own, **environment)


def wait(is_over: Callable[[], bool], limit_s: float) -> None:
    """Wait until something is over, at most so long."""
    give_up_at = time.monotonic() + limit_s
    while not is_over() and time.monotonic() < give_up_at:
        time.sleep(POLL_S)  # the state of a stream sends no event
