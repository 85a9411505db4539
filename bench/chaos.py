"""Chaos test: inject faults into a running service, then account for every job.

Starts a server that syncs every write before it answers, and a service behind a proxy. Sends jobs in bursts
and injects one fault during each burst. Recovery is the time from the fault to the next start of a job that
it delayed. At the end, an oracle looks for lost, unexpected and duplicated jobs. It knows only what the
server confirmed and what the handlers recorded.

The printed seed reproduces jobs and faults, but not their timing. Exit code 0: every promise was kept;
1: at least one was broken.
"""

import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import options
from chaos_events import START, EventLog
from chaos_faults import (
    DESTRUCTIVE,
    FAULTS,
    HOST,
    KILLS,
    KINDS,
    InjectedFault,
    World,
    excused_promises,
    schedule,
)
from chaos_flow import CRON, FlowSender, cron_cursors, stop_cron, with_flow
from chaos_flow_oracle import Seen, Watcher, check_flow
from chaos_limits import check_limits
from chaos_load import LIMITS, Ledger, Producer, plan
from chaos_oracle import Verdict, judge, letters_of
from chaos_proxy import Proxy
from chaos_report import format_report, quick, recoveries, verdict_of
from chaos_rest import (
    await_rest,
    descriptors,
    leaked_descriptors,
    left_behind,
    rings_not_empty,
    shared_memory,
)  # fmt: skip
from chaos_world import LIMIT_S, POLL_S, Server, Service
from hosts import host_facts
from rig import connect
from tqdm import tqdm

from jobworker.worker.safe_text import safe_json

#: Timeout of a recovery in seconds; after it, the recovery counts as missed.
_RECOVERY_WITHIN_S = 30.0


