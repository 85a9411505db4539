"""All benchmarks in one command, beside a bare loop, Dramatiq and huey: figures, plots, changes.

    python bench/run.py --out report                 report/report.html and report/report.json
    python bench/run.py --quick --out report         less than 3 minutes: fewer jobs, no kills, no model
    python bench/run.py --against old/report.json    also says what got worse; exits 1 if anything did

All contenders take turns on one new server, so that a noisy machine disturbs them alike. Figures are
medians of --repeat runs. Compare ratios of one run; absolute figures depend on the machine.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click
import orjson
from contenders import PEER_SYSTEMS, Bare, Contender, Other, Ours, PeerSystem, trees
from hosts import cpu_s, format_facts, host_facts, pss_mib, table
from latency import EVERY_S, WARM_UP_JOBS, delays_ms, percentiles, started_ns
from rig import LIMIT_S, connect, say, server
from run_report import write_html

from jobworker.worker.safe_text import safe_json

_FOLDER = Path(__file__).resolve().parent
_POLL_S = 0.005
#: Pause before the memory of an idle tree is read, and the time over which its CPU is measured.
_IDLE_AFTER_S, _IDLE_S = 3.0, 5.0
#: Workers of the second idle tree: those of the systemd unit.
_MANY_WORKERS = 8
#: Prefix of the names of our contenders.
_OURS = "jobworker"
PARTS = ("throughput", "chapters", "latency", "idle")
#: A change by less is noise on a shared machine.
_TOLERANCE = 0.10
#: A chapter as novels are written: 5 kB of UTF-8.
_CHAPTER = "雪落了一夜，天亮时山路已经看不见了。她推开门，听见远处有人在唱一支很老的歌。" * 44


class Figure(NamedTuple):
    """One figure of one contender. ``part`` groups a table and a plot."""

    part: str
    contender: str
    name: str
    value: float
    higher_is_better: bool

    @property
    def key(self) -> str:
        """Its name in comparisons."""
        return f"{self.part} · {self.contender} · {self.name}"


class Sizes(NamedTuple):
    """How much is measured."""

    jobs: int
    peer_jobs: int
    chapters: int
    latency_jobs: int
    repeat: int

    def scaled(self, factor: float) -> "Sizes":
        """Other numbers of jobs, at least 10."""
        return Sizes._make([*(max(10, round(jobs * factor)) for jobs in self[:-1]), self.repeat])


FULL = Sizes(200_000, 10_000, 20_000, 400, 3)
QUICK = Sizes(30_000, 5_000, 3_000, 60, 1)

#: Further programs: name, arguments, and the figures of their reports.
_OTHERS: dict[str, tuple[str, ...]] = {
    "chaos": ("chaos.py", "--seed", "1"),
    "memory": ("memory.py",),
    "embed": ("embed.py",),
    "writeback": ("writeback.py",),
    "rebuild": ("rebuild.py",),
    "audit": ("audit.py",),
}

Make = Callable[[], Contender]
Run = Callable[[Make], dict[str, float]]


@contextmanager
def _opened(make: Make) -> Iterator[Contender]:
    contender = make()
    try:
        yield contender
    finally:
        contender.close()


def throughput(make: Make, jobs: int, procs: int) -> dict[str, float]:
    """Jobs per second from the release to the last acknowledgement; CPU time a job of the whole tree."""
    with _opened(make) as contender:
        contender.fill(jobs)
        with contender.running(procs) as roots:
            pids = trees(roots)
            before_s, began = cpu_s(pids), time.monotonic()
            contender.release(jobs)
            _await_drained(contender)
            took_s = time.monotonic() - began
            used_s = cpu_s(pids) - before_s
    return {"jobs/s": jobs / took_s, "CPU µs a job": used_s / jobs * 1e6}


def _await_drained(contender: Contender) -> None:
    give_up_at = time.monotonic() + LIMIT_S
    while not contender.drained:
        if time.monotonic() > give_up_at:
            raise RuntimeError(f"not drained within {LIMIT_S:.0f} s")
        time.sleep(_POLL_S)  # a queue has no event that says "all done"


def latency(make: Make, jobs: int, procs: int) -> dict[str, float]:
    """Milliseconds from enqueuing a job with the system's own client to its handler's start."""
    with _opened(make) as contender, tempfile.TemporaryDirectory() as folder:
        stamps = Path(folder) / "stamps"
        stamps.touch()
        with contender.running(procs, BENCH_STAMPS=str(stamps)):
            sent = contender.send(WARM_UP_JOBS + jobs, EVERY_S)
            started = started_ns(stamps, len(sent))
    found = percentiles(sorted(delays_ms(sent, started)))
    return {"p50 ms": found["p50"], "p99 ms": found["p99"]}


def idle(make: Make, procs: int) -> dict[str, float]:
    """Memory and CPU of the whole tree without a job."""
    with _opened(make) as contender, contender.running(procs) as roots:
        time.sleep(_IDLE_AFTER_S)  # imports and first reports are over
        pids = trees(roots)
        before_s = cpu_s(pids)
        time.sleep(_IDLE_S)  # the measurement is a length of time
        used_s = cpu_s(pids) - before_s
        return {"PSS MiB": pss_mib(pids), "processes": len(pids), "CPU %": 100 * used_s / _IDLE_S}


class Comparison:
    """The contenders on one server; a method per part of the report."""

    def __init__(
        self, url: str, client: Any, sizes: Sizes, procs: int, systems: Mapping[str, PeerSystem]
    ) -> None:
        self._url = url
        self._client = client
        self._sizes = sizes
        self._procs = procs
        self._peers: dict[str, Make] = {
            name: partial(Other, url, client, one) for name, one in systems.items()
        }

    def _ours(self, handler: str, payload: str | None = None) -> dict[str, Make]:
        """The service with both forms of a handler of ``bench_handlers``, and the bare loop."""
        make = partial(Ours, self._url, self._client, payload=payload)
        return {
            "jobworker, handle": partial(make, f"bench_handlers:{handler}"),
            "jobworker, handle_batch": partial(make, f"bench_handlers:{handler}Batch"),
            "bare loop": partial(Bare, self._url, self._client, payload=payload),
        }

    def throughput(self) -> Iterator[Figure]:
        """Drain of small jobs. Peers get fewer: they are slower by one order of magnitude."""
        for contenders, jobs in (
            (self._ours("Noop"), self._sizes.jobs),
            (self._peers, self._sizes.peer_jobs),
        ):
            run = partial(throughput, jobs=jobs, procs=self._procs)
            yield from self._medians("Throughput, jobs of 400 bytes", contenders, run, higher="jobs/s")

    def chapters(self) -> Iterator[Figure]:
        """Drain of jobs with Chinese text."""
        payload = orjson.dumps({"tenant_id": "t001", "texts": [_CHAPTER]}).decode()
        run = partial(throughput, jobs=self._sizes.chapters, procs=self._procs)
        yield from self._medians(
            "Throughput, chapters of 5 kB", self._ours("Noop", payload), run, higher="jobs/s"
        )

    def latency(self) -> Iterator[Figure]:
        """Single jobs on an idle system."""
        run = partial(latency, jobs=self._sizes.latency_jobs, procs=self._procs)
        yield from self._medians("Idle latency", self._ours("Stamp") | self._peers, run)

    def idle(self) -> Iterator[Figure]:
        """Memory and CPU without a job; jobworker without a model."""
        for procs in dict.fromkeys((self._procs, _MANY_WORKERS)):
            contenders = self._ours("Noop") | self._peers
            yield from self._medians(f"Idle tree, {procs} workers", contenders, partial(idle, procs=procs))

    def _medians(
        self, part: str, contenders: Mapping[str, Make], run: Run, higher: str = ""
    ) -> Iterator[Figure]:
        """Medians; the contenders take turns. `higher` names the figure of which more is better."""
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
        for turn in range(1, self._sizes.repeat + 1):
            for name, make in contenders.items():
                runs[name].append(run(make))
                shown = ", ".join(f"{value:,.1f} {unit}" for unit, value in runs[name][-1].items())
                say(f"{part} {turn}/{self._sizes.repeat}, {name}: {shown}")
        for name, found in runs.items():
            for figure in found[0]:
                value = statistics.median(one[figure] for one in found)
                yield Figure(part, name, figure, round(value, 3), figure == higher)


def ratios(figures: list[Figure]) -> list[Figure]:
    """Each figure of ours by that of the bare loop: figures that survive a change of machine."""
    bare = {(one.part, one.name): one.value for one in figures if one.contender == "bare loop"}
    return [
        one._replace(name=f"{one.name} / bare", value=round(one.value / bare[one.part, one.name], 3))
        for one in figures
        if one.contender.startswith(_OURS) and bare.get((one.part, one.name))
    ]


def run_others() -> dict[str, Any]:
    """The reports of the further programs; a program that fails is an error text."""
    reports: dict[str, Any] = {}
    for name, (program, *arguments) in _OTHERS.items():
        say(f"{name} …")
        command = [sys.executable, str(_FOLDER / program), *arguments, "--json"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        lines = done.stdout.strip().splitlines()
        reports[name] = (
            orjson.loads(lines[-1]) if done.returncode == 0 and lines else f"exit {done.returncode}"
        )
    return reports


def worse(before: dict[str, Any], figures: list[Figure], tolerance: float) -> list[str]:
    """What got worse than in an earlier report, one line each. On another CPU only ratios are compared."""
    old = {Figure(*one).key: Figure(*one) for one in before["figures"] + before["ratios"]}
    found = []
    for one in figures:
        was = old.get(one.key)
        if was is None or not was.value or not one.value:
            continue
        change = one.value / was.value if one.higher_is_better else was.value / one.value
        if change < 1 - tolerance:
            found.append(f"{one.key}: {was.value:,g} → {one.value:,g} ({change:.2f} ×)")
    return found


@click.command(help=__doc__)
@click.option("--quick", is_flag=True, help="Less than 3 minutes: the comparisons only.")
@click.option("--part", "parts", type=click.Choice(PARTS), multiple=True,
              help="Only these comparisons; repeatable.")  # fmt: skip
@click.option("--peers/--no-peers", default=True, show_default=True,
              help="Dramatiq and huey, each installed into an environment in the cache folder.")  # fmt: skip
@click.option("--scale", type=click.FloatRange(0, min_open=True), default=1.0, show_default=True,
              help="Multiplies the numbers of jobs.")  # fmt: skip
@click.option("--procs", type=click.IntRange(1), default=2, show_default=True, help="Workers of each system.")
@click.option("--repeat", type=click.IntRange(1), help="Runs of each.  [default: 3; with --quick 1]")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("bench-report"),
              show_default=True, help="Folder of the report.")  # fmt: skip
@click.option("--against", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="An earlier report.json.")  # fmt: skip
@click.option("--tolerance", type=click.FloatRange(0, 1, max_open=True), default=_TOLERANCE,
              show_default=True, help="Share by which a figure may be worse.")  # fmt: skip
def main(
    quick: bool,
    peers: bool,
    parts: tuple[str, ...],
    scale: float,
    procs: int,
    repeat: int | None,
    out: Path,
    against: Path | None,
    tolerance: float,
) -> None:
    """Measure, write the report, compare."""
    before = orjson.loads(against.read_text()) if against else None
    sizes, systems = (QUICK if quick else FULL).scaled(scale), PEER_SYSTEMS if peers else {}
    if repeat:
        sizes = sizes._replace(repeat=repeat)
    with server("") as url, connect(url) as client:
        facts = host_facts(client)
        comparison = Comparison(url, client, sizes, procs, systems)
        figures = [one for part in parts or PARTS for one in getattr(comparison, part)()]
    versions = {name: system.peer.version() for name, system in systems.items()}
    report = {
        "bench": "run",
        "host": facts | versions,
        "sizes": sizes._asdict(),
        "procs": procs,
        "figures": figures,
        "ratios": ratios(figures),
        "others": {} if quick or parts else run_others(),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(safe_json(report, indent=True))
    write_html(report, out / "report.html")
    print(format_report(report))
    print(f"\n{out / 'report.html'}")
    if before is not None:
        sys.exit(_compare(before, report, tolerance))


def _compare(before: dict[str, Any], report: dict[str, Any], tolerance: float) -> int:
    """Print what got worse; returns the exit code."""
    same_machine = before["host"]["cpu"] == report["host"]["cpu"]
    ours = [one for one in report["figures"] if one.contender.startswith(_OURS)]
    found = worse(before, [*(ours if same_machine else ()), *report["ratios"]], tolerance)
    print("\n".join(["worse:", *found]) if found else "nothing got worse")
    return 1 if found else 0


def format_report(report: dict[str, Any]) -> str:
    """The figures as tables."""
    lines = [
        format_facts(report["host"]),
        f"medians of {report['sizes']['repeat']} runs, {report['procs']} workers",
    ]
    figures = [Figure(*one) for one in report["figures"]]
    for part in dict.fromkeys(one.part for one in figures):
        mine = [one for one in figures if one.part == part]
        names = list(dict.fromkeys(one.name for one in mine))
        cells = {(one.contender, one.name): f"{one.value:,.1f}" for one in mine}
        rows = [(part, *names)]
        rows += [
            (contender, *(cells[contender, name] for name in names))
            for contender in dict.fromkeys(one.contender for one in mine)
        ]
        lines += ["", table(rows)]
    lines += ["", *(f"{one.part}, {one.contender}: {one.name} {one.value:.2f}" for one in report["ratios"])]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
