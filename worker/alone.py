"""Which worker a job gets to itself: one that may kill it, or one that would keep others waiting for long."""

from collections import deque
from collections.abc import Callable, Sequence

from .lane import Lane
from .triage import Arrival


def hand_out_alone(lanes: Sequence[Lane], waiting: deque[Arrival], handed: Callable[[Arrival], None]) -> None:
    """Give these jobs to empty workers, one each, and tell of each; where no worker is empty, keep new work
    from the one with the least."""
    for lane in lanes:
        if lane.alone and not len(lane.table) and not lane.gone:
            lane.alone = False
    if not waiting:
        return
    for lane in sorted(lanes, key=_load):
        fit = _first_fit(lane, lanes, waiting) if lane.open and not len(lane.table) else None
        if fit and lane.hand([fit]):
            waiting.remove(fit)
            lane.alone = True
            handed(fit)
    # Under steady load no worker is ever empty. One at a time is set aside, beside those that run for long.
    if not any(lane.alone and not lane.runs_long for lane in lanes):
        busy = [lane for lane in lanes if lane.open and _first_fit(lane, lanes, waiting)]
        if busy:
            min(busy, key=_load).alone = True


def _load(lane: Lane) -> int:
    return len(lane.table)


def _first_fit(lane: Lane, lanes: Sequence[Lane], waiting: deque[Arrival]) -> Arrival | None:
    """The first job that this worker may have. Long ones never take the last worker of several."""
    return next(
        (
            one
            for one in waiting
            if lane.accepts(one.kind) and (not lane.is_long(one.kind) or _has_spare(lane, lanes, one.kind))
        ),
        None,
    )


def _has_spare(lane: Lane, lanes: Sequence[Lane], kind: int) -> bool:
    able = [one for one in lanes if not (one.gone or one.retired) and one.accepts(kind)]
    return able == [lane] or any(one is not lane and not one.runs_long for one in able)
