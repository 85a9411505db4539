"""Comparison with other job systems: the same jobs, kills and oracle; lost jobs, repetitions, recovery.

Each peer is installed into a virtual environment of its own in the user's cache folder. It runs with the
settings that suit it best (see ``--help`` of this program and ``bench/peers``). Workers are killed. The
server is killed and restarted on its data, to which it syncs every write before it answers. Killed processes
restart after 0.1 s, as with a service manager. Malformed jobs are left out: clients do not send them.

A job counts as not done if its client confirmed it and its effect is missing at the end. The end is when all
other effects are there and it was not started for two minutes. Meanwhile one more job a second arrives,
because some systems recover jobs of dead workers only while there is work.
"""

import contextlib
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import options
from chaos_events import END, START, EventLog
from chaos_load import SHARES, Planned, plan
from chaos_peer import PEERS, Consumers, Feed, Peer, environment_of
from chaos_report import percentile
from chaos_world import POLL_S, Server
from hosts import host_facts, table
from tqdm import tqdm

from jobworker.worker.safe_text import safe_json

#: A job that was not started for this long counts as never done. RQ waits for 60 s and more.
_QUIET_S = 120.0
#: Timeout of the whole wait: a job that is restarted again and again counts as never done.
_END_WITHIN_S = 400.0
#: Interval between jobs after the last fault.
_TRICKLE_S = 1.0
#: Prefix of their ids; they are not counted.
_LATE = "late-"
#: Timeout of the wait for a worker that runs a job.
_BUSY_WITHIN_S = 2.0
#: Every tenth fault kills the server, as in a full run of chaos.py.
_SERVER_KILL_EVERY = 10

Fault = dict[str, Any]


def _fault(kind: str, server: Server, consumers: Consumers, event_log: EventLog, rng: random.Random) -> Fault:
    """Inject a fault; `held` are the jobs that the killed processes were running."""
    mono_s = time.monotonic()
    if kind == "worker":
        give_up_at = mono_s + _BUSY_WITHIN_S
        while not (killed := consumers.kill_one(event_log.running(), rng)) and mono_s < give_up_at:
            time.sleep(POLL_S / 10)  # a file that grows has no event without inotify
            mono_s = time.monotonic()
        running = event_log.running()
        return {"kind": kind, "mono_s": mono_s, "held": {id for pid in killed for id in running.get(pid, ())}}
    server.kill()
    time.sleep(rng.uniform(0.1, 2.0))  # the fault is a length of time
    server.start()
    return {"kind": kind, "mono_s": time.monotonic(), "held": set()}


def _await_end(event_log: EventLog, feed: Feed, expected: set[str]) -> None:
    """Wait until every expected effect is there, or no missing job was started for a long time."""
    began = time.monotonic()
    late = 0
    while missing := expected - event_log.effects().keys():
        late += 1
        feed.send([Planned(f"{_LATE}{late:06d}", "ok", "t00.late", {})])
        last = max((event.mono_s for event in event_log.read() if event.id in missing), default=began)
        now = time.monotonic()
        if now - max(last, began) > _QUIET_S or now - began > _END_WITHIN_S:
            return
        time.sleep(_TRICKLE_S)  # the interval is intended


def _recoveries(faults: list[Fault], event_log: EventLog, kind: str, succeeds: set[str]) -> dict[str, Any]:
    """Time from each kill to the restart of the interrupted jobs; for the server, to the next job start."""
    starts = [event for event in event_log.read() if event.what == START]
    took, never = [], 0
    for fault in faults:
        after = [event for event in starts if event.mono_s > fault["mono_s"]]
        if fault["kind"] != kind:
            continue
        if kind == "redis":
            took += [after[0].mono_s - fault["mono_s"]] if after else []
            continue
        for id in fault["held"] & succeeds:
            again = next((event.mono_s for event in after if event.id == id), None)
            if again is None:
                never += 1
            else:
                took.append(again - fault["mono_s"])
    took.sort()
    return {"measured": len(took), "never": never, "p50_s": percentile(took, 0.5),
            "p99_s": percentile(took, 0.99), "max_s": round(took[-1], 3) if took else None}  # fmt: skip


def _counts(event_log: EventLog, feed: Feed, succeeds: set[str], poison: set[str]) -> dict[str, Any]:
    effects = event_log.effects()
    confirmed = {id for id in feed.confirmed if not id.startswith(_LATE)}
    not_done = sorted((confirmed & succeeds) - effects.keys())
    ends = [event.id for event in event_log.read() if event.what == END and not event.id.startswith(_LATE)]
    of_poison = [event.id for event in event_log.read() if event.what == START and event.id in poison]
    return {
        "confirmed": len(confirmed), "unknown": len(feed.unknown), "not_done": len(not_done),
        "not_done_ids": not_done[:20],
        "effect_duplicates": sum(len(keys) > 1 for keys in effects.values()),
        "executions": len(ends), "repeated": len(ends) - len(set(ends)),
        "poison_starts_max": max(map(of_poison.count, set(of_poison)), default=0),
    }  # fmt: skip


