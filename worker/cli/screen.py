"""What ``jobworker top`` shows, as lines of text: a look laid out for a terminal of any size (pure)."""

from collections.abc import Iterator
from datetime import datetime
from typing import Any, NamedTuple

from ..admin.overview import Overview
from ..admin.status_client import Service
from ..admin.words import format_duration, pad, pluralise, strip_control

#: Of a job's type beside its id, which is what tells it from others.
_TYPE_COLUMNS = 13
#: Leaves room for five numbers on a terminal of 80 columns, whose last one stays empty.
_NAME_COLUMNS = 28


class ScreenLine(NamedTuple):
    """One line; ``style``: plain, head, bad or dim."""

    text: str
    style: str = "plain"


def lines(seen: Overview, width: int) -> list[ScreenLine]:
    """The whole page, as long as it is; every line fits the width."""
    body = [*_head(seen), *_streams(seen), *_types(seen), *_workers(seen), *_failures(seen)]
    return [ScreenLine(strip_control(line.text, width), line.style) for line in body]


def _head(seen: Overview) -> Iterator[ScreenLine]:
    clock = datetime.fromtimestamp(seen.wall_s).strftime("%H:%M:%S")
    answering = [service for service in seen.services if service.said]
    workers = seen.workers()
    states = ", ".join(f"{count} {state}" for state, count in sorted(workers.items()))
    done, failed = seen.rate("done"), seen.rate("failed")
    rate = "" if seen.rates is None else f"  {done:.0f} jobs/s, {failed:.0f} failing/s"
    counts = f"{pluralise(len(answering), 'service')}, {pluralise(workers.total(), 'worker')}"
    yield ScreenLine(f"{clock}  {counts}{states and f' ({states})'}{rate}", "head")
    if seen.trouble:
        yield ScreenLine(seen.trouble, "bad")
    for service in seen.services:
        if not service.said:
            yield ScreenLine(f"{service.url}: {service.trouble}", "dim")
        for reason in service.said.get("reasons", ()):
            yield ScreenLine(f"{service.consumer}: {reason}", "bad")
    for pause in seen.pauses:
        note = f": {pause.note}" if pause.note else ""
        yield ScreenLine(
            f"{pause.kind} is paused for {format_duration(max(0.0, seen.wall_s - pause.wall_since_s))}{note}",
            "bad",
        )


def _row(*cells: tuple[str, int]) -> str:
    """Cells as wide as asked for; a negative width sets to the right. The last one is not cut."""
    texts = [pad(strip_control(text, abs(width)), width) if width else text for text, width in cells]
    return " ".join(texts).rstrip()


def _streams(seen: Overview) -> Iterator[ScreenLine]:
    if not seen.streams:
        return
    names = ("QUEUED", "PENDING", "RETRYING", "DEAD", "OLDEST")
    yield ScreenLine("")
    yield ScreenLine(_row(("STREAM", _NAME_COLUMNS), *((name, -9) for name in names)), "head")
    for source, depths in seen.streams:
        numbers = (depths.queued, depths.pending, depths.retrying, depths.dead)
        oldest = format_duration(depths.oldest_age_s) if depths.queued else "-"
        yield ScreenLine(
            _row((source.stream, _NAME_COLUMNS), *((str(number), -9) for number in numbers), (oldest, -9))
        )


def _types(seen: Overview) -> Iterator[ScreenLine]:
    if not seen.totals:
        return
    yield ScreenLine("")
    names = ("DONE/s", "FAILED/s", "RETRIED/s", "DEAD/s", "DONE")
    yield ScreenLine(_row(("TYPE", _NAME_COLUMNS), *((name, -9) for name in names)), "head")
    waiting = {kind for service in seen.services for kind in service.flagged("z_novel_circuit_open")}
    paused = {pause.kind for pause in seen.pauses}
    for kind, totals in sorted(seen.totals.items()):
        rates = (seen.rates or {}).get(kind)
        cells = [
            (f"{rates[what]:.1f}" if rates else "-", -9) for what in ("done", "failed", "retried", "dead")
        ]
        said = "paused" if kind in paused else "what it needs does not answer" if kind in waiting else ""
        text = _row((kind, _NAME_COLUMNS), *cells, (f"{totals['done']:.0f}", -9), (said, 0))
        yield ScreenLine(text, "bad" if said else "plain")


def _workers(seen: Overview) -> Iterator[ScreenLine]:
    found = [(service, worker) for service in seen.services for worker in service.workers()]
    if not found:
        return
    yield ScreenLine("")
    names = (("PID", -7), ("MiB", -5), ("DONE", -8), ("LOST", -4), ("FOR", -8), ("RUNS", 0))
    yield ScreenLine(_row(("WORKER", 12), *names), "head")
    for service, worker in found:
        yield ScreenLine(
            _worker(seen, service, worker), "plain" if worker["state"] in ("idle", "busy") else "dim"
        )


def _worker(seen: Overview, service: Service, worker: dict[str, Any]) -> str:
    """One line; as much of the job's id as 80 columns have room for."""
    running = worker.get("running")
    runs = f"{running['count']}: " if running and running["count"] > 1 else ""
    for job in running["jobs"][:1] if running else ():
        name = seen.names.get((job["stream"], job["entry_id"])) or job["entry_id"]
        runs += f"{strip_control(job['type'], _TYPE_COLUMNS)} {name}"
    numbers = (
        (worker["pid"], -7),
        (worker["rss_mib"], -5),
        (worker["finished"], -8),
        (worker["restarts"], -4),
    )
    return _row(
        (f"{service.said['instance']}/{worker['slot']}", 12),
        *((str(number), width) for number, width in numbers),
        (format_duration(running["for_s"]) if running else worker["state"], -8),
        (runs, 0),
    )


def _failures(seen: Overview) -> Iterator[ScreenLine]:
    if not seen.letters:
        return
    yield ScreenLine("")
    yield ScreenLine(_row(("GIVEN UP", -8), ("REASON", 10), ("TYPE", 16), ("JOB", 16), ("ERROR", 0)), "head")
    for letter in seen.letters:
        ago = format_duration(max(0.0, seen.wall_s - letter.wall_s))
        yield ScreenLine(
            _row((ago, -8), (letter.reason, 10), (letter.type, 16), (letter.job_id, 16), (letter.error, 0))
        )