class Run:
    """One run; `close` ends everything that it started."""

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        self._options = options
        self._folder = folder
        for name in ("tmp", "server"):
            (folder / name).mkdir()
        rng = random.Random(options["seed"])
        self._jobs = plan(options["jobs"], rng)
        self._faults = schedule(options["faults"], options["kills"], rng)
        self._shm = shared_memory()
        self._server = Server(folder / "server")
        self._server.start()
        self._proxy = Proxy(self._server.port)
        ledger, sender = Ledger(), None
        if options["flow"]:
            self._jobs = with_flow(self._jobs, random.Random(options["seed"]))
            sender = FlowSender(self._server.url, ledger, self._jobs)
            self._watcher = Watcher(connect(self._server.url), ledger)
        self._producer = Producer(self._server.url, self._jobs, ledger, sender)
        self._event_log = EventLog(folder)
        url = f"redis://127.0.0.1:{self._proxy.port}/0"
        procs = -(-options["procs"] // options["services"])
        config = folder / "jobworker.toml"
        config.write_text((LIMITS if options["limits"] else "") + (CRON if options["flow"] else ""))
        self._services = [
            Service(folder, f"chaos-{number}", url, procs, options["lease"], config)
            for number in range(options["services"])
        ]
        self._world = World(
            self._server,
            self._proxy,
            self._services,
            self._event_log,
            self._producer.ledger,
            rng,
            options["lease"],
        )
        self._injected: list[InjectedFault] = []

    def __call__(self) -> dict[str, Any]:
        """Run the test; returns the report."""
        started = time.monotonic()
        self._await_ready()
        self._warm_up()
        before = descriptors(self._services)
        first_ticks = self._begin_flow()
        self._producer.start()
        self._inject_faults()
        self._producer.finish(LIMIT_S)
        ticks = stop_cron(self._server.url, LIMIT_S) if self._options["flow"] else {}
        rest: dict[str, Any] = {"unfinished": await_rest(self._server.client, self._services)}
        rest["rings not empty"] = rings_not_empty(self._services)
        rest["descriptors leaked"] = leaked_descriptors(before, self._services)
        # A reader that was stopped past its lease may not count deaths of jobs that another service claimed.
        taken_over = len(self._services) > 1
        uncounted = sum(s.ends_supervisor or (taken_over and s.kind == "stop") for s in self._injected)
        verdict = judge(self._producer.ledger, self._event_log, self._server.client, uncounted)
        if self._options["flow"]:
            self._check_flow(verdict, {name: (first_ticks[name], *ticks[name]) for name in ticks})
        excused = excused_promises(self._options["faults"])
        if self._options["limits"]:
            check_limits(verdict, self._producer.ledger, self._event_log.read(), self._strict())
            if taken_over and {HOST, "stop"} & set(self._options["faults"]):
                # A service that is stopped past its lease runs jobs of others.
                excused |= {"over_limit", "series_disorder"}
        facts = host_facts(self._server.client)
        rest |= self._end()
        rows = recoveries(self._injected, self._options["lease"])
        return {
            "seed": self._options["seed"],
            "took_s": round(time.monotonic() - started, 1),
            "excused": sorted(excused),
            "pass": not verdict.broken(excused) and not any(rest.values()) and quick(rows),
            "options": self._options,
            "jobs": verdict_of(verdict),
            "recovery": rows,
            "rest": rest,
            "refusals": self._producer.ledger.refusals,
            "host": facts,
        }

    def _begin_flow(self) -> dict[str, int]:
        """Look at the stream from now on; returns the last tick of each cron table."""
        if not self._options["flow"]:
            return {}
        self._watcher.start()
        return cron_cursors(self._server.url)

    def _check_flow(self, verdict: Verdict, ticks: dict[str, tuple[int, int, int]]) -> None:
        ledger, client = self._producer.ledger, self._server.client
        self._watcher.finish(LIMIT_S)
        events, effects = self._event_log.read(), self._event_log.effects()
        offset_s = time.time() - time.monotonic()
        letters = letters_of(client, ledger)
        check_flow(
            verdict,
            Seen(ledger, events, effects, letters, self._watcher, client, ticks, offset_s, self._world.oom),
        )

    def _strict(self) -> bool:
        """Whether a killed job keeps its slot until it starts again: no job times out in this run."""
        return set(self._options["faults"]) <= KILLS

    def _await_ready(self) -> None:
        give_up_at = time.monotonic() + LIMIT_S
        while not all(one.ready() for one in self._services):
            if time.monotonic() > give_up_at:
                raise TimeoutError("the services do not become ready")
            time.sleep(POLL_S)  # a page sends no event

    def _warm_up(self) -> None:
        """Open every long-lived connection, so that leaked descriptors can be recognised later."""
        fault = InjectedFault("", time.monotonic(), self._world.probe() | self._world.probe(by_retry=True))
        self._await_recovery(fault)
        await_rest(self._server.client, self._services)

    def _inject_faults(self) -> None:
        """Inject all faults, each during a burst of its share of the jobs, spread over the duration."""
        pace_s = self._options["duration"] / len(self._faults)
        sent = 0
        for number, kind in enumerate(tqdm(self._faults, desc="faults", disable=None, file=sys.stderr)):
            next_at = time.monotonic() + pace_s
            share = len(self._jobs) * (number + 1) // len(self._faults) - sent
            sent += share
            self._producer.burst(share)
            time.sleep(self._world.rng.uniform(0.0, 0.15))  # a random moment of the burst
            fault = FAULTS[kind](self._world)
            self._injected.append(fault)
            self._await_recovery(fault)
            time.sleep(max(0.0, next_at - time.monotonic()))  # the requested pace

    def _await_recovery(self, fault: InjectedFault) -> None:
        if not fault.awaited:
            return
        give_up_at = fault.mono_s + _RECOVERY_WITHIN_S
        while time.monotonic() < give_up_at:
            started = {}
            for event in reversed(self._event_log.read()):
                if event.mono_s < fault.mono_s - 1.0:
                    break
                if event.what == START and event.id in fault.awaited and event.mono_s >= fault.mono_s:
                    started[event.id] = event.mono_s
            if started.keys() == fault.awaited:
                fault.took_s = max(started.values()) - fault.mono_s
                return
            time.sleep(POLL_S)  # a file that grows has no event without inotify
        tqdm.write(f"no recovery from {fault.kind} {fault.detail}: {sorted(fault.awaited)}", file=sys.stderr)

    def _end(self) -> dict[str, Any]:
        codes = [service.stop() for service in self._services]
        self._proxy.close()
        exits = [f"{s.name}: exit {e.code}" for s in self._services for e in s.exits]
        return {
            "exit codes": [code for code in codes if code],
            "unexpected exits": exits,
            "orphans": [orphan for service in self._services for orphan in service.orphans],
            "left behind": left_behind(self._folder, self._shm),
            "tracebacks": self._tracebacks(),
        }

    def _tracebacks(self) -> list[str]:
        """Tracebacks of the service, without those of planned failures of handlers."""
        return [
            f"{service.name}: {message.get('msg', '')[:200]}"
            for service in self._services
            for message in service.messages()
            if ("exception" in message and message.get("msg") not in _FAILED_JOBS)
            or str(message.get("msg", "")).startswith("Traceback")
        ]

    def close(self) -> None:
        """End everything that still runs, also after an error."""
        for service in self._services:
            service.stop()
        self._server.stop()
        self._event_log.close()


#: Events with the traceback of a handler.
_FAILED_JOBS = {"job.retry_scheduled", "job.dead_lettered", "circuit.opened"}


def _kinds(_: click.Context, __: click.Parameter, text: str) -> list[str]:
    kinds = [kind for kind in text.split(",") if kind]
    if unknown := [kind for kind in kinds if kind not in FAULTS]:
        raise click.BadParameter(f"no fault {', '.join(unknown)}; there are: {', '.join(FAULTS)}")
    return kinds


def run_once(options: dict[str, Any], prefix: str, *, keep: bool) -> dict[str, Any]:
    """Run in a new folder, which is deleted unless it is to be kept; returns the report."""
    print(f"seed {options['seed']}", file=sys.stderr, flush=True)
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    try:
        run = Run(folder, options)
        try:
            return run()
        finally:
            run.close()
    finally:
        if keep:
            print(f"kept {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder, ignore_errors=True)


@click.command(help=__doc__)
@click.option("--jobs", default=20_000, show_default=True, type=click.IntRange(10))
@click.option("--kills", default=268, show_default=True, type=click.IntRange(1), help="Faults of all kinds.")
@click.option(
    "--duration",
    default=0.0,
    show_default=True,
    type=click.FloatRange(0),
    help="Shortest duration of all faults, in seconds.",
)
@click.option("--faults", default=",".join(KINDS), callback=_kinds, show_default=True,
              help=f"Kinds, separated by commas. Further kinds: {HOST} (needs --services 2); and "
              f"{', '.join(DESTRUCTIVE)}, which lose or repeat jobs by their nature.")  # fmt: skip
@options.seed
@click.option("--procs", default=8, show_default=True, type=click.IntRange(1), help="Workers in all.")
@click.option(
    "--services", default=1, show_default=True, type=click.IntRange(1), help="Services on this host."
)
@click.option("--lease", default=10.0, show_default=True, type=click.FloatRange(1), help="Seconds.")
@click.option("--limits/--no-limits", default=True, show_default=True,
              help="Limits of both job types, so that jobs wait in lanes.")  # fmt: skip
@click.option("--flow/--no-flow", default=True, show_default=True,
              help="Keys, delays, cancellations, results, batches and cron tables.")  # fmt: skip
@options.as_json
@click.option("--keep", is_flag=True, help="Keep the folder with logs and events, and print its name.")
def main(as_json: bool, keep: bool, **options: Any) -> None:
    """See the help above."""
    if options["seed"] is None:
        options["seed"] = random.SystemRandom().randrange(10**6)
    if HOST in options["faults"] and options["services"] < 2:
        raise click.UsageError(f"{HOST} needs --services 2: another service must claim the jobs")
    report = run_once(options, "jobworker-chaos", keep=keep)
    print(safe_json(report) if as_json else format_report(report))
    sys.exit(0 if report["pass"] else 1)


if __name__ == "__main__":
    main()