def measure(peer: Peer, options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run one peer with faults."""
    rng = random.Random(options["seed"])
    fates = {"ok", *SHARES} - {"malformed"}
    jobs = [job for job in plan(options["jobs"], rng) if job.fate in fates]
    for name in ("tmp", "tried", "server"):
        (folder / name).mkdir()
    kinds = ["redis" if n % _SERVER_KILL_EVERY == 0 else "worker" for n in range(1, options["kills"] + 1)]
    with contextlib.ExitStack() as stack:
        server = Server(folder / "server")
        stack.callback(server.stop)
        server.start()
        event_log = EventLog(folder)
        stack.callback(event_log.close)
        surroundings = environment_of(folder, server.url)
        consumers = Consumers(peer, options["procs"], server.url, surroundings, folder)
        stack.callback(consumers.stop)
        feed = Feed(peer, surroundings, folder)
        stack.callback(feed.stop)
        faults = []
        started = time.monotonic()
        for number, kind in enumerate(tqdm(kinds, desc=peer.name, disable=None, file=sys.stderr)):
            next_at = time.monotonic() + options["pace"]
            share = jobs[number * len(jobs) // len(kinds) : (number + 1) * len(jobs) // len(kinds)]
            feed.send(share)
            time.sleep(rng.uniform(0.0, 0.15))  # a random moment of the burst
            faults.append(_fault(kind, server, consumers, event_log, rng))
            time.sleep(max(0.0, next_at - time.monotonic()))  # the requested pace
        feed.finish()
        succeeds = {job.id for job in jobs if job.effect}
        _await_end(event_log, feed, feed.confirmed & succeeds)
        poison = {job.id for job in jobs if job.fate == "poison"}
        return {
            "peer": peer.name, "version": peer.version(), "settings": peer.settings,
            "took_s": round(time.monotonic() - started, 1), **_counts(event_log, feed, succeeds, poison),
            "worker": _recoveries(faults, event_log, "worker", succeeds),
            "redis": _recoveries(faults, event_log, "redis", succeeds), "host": host_facts(server.client),
        }  # fmt: skip


def _table(reports: list[dict[str, Any]]) -> str:
    head = ("peer", "version", "confirmed", "not done", "effects twice", "repeated", "poison starts",
            "again p50 s", "p99 s", "max s", "never", "after server max s")  # fmt: skip
    rows: list[tuple[str, ...]] = [head]
    for report in reports:
        worker, server = report["worker"], report["redis"]
        cells = (report["peer"], report["version"], report["confirmed"], report["not_done"],
                 report["effect_duplicates"], report["repeated"], report["poison_starts_max"],
                 worker["p50_s"], worker["p99_s"], worker["max_s"], worker["never"],
                 server["max_s"])  # fmt: skip
        rows.append(tuple("-" if cell is None else str(cell) for cell in cells))
    return table(rows) + "\n\n" + "\n".join(f"{report['peer']}: {report['settings']}" for report in reports)


def _named(_: click.Context, __: click.Parameter, text: str) -> list[Peer]:
    names = text.split(",")
    if unknown := [name for name in names if name not in PEERS]:
        raise click.BadParameter(f"no peer {', '.join(unknown)}; there are: {', '.join(PEERS)}")
    return [PEERS[name] for name in names]


@click.command(help=__doc__)
@click.option(
    "--peers", default=",".join(PEERS), callback=_named, show_default=True, help="Names, separated by commas."
)
@click.option("--jobs", default=2000, show_default=True, type=click.IntRange(10))
@click.option(
    "--kills",
    default=40,
    show_default=True,
    type=click.IntRange(1),
    help="Kills; one in ten is of the server.",
)
@click.option(
    "--pace", default=1.0, show_default=True, type=click.FloatRange(0), help="Seconds for each fault."
)
@click.option("--procs", default=8, show_default=True, type=click.IntRange(1), help="Worker processes.")
@options.seed
@options.as_json
@click.option("--keep", is_flag=True, help="Keep the folders with logs and events, and print their names.")
def main(peers: list[Peer], as_json: bool, keep: bool, **options: Any) -> None:
    """See the help above."""
    if options["seed"] is None:
        options["seed"] = random.SystemRandom().randrange(10**6)
    print(f"seed {options['seed']}", file=sys.stderr, flush=True)
    reports = []
    for peer in peers:
        peer.install()
        folder = Path(tempfile.mkdtemp(prefix=f"jobworker-chaos-{peer.name}"))
        try:
            reports.append(measure(peer, options, folder))
        finally:
            if keep:
                print(f"kept {folder}", file=sys.stderr)
            else:
                shutil.rmtree(folder, ignore_errors=True)
    print(safe_json({"options": options, "peers": reports}) if as_json else _table(reports))


if __name__ == "__main__":
    main()
