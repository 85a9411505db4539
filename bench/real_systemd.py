"""Test of the units with a real systemd: start, embed, reload, hang, out of memory, lost store, stop.

Needs root, debootstrap and systemd-nspawn (Debian: apt-get install debootstrap systemd-container). A small
Debian is created once in --base. Each run installs the project as a wheel into a disposable copy, boots it,
and prints the commands with their output. The libraries are those of the environment of this program. Exit
code 1: a check failed.
"""

import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import orjson
from nspawn import Machine, make_base, missing, wait_for

_ROOT = Path(__file__).resolve().parents[1]
_UNIT, _CONFIG = "jobworker.service", "/etc/jobworker/jobworker.toml"
#: Shorter than the unit's 60 s, since every hang in this test lasts that long.
_WATCHDOG_S, _DRAIN_S = 10, 8
#: Enough for two workers with the small model and both stores, but not for the handler that exhausts memory.
_MEMORY_MIB = 3500
_SOON_S = 90.0
#: Highest accepted score of `systemd-analyze security`, without and with the drop-in for a GPU.
_EXPOSURE, _EXPOSURE_GPU = 1.0, 1.3
_PASSWORD = "open-sesame"
#: Finds the password, but not the command line of the search itself.
_PATTERN = "open-se[s]ame"
_EMBED = '{"tenant_id": "t1", "project_id": "p1", "ids": ["s1"], "texts": ["It rained on the harbour."]}'
_HANDLERS = "nap=systemd_handlers:Nap eat=systemd_handlers:Eat"
_FILES = {
    _CONFIG: f'redis-url = "redis://:{_PASSWORD}@127.0.0.1:6379/0"\n',
    "/etc/jobworker/jobworker.env": f"JOBWORKER_PROCS=2\nJOBWORKER_HANDLER={_HANDLERS}\n"
    f"JOBWORKER_DRAIN_TIMEOUT={_DRAIN_S}\nJOBWORKER_RETRY_INITIAL=0.2\nPYTHONPATH=/opt/demo\nHF_HUB_OFFLINE=1\n",
    # The service of the template has no password file: it uses embedded stores.
    "/etc/jobworker/story.env": "JOBWORKER_PROCS=1\nJOBWORKER_NO_BUILTIN_HANDLERS=1\n"
    "JOBWORKER_HANDLER=nap=systemd_handlers:Nap\nPYTHONPATH=/opt/demo\nJOBWORKER_METRICS_ADDR=127.0.0.1:9465\n",
    f"/etc/systemd/system/{_UNIT}.d/test.conf": f"[Service]\nWatchdogSec={_WATCHDOG_S}\n",
}  # fmt: skip


class Failed(Exception):
    """A check failed."""


class Host:
    """Shell of the container; commands are printed with their output."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def quiet(self, *command: str) -> str:
        """Output of a command."""
        return self._machine.run(*command).stdout.strip()

    def show(self, command: str, *, code: int = 0) -> str:
        """Run a shell command and print it with its output. Raises `Failed` for another exit code."""
        began_s = time.monotonic()
        done = self._machine.run("sh", "-c", command)
        took_s = time.monotonic() - began_s
        print(f"# {command}" + (f"        [{took_s:.1f} s]" if took_s > 1 else ""))
        if done.stdout.strip():
            print(done.stdout.rstrip())
        if done.returncode != code:
            raise Failed(f"{command}: exit code {done.returncode}")
        return done.stdout

    def verb(self, text: str) -> str:
        """Run a command of `jobworker` with the service's configuration."""
        return self.show(f"jobworker {text} --config {_CONFIG}")

    def property(self, name: str, unit: str = _UNIT) -> str:
        """A property of a unit."""
        return self.quiet("systemctl", "show", unit, f"--property={name}", "--value")

    def stats(self) -> Any:
        """`jobworker stats` as JSON."""
        return orjson.loads(self.quiet("jobworker", "stats", "--json", f"--config={_CONFIG}"))

    def done(self, kind: str) -> float:
        """Finished jobs of a type since the start of the supervisor."""
        return float(self.stats()["totals"].get(kind, {}).get("done", 0.0))

    def waiting(self) -> int:
        """Number of unfinished jobs."""
        rows = self.stats()["streams"]
        return sum(int(row["queued"] + row["pending"] + row["retrying"]) for row in rows)

    def workers(self) -> set[int]:
        """Process ids of the workers."""
        children = self.stats()["services"][0].get("children", ())
        return {child["pid"] for child in children if child["role"] == "worker"}


def expect(fine: bool, what: str) -> None:
    """Print a statement that holds; raise `Failed` if it does not."""
    if not fine:
        raise Failed(what)
    print(f"=> {what}")


