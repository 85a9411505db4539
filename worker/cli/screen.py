"""Layout of ``jobworker top``: a snapshot as lines of text for a terminal of any width.

No function here does input or output.
"""

from collections.abc import Iterator
from datetime import datetime
from typing import Any, NamedTuple

from ..admin.overview import Overview
from ..admin.status_client import Service
from ..admin.words import format_duration, pad, pluralise, strip_control

#: Columns for the type of a running job. It is cut rather than the id, which distinguishes jobs.
_TYPE_COLUMNS = 13
#: Leaves room for five numbers on a terminal of 80 columns, of which the last stays empty.
_NAME_COLUMNS = 28


class ScreenLine(NamedTuple):
    """One line; ``style``: plain, head, bad or dim."""

    text: str
    style: str = "plain"


def lines(overview: Overview, width: int) -> list[ScreenLine]:
    """All lines of the page, each cut to the width."""
    body = [
        *_head(overview), *_streams(overview), *_lanes(overview), *_limits(overview), *_types(overview),
        *_workers(overview),
        *_dead_letters(overview),
    ]  # fmt: skip
    return [ScreenLine(strip_control(line.text, width), line.style) for line in body]


def _head(overview: Overview) -> Iterator[ScreenLine]:
    clock = datetime.fromtimestamp(overview.wall_s).strftime("%H:%M:%S")
    answering = [service for service in overview.services if service.status]
    workers = overview.workers()
    states = ", ".join(f"{count} {state}" for state, count in sorted(workers.items()))
    done, failed = overview.rate("done"), overview.rate("failed")
    rate = "" if overview.rates is None else f"  {done:.0f} jobs/s, {failed:.0f} failing/s"
    counts = f"{pluralise(len(answering), 'service')}, {pluralise(workers.total(), 'worker')}"
    yield ScreenLine(f"{clock}  {counts}{states and f' ({states})'}{rate}", "head")
    if overview.error:
        yield ScreenLine(overview.error, "bad")
    for text in overview.refused:
        yield ScreenLine(text, "bad")
    for service in overview.services:
        if not service.status:
            yield ScreenLine(f"{service.url}: {service.error}", "dim")
        for reason in service.problems():
            yield ScreenLine(f"{service.consumer}: {reason}", "bad")
        for warning in service.status.get("warnings", ()):
            yield ScreenLine(f"{service.consumer}: {warning}", "bad")
    for job_type in sorted(_open_circuits(overview)):
        yield ScreenLine(f"{job_type}: circuit open, its dependency does not answer", "bad")
    for pause in overview.pauses:
        note = f": {pause.note}" if pause.note else ""
        paused = format_duration(max(0.0, overview.wall_s - pause.wall_since_s))
        yield ScreenLine(f"{pause.job_type} is paused for {paused}{note}", "bad")


def _open_circuits(overview: Overview) -> set[str]:
    return {
        job_type for service in overview.services for job_type in service.types_with("z_novel_circuit_open")
    }


def _row(*cells: tuple[str, int]) -> str:
    """Cells as wide as given; a negative width aligns right, 0 leaves the cell as it is."""
    texts = [pad(strip_control(text, abs(width)), width) if width else text for text, width in cells]
    return " ".join(texts).rstrip()


def _streams(overview: Overview) -> Iterator[ScreenLine]:
    if not overview.streams:
        return
    names = ("QUEUED", "PENDING", "RETRYING", "DEAD", "OLDEST")
    yield ScreenLine("")
    yield ScreenLine(_row(("STREAM", _NAME_COLUMNS), *((name, -9) for name in names)), "head")
    for source, depths in overview.streams:
        numbers = (depths.queued, depths.pending, depths.retrying, depths.dead)
        oldest = format_duration(depths.oldest_age_s) if depths.queued else "-"
        yield ScreenLine(
            _row((source.stream, _NAME_COLUMNS), *((str(number), -9) for number in numbers), (oldest, -9))
        )


