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
    job keeps its slot. Otherwise it does not count: when its process ended is not known. It does not count
    either if a retry follows: it timed out on a busy machine, and a retry waits without a slot.
    """
    tenant_of = {id: one.tenant for id, one in ledger.planned.items() if one.kind == ONE}
    limited = [event for event in events if event.id in tenant_of]
    changes = defaultdict[str, list[tuple[float, int]]](list)
    # A job of a series that was killed may have been replaced since, and then it does not start again.
    given_up = verdict.dead_ids | {id for id, one in ledger.planned.items() if one.flow.series}
    for id, first_s, last_s in tries(limited, strict=strict, given_up=given_up):
        changes[tenant_of[id]] += [(first_s, 1), (last_s, -1)]
    for tenant, of_tenant in changes.items():
        most = most_at_once(of_tenant)
        verdict.most_at_once = max(verdict.most_at_once, most)
        if most > AT_ONCE:
            verdict.over_limit.append(f"{tenant}: {most} at once")
    many = {id for id, one in ledger.planned.items() if one.kind == MANY}
    sent_s = min((moment_s for id, moment_s in ledger.mono_sent_s.items() if id in many), default=None)
    verdict.over_rate = over_rate([event for event in events if event.id in many], sent_s)


def tries(events: Iterable[Event], *, strict: bool, given_up: set[str]) -> list[tuple[str, float, float]]:
    """Job, start and end of each try. The last try without an end of a job that was given up is left out."""
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
                following = starts[number + 1]
                if following.retry_count == start.retry_count:
                    found.append((id, start.mono_s, following.mono_s))
            elif strict and id not in given_up:
                found.append((id, start.mono_s, math.inf))
    return found


def most_at_once(changes: Iterable[tuple[float, int]]) -> int:
    """The highest sum of changes by time; at one time, ends come before starts."""
    running = most = 0
    for _, change in sorted(changes):
        running += change
        most = max(most, running)
    return most


def over_rate(events: Iterable[Event], sent_s: float | None) -> list[str]:
    """Moments at which more jobs had started than the rate allows since the first one was sent.

    A start counts when a service takes the job, which may be long before its first try. So the number of
    first tries until a moment is bounded, and not the number in any second. ``sent_s`` None: that of
    the first try.
    """
    first_s: dict[str, float] = {}
    for event in events:
        if event.what == START:
            first_s.setdefault(event.id, event.mono_s)
    ordered = sorted(first_s.values())
    if not ordered:
        return []
    taken_s = ordered[0] if sent_s is None else sent_s
    return [
        f"{number} starts in {moment_s - taken_s:.3f} s"
        for number, moment_s in enumerate(ordered, 1)
        if number > STARTS * (math.floor(moment_s - taken_s) + 1)
    ][:10]
