"""History of snapshots for the charts: polls the deployment in a thread, also while no browser is open."""

import logging
import threading
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import Any, NamedTuple

from ..admin.overview import Overview

log = logging.getLogger("jobworker.web")

#: Samples kept: half an hour at the default interval, about 100 KB when sent to a browser.
_MAX_SAMPLES = 900
#: How long the first page waits for the first snapshot: about the timeouts of a store and a service.
_FIRST_SNAPSHOT_S = 6.0


class Sample(NamedTuple):
    """One point of the charts. Rates are jobs per second, None if no service answers; the other numbers are
    None if the store does not answer."""

    wall_s: float
    done: float | None
    failed: float | None
    queued: int | None
    pending: int | None
    retrying: int | None
    dead: int | None
    oldest_s: float | None
    types: dict[str, "TypeSample"]


class TypeSample(NamedTuple):
    """One point of the charts of a job type: rates per second, percentiles in seconds; None if unknown."""

    done: float | None
    failed: float | None
    run_p95_s: float | None
    wait_p95_s: float | None


_NO_TYPE_SAMPLE = TypeSample(None, None, None, None)


class History:
    """The latest snapshot and the samples of earlier ones. Safe to read from any thread."""

    def __init__(self, take_snapshot: Callable[[], Overview], interval_s: float) -> None:
        self._take_snapshot = take_snapshot
        self._interval_s = interval_s
        self._latest: Overview | None = None
        self._samples: deque[Sample] = deque(maxlen=_MAX_SAMPLES)
        #: Samples taken since the start, which is also the number of the latest one.
        self._count = 0
        self._lock = threading.Lock()
        self._has_first = threading.Event()
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._poll, name="history", daemon=True)

    def start(self) -> None:
        """Start polling."""
        self._thread.start()

    def close(self) -> None:
        """Stop polling. A snapshot in progress ends by its own timeouts."""
        self._stopping = True
        self._wake.set()

    def refresh(self) -> None:
        """Take the next snapshot at once, because something was changed."""
        self._wake.set()

    @property
    def latest(self) -> Overview:
        """The latest snapshot; one with an error if none was taken in time."""
        self._has_first.wait(_FIRST_SNAPSHOT_S)
        with self._lock:
            return self._latest or Overview(0.0, error="no answer yet")

    def since(self, number: int) -> dict[str, Any]:
        """The samples after sample `number`: ``last``, the number of the latest one, and a list per field.
        ``types`` has a list per field of each job type. ``whole`` says that all samples are included, so that
        the browser drops its own."""
        with self._lock:
            new = max(0, min(self._count - number, len(self._samples)))
            if number > self._count:  # the browser's number is from before a restart of this process
                new = len(self._samples)
            samples = list(islice(self._samples, len(self._samples) - new, None))
            return {
                "last": self._count,
                "whole": new == len(self._samples),
                "interval_s": self._interval_s,
                **{
                    name: [getattr(one, name) for one in samples]
                    for name in Sample._fields
                    if name != "types"
                },
                "types": _type_columns(samples),
            }

    def add(self, overview: Overview) -> None:
        """Make this the latest snapshot."""
        with self._lock:
            self._latest = overview
            self._samples.append(sample_of(overview))
            self._count += 1
        self._has_first.set()

    def _poll(self) -> None:
        while not self._stopping:
            try:
                self.add(self._take_snapshot())
            except Exception:  # polling must survive an invalid status page
                log.exception("web.poll_failed")
            self._wake.wait(self._interval_s)
            self._wake.clear()


def _type_columns(samples: list[Sample]) -> dict[str, dict[str, list[float | None]]]:
    job_types = sorted({job_type for one in samples for job_type in one.types})
    rows = {name: [one.types.get(name, _NO_TYPE_SAMPLE) for one in samples] for name in job_types}
    return {
        job_type: {name: [getattr(row, name) for row in rows[job_type]] for name in TypeSample._fields}
        for job_type in job_types
    }


def sample_of(overview: Overview) -> Sample:
    """The point of the charts for a snapshot."""
    depths = [depths for _, depths in overview.streams]
    has_rates = overview.rates is not None and any(service.status for service in overview.services)

    def total(name: str) -> int | None:
        return sum(getattr(one, name) for one in depths) if depths else None

    return Sample(
        round(overview.wall_s, 3),
        round(overview.rate("done"), 2) if has_rates else None,
        round(overview.rate("failed"), 2) if has_rates else None,
        total("queued"), total("pending"), total("retrying"), total("dead"),
        round(max(one.oldest_age_s for one in depths), 1) if depths else None,
        {job_type: _type_sample(overview, job_type) for job_type in overview.rates or {}},
    )  # fmt: skip


def _type_sample(overview: Overview, job_type: str) -> TypeSample:
    rates, p95_s = (overview.rates or {})[job_type], overview.p95_s.get(job_type, {})
    run_s, wait_s = p95_s.get("run"), p95_s.get("wait")
    return TypeSample(
        round(rates["done"], 2), round(rates["failed"], 2),
        None if run_s is None else round(run_s, 4), None if wait_s is None else round(wait_s, 4),
    )  # fmt: skip