def units_are_well_made(host: Host) -> None:
    """`systemd-analyze` finds no fault and a low exposure."""
    host.show("systemd-analyze verify jobworker.service jobworker@story.service")
    for unit in (_UNIT, "jobworker@story.service"):
        expect(_exposure(host, unit) <= _EXPOSURE, f"{unit}: at most {_EXPOSURE}")
    gpu = f"/etc/systemd/system/{_UNIT}.d/gpu.conf"
    host.show(f"cp /opt/units/{_UNIT}.d/gpu.conf {gpu} && systemctl daemon-reload")
    exposure = _exposure(host, _UNIT)
    host.show(f"rm {gpu} && systemctl daemon-reload")
    expect(exposure <= _EXPOSURE_GPU, f"with the GPU: at most {_EXPOSURE_GPU}")


def _exposure(host: Host, unit: str) -> float:
    says = host.show(f"systemd-analyze security --no-pager {unit} | tail -1")
    found = re.search(r"(\d+\.\d+) ", says)
    if not found:
        raise Failed("no score")
    return float(found[1])


def user_and_folders(host: Host) -> None:
    """sysusers and tmpfiles create the user and its folders."""
    host.show("systemd-sysusers && getent passwd jobworker")
    host.show("systemd-tmpfiles --create jobworker.conf && stat --format '%A %U %n' /etc/jobworker")


def it_starts(host: Host) -> None:
    """`systemctl start` waits for READY=1: every worker has its model, both stores answer."""
    host.show(f"systemctl start {_UNIT}")
    expect(host.property("ActiveState") == "active", "started is ready")
    host.show("ps -o user:16,rss,args --ppid $(systemctl show --property=MainPID --value jobworker)")


def a_password_stays_where_it_is(host: Host) -> None:
    """Only the service can read the credential, and the password appears nowhere else."""
    host.show("ls -l /run/credentials/jobworker.service/")
    host.show("setpriv --reuid=nobody cat /run/credentials/jobworker.service/jobworker.toml", code=1)
    for where in ("/proc/[0-9]*/cmdline /proc/[0-9]*/environ", "-r /var/log"):
        host.show(f"grep -al '{_PATTERN}' {where}", code=1)
    host.show(f"{{ journalctl; systemctl show {_UNIT}; }} | grep '{_PATTERN}'", code=1)


def it_embeds(host: Host) -> None:
    """One embedding job, from the command line to Milvus."""
    host.verb(f"enqueue embedding_batch --id first --tenant t1 --project p1 --payload '{_EMBED}'")
    wait_for("embedded", lambda: host.done("embedding_batch") == 1, _SOON_S)
    time.sleep(3)  # the status line is renewed every two seconds
    says = host.show(f"systemctl status --no-pager --lines=0 {_UNIT}")
    expect(
        "2 workers, " in says and " jobs/s, 0 retrying, 0 dead" in says,
        "the status line shows workers, rate and failures",
    )


def a_reload_drops_no_job(host: Host) -> None:
    """HUP: workers are replaced one by one while jobs run; systemd shows `reloading` meanwhile."""
    before, supervisor = host.workers(), host.property("MainPID")
    host.verb("enqueue nap --payload '{\"s\": 0.05}' --stream stream:audit:log --count 400")
    host.show(f"systemctl reload --no-block {_UNIT}")
    wait_for("reloading", lambda: host.property("ActiveState") == "reloading", 10.0)
    time.sleep(3)  # half-way through, and until the status line shows a rate
    host.show(f"systemctl status --no-pager --lines=0 {_UNIT} | grep -E 'Active|Status'")
    took_s = wait_for("reloaded", lambda: host.property("ActiveState") == "active", _SOON_S)
    wait_for("all done", lambda: host.done("nap") == 400, _SOON_S)
    expect(not before & host.workers(), f"both workers are new, {took_s:.0f} s later")
    totals = host.stats()["totals"]["nap"]
    expect(host.property("MainPID") == supervisor, "the supervisor is the same")
    expect((totals["done"], totals["failed"]) == (400, 0), "400 of 400 jobs done, none failed")


def a_hung_supervisor_is_started_again(host: Host) -> None:
    """A stopped supervisor misses its watchdog: systemd restarts the unit, and no job is lost."""
    supervisor = host.property("MainPID")
    host.verb("enqueue nap --id long --payload '{\"s\": 20}' --stream stream:audit:log")
    wait_for(
        "it runs", lambda: "running" in host.quiet("jobworker", "explain", "long", f"--config={_CONFIG}"), 10
    )
    host.show(f"kill -STOP {supervisor}")
    took_s = wait_for("restart", lambda: _is_another(host, supervisor), _SOON_S)
    host.show(
        f"journalctl --no-pager --output=cat --unit={_UNIT}"
        " | grep -a -i -E 'watchdog|scheduled restart' | tail -4"
    )
    expect(host.property("NRestarts") == "1", f"started again and ready after {took_s:.0f} s")
    wait_for("the job", lambda: not host.waiting(), _SOON_S)
    expect(host.stats()["totals"]["nap"]["done"] == 1, "the job that it ran was run again")