def _lanes(overview: Overview) -> Iterator[ScreenLine]:
    ages_s = {source.stream: depths.tenant_ages_s for source, depths in overview.streams}
    for stream, counts in overview.lanes.items():
        yield ScreenLine("")
        yield ScreenLine(_row(("TENANT", _NAME_COLUMNS), ("SORTED", -9), ("OLDEST", -9), (stream, 0)), "head")
        by_priority = ", ".join(f"{number}: {count}" for number, count in counts.by_priority.items())
        yield ScreenLine(
            _row(("all", _NAME_COLUMNS), (str(counts.waiting), -9), (f"by priority {by_priority}", 0))
        )
        for tenant, count in counts.largest_tenants.items():
            age_s = ages_s.get(stream, {}).get(tenant)
            oldest = "-" if age_s is None else format_duration(age_s)
            yield ScreenLine(_row((tenant or "no tenant", _NAME_COLUMNS), (str(count), -9), (oldest, -9)))


def _limits(overview: Overview) -> Iterator[ScreenLine]:
    if not overview.limits:
        return
    yield ScreenLine("")
    names = ("AT ONCE", "RATE", "RUNNING", "WAITING")
    yield ScreenLine(_row(("LIMIT", _NAME_COLUMNS), *((name, -9) for name in names)), "head")
    for _, limit, running, waiting, _ in overview.limits:
        cells = (str(limit.concurrency or "-"), limit.rate or "-", str(running), str(waiting))
        yield ScreenLine(_row((limit.name, _NAME_COLUMNS), *((cell, -9) for cell in cells)))


def _types(overview: Overview) -> Iterator[ScreenLine]:
    if not overview.totals:
        return
    yield ScreenLine("")
    names = ("DONE/s", "FAILED/s", "RETRIED/s", "DEAD/s", "DONE")
    yield ScreenLine(_row(("TYPE", _NAME_COLUMNS), *((name, -9) for name in names)), "head")
    waiting = _open_circuits(overview) | {pause.job_type for pause in overview.pauses}
    for job_type, totals in sorted(overview.totals.items()):
        rates = (overview.rates or {}).get(job_type)
        cells = [
            (f"{rates[name]:.1f}" if rates else "-", -9) for name in ("done", "failed", "retried", "dead")
        ]
        text = _row((job_type, _NAME_COLUMNS), *cells, (f"{totals['done']:.0f}", -9))
        yield ScreenLine(text, "bad" if job_type in waiting else "plain")


def _workers(overview: Overview) -> Iterator[ScreenLine]:
    workers = [(service, worker) for service in overview.services for worker in service.workers()]
    if not workers:
        return
    yield ScreenLine("")
    names = (("PID", -7), ("MiB", -5), ("DONE", -8), ("LOST", -4), ("FOR", -8), ("RUNS", 0))
    yield ScreenLine(_row(("WORKER", 12), *names), "head")
    for service, worker in workers:
        style = "plain" if worker["state"] in ("idle", "busy") else "dim"
        yield ScreenLine(_worker(overview, service, worker), style)


def _worker(overview: Overview, service: Service, worker: dict[str, Any]) -> str:
    running = worker.get("running")
    runs = f"{running['count']}: " if running and running["count"] > 1 else ""
    for job in running["jobs"][:1] if running else ():
        job_id = overview.job_ids.get((job["stream"], job["entry_id"])) or job["entry_id"]
        runs += f"{strip_control(job['type'], _TYPE_COLUMNS)} {job_id}"
    numbers = (
        (worker["pid"], -7),
        (worker["rss_mib"], -5),
        (worker["finished"], -8),
        (worker["restarts"], -4),
    )
    return _row(
        (f"{service.status['instance']}/{worker['slot']}", 12),
        *((str(number), width) for number, width in numbers),
        (format_duration(running["for_s"]) if running else worker["state"], -8),
        (runs, 0),
    )


def _dead_letters(overview: Overview) -> Iterator[ScreenLine]:
    if not overview.letters:
        return
    yield ScreenLine("")
    yield ScreenLine(_row(("DEAD FOR", -8), ("REASON", 10), ("TYPE", 16), ("JOB", 16), ("ERROR", 0)), "head")
    for letter in overview.letters:
        age = format_duration(max(0.0, overview.wall_s - letter.wall_s))
        yield ScreenLine(
            _row((age, -8), (letter.reason, 10), (letter.type, 16), (letter.job_id, 16), (letter.error, 0))
        )
