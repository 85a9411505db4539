"""Oracle of limits: how many jobs of a key ran at once, and how many started in a time."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

from chaos_events import START, Event
from chaos_load import AT_ONCE, MANY, ONE, STARTS, Ledger
from chaos_oracle import Verdict


def check_limits(verdict: Verdict, ledger: Ledger, events: Sequence[Event], strict: bool) -> None:
    """Compare the recorded tries with the limits of the services.

    A try without an end was killed. ``strict``: it counts as running until its job starts again, because the
    job keeps its slot. Otherwise it does not count: when its process ended is not known.
    """
    tenant_of = {id: one.tenant for id, one in ledger.planned.items() if one.kind == ONE}
    limited = [event for event in events if event.id in tenant_of]
    changes = defaultdict[str, list[tuple[float, int]]](list)
    for id, first_s, last_s in tries(limited, strict=strict, dead=verdict.dead_ids):
        changes[tenant_of[id]] += [(first_s, 1), (last_s, -1)]
    for tenant, of_tenant in changes.items():
        most = most_at_once(of_tenant)
        verdict.most_at_once = max(verdict.most_at_once, most)
        if most > AT_ONCE:
            verdict.over_limit.append(f"{tenant}: {most} at once")
    many = {id for id, one in ledger.planned.items() if one.kind == MANY}
    verdict.over_rate = over_rate([event for event in events if event.id in many])


def tries(events: Iterable[Event], *, strict: bool, dead: set[str]) -> list[tuple[str, float, float]]:
    """Job, start and end of each try. The last try of a dead letter without an end is left out."""
    by_job = defaultdict[str, list[Event]](list)
    for event in events:
        by_job[event.id].append(event)
    found = []
    for id, of_job in by_job.items():
        starts = [event for event in of_job if event.what == START]
        ends = [event for event in of_job if event.what != START]
        for number, start in enumerate(starts):
            later = [end.mono_s for end in ends if end.pid == start.pid and end.mono_s >= start.mono_s]
            if later:
                found.append((id, start.mono_s, min(later)))
            elif strict and number + 1 < len(starts):
                found.append((id, start.mono_s, starts[number + 1].mono_s))
            elif strict and id not in dead:
                found.append((id, start.mono_s, math.inf))
    return found


def most_at_once(changes: Iterable[tuple[float, int]]) -> int:
    """The highest sum of changes by time; at one time, ends come before starts."""
    running = most = 0
    for _, change in sorted(changes):
        running += change
        most = max(most, running)
    return most


def over_rate(events: Iterable[Event]) -> list[str]:
    """Moments at which more jobs had started than the rate allows since the first one.

    A start counts when a service takes the job, which is earlier than its first try. So the number of first
    tries until a moment is bounded, and not the number in any second.
    """
    first_s: dict[str, float] = {}
    for event in events:
        if event.what == START:
            first_s.setdefault(event.id, event.mono_s)
    ordered = sorted(first_s.values())
    # The first job may have been taken up to this long before its first try.
    taken_s = ordered[0] - 1.0 if ordered else 0.0
    return [
        f"{number} starts in {moment_s - taken_s:.3f} s"
        for number, moment_s in enumerate(ordered, 1)
        if number > STARTS * (math.floor(moment_s - taken_s) + 1)
    ][:10]