def _is_another(host: Host, supervisor: str) -> bool:
    return host.property("ActiveState") == "active" and host.property("MainPID") not in (supervisor, "0")


def a_store_that_is_away_is_no_hang(host: Host) -> None:
    """An outage of the store does not trigger the watchdog."""
    supervisor = host.property("MainPID")
    host.show(f"systemctl stop redis-server && sleep {_WATCHDOG_S * 2.5:.0f}")
    host.show(f"systemctl status --no-pager --lines=0 {_UNIT} | grep -E 'Active|Status'")
    expect(
        host.property("MainPID") == supervisor,
        f"still running after {_WATCHDOG_S * 2.5:.0f} s without its store",
    )
    host.show("systemctl start redis-server")
    wait_for("ready", lambda: "jobs/s" in host.property("StatusText"), _SOON_S)
    host.verb("enqueue nap --payload '{\"s\": 0}' --stream stream:audit:log")
    took_s = wait_for("the job", lambda: not host.waiting(), _SOON_S)
    expect(True, f"a job sent afterwards is done within {took_s:.0f} s")


def out_of_memory_costs_a_worker(host: Host) -> None:
    """The kernel kills only the worker that exhausts memory; its job is dead-lettered as poison."""
    supervisor, restarts = host.property("MainPID"), host.property("NRestarts")
    host.verb("enqueue eat --id eater --stream stream:audit:log")
    wait_for("the dead letter", lambda: any(row["dead"] for row in host.stats()["streams"]), _SOON_S)
    wait_for("ready", lambda: "1 dead" in host.property("StatusText"), _SOON_S)
    host.verb("dlq list")
    host.show(
        f"journalctl --no-pager --output=cat --unit={_UNIT}"
        " | grep -a '\"child.exited\"' | grep -a -o '\"child.*' | cut -c-100"
    )
    host.show(f"systemctl status --no-pager --lines=0 {_UNIT} | grep -E 'Active|Status'")
    expect(host.property("MainPID") == supervisor, "the supervisor is the same")
    expect(host.property("NRestarts") == restarts, "the unit was not started again")
    host.verb("dlq purge --all --yes")


def a_stop_lets_jobs_end(host: Host) -> None:
    """Running jobs may end within the drain timeout; others wait for the next start."""
    host.verb("enqueue nap --id short --payload '{\"s\": 3}' --stream stream:audit:log --count 2")
    host.verb("enqueue nap --id later --payload '{\"s\": 0.1}' --stream stream:audit:log --count 20")
    time.sleep(1)  # for two of them to be under way
    began_s = time.monotonic()
    host.show(f"systemctl stop {_UNIT}")
    took_s = time.monotonic() - began_s
    expect(took_s < _DRAIN_S and host.property("Result") == "success", f"stopped in {took_s:.1f} s")
    left = host.waiting()
    expect(left >= 18, f"{left} jobs wait")
    host.show(f"systemctl start {_UNIT}")
    wait_for("the others", lambda: not host.waiting(), _SOON_S)
    expect(host.done("nap") == left, "the next start ran exactly these")


def a_stop_ends_at_the_drain_timeout(host: Host) -> None:
    """A job that exceeds the drain timeout is returned without a counted try."""
    host.verb("enqueue nap --id endless --payload '{\"s\": 100}' --stream stream:audit:log")
    time.sleep(1)  # for it to be under way
    began_s = time.monotonic()
    host.show(f"systemctl stop {_UNIT}")
    took_s = time.monotonic() - began_s
    expect(_DRAIN_S <= took_s < _DRAIN_S + 7, f"stopped in {took_s:.1f} s of {_DRAIN_S} s to drain")
    says = host.verb("explain endless")
    expect("gave it back" in says and "deliveries       0" in says, "it waits, and no try is counted")


def one_more_service_on_the_host(host: Host) -> None:
    """A service of the template beside the first, without a password file and with embedded stores."""
    host.show(f"systemctl start {_UNIT} jobworker@story.service")
    host.show("systemctl status --no-pager --lines=0 'jobworker@story.service' | sed -n '1,3p;/Status/p'")
    host.show(
        "jobworker enqueue nap --payload '{\"s\": 0}' --stream stream:audit:log"
        " --data-dir /var/lib/jobworker-story"
    )
    wait_for(
        "done", lambda: host.property("StatusText", "jobworker@story.service").startswith("1 worker"), _SOON_S
    )
    host.show("jobworker stats --data-dir /var/lib/jobworker-story")
    host.show(f"systemctl stop {_UNIT} jobworker@story.service")
    expect(not host.quiet("pgrep", "-f", "^jobworker: "), "nothing is left of either")


CHECKS: tuple[Callable[[Host], None], ...] = (
    units_are_well_made, user_and_folders, it_starts, a_password_stays_where_it_is, it_embeds,
    a_reload_drops_no_job, a_hung_supervisor_is_started_again, a_store_that_is_away_is_no_hang,
    out_of_memory_costs_a_worker, a_stop_lets_jobs_end, a_stop_ends_at_the_drain_timeout,
    one_more_service_on_the_host,
)  # fmt: skip


def _wheel(folder: Path) -> Path:
    """Build from a copy, since a build leaves folders in its source tree."""
    skip = shutil.ignore_patterns(".*", "tests", "bench", "samples", "jobworker-data", "build", "*.egg-info")
    shutil.copytree(_ROOT, folder / "tree", ignore=skip)
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(folder),
        str(folder / "tree"),
    ]
    subprocess.run(command, check=True, timeout=300, stdout=subprocess.DEVNULL)
    return next(folder.glob("*.whl"))


def _install(machine: Machine) -> None:
    """Install the wheel in an environment, the units, the files of the run, and a password for Redis."""
    root = machine.root
    for path, text in _FILES.items():
        _write(root / path.lstrip("/"), text)
    (root / _CONFIG.lstrip("/")).chmod(0o600)
    shutil.copytree(_ROOT / "systemd", root / "opt/units")
    for unit in ("jobworker.service", "jobworker@.service"):
        shutil.copy(_ROOT / "systemd" / unit, root / "etc/systemd/system")
    for kind in ("sysusers", "tmpfiles"):
        shutil.copy(_ROOT / f"systemd/jobworker.{kind}", root / f"usr/lib/{kind}.d/jobworker.conf")
    (root / "opt/demo").mkdir()
    shutil.copy(_ROOT / "bench/systemd_handlers.py", root / "opt/demo")
    with (root / "etc/redis/redis.conf").open("a") as file:
        file.write(f"requirepass {_PASSWORD}\nappendonly yes\nmaxmemory-policy noeviction\n")
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(_wheel(Path(folder)), root / "opt")
    machine.prepare("python3", "-m", "venv", "/opt/jobworker")
    machine.prepare("sh", "-c", "/opt/jobworker/bin/pip install --no-deps --no-index /opt/*.whl")
    _write(
        next((root / "opt/jobworker/lib").glob("python3*")) / "site-packages/libraries.pth",
        "/opt/libraries\n/usr/lib/python3/dist-packages\n",
    )


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@click.command(help=__doc__)
@click.option(
    "--base", type=click.Path(path_type=Path), default=Path("/var/tmp/jobworker-debian"), show_default=True
)
@click.option("--only", multiple=True, type=click.Choice([check.__name__ for check in CHECKS]),
              help="Run only this check (after a start); repeatable.")  # fmt: skip
def main(base: Path, only: tuple[str, ...]) -> None:
    """Run the checks in order."""
    if lacking := missing(["debootstrap", "systemd-nspawn", "nsenter"]):
        raise click.UsageError(f"not installed: {', '.join(lacking)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that context managers clean up
    make_base(base)
    chosen = [check for check in CHECKS if not only or check.__name__ in (*only, it_starts.__name__)]
    with Machine(base, _MEMORY_MIB) as machine:
        _install(machine)
        machine.boot({Path(sysconfig.get_path("purelib")): "/opt/libraries"})
        host = Host(machine)
        host.show("systemctl --version | head -1; uname -r; redis-server --version | cut -c-25")
        fine = all(
            _passes(check, host) for check in chosen
        )  # each check starts in the state that the last one left
    print("\nall checks passed" if fine else "\nfailed")
    sys.exit(not fine)


def _passes(check: Callable[[Host], None], host: Host) -> bool:
    print(f"\n## {check.__name__.replace('_', ' ')}: {check.__doc__}", flush=True)
    try:
        check(host)
    except (Failed, ValueError, TimeoutError, subprocess.TimeoutExpired) as error:
        print(f"=> FAILED: {error}")
        print(host.quiet("sh", "-c", f"journalctl --no-pager --lines=20 --unit={_UNIT} | cut -c-300"))
        return False
    return True


if __name__ == "__main__":
    main()
