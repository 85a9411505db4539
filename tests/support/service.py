"""Run the installed service for a test: start it, talk to it, end it, and see that nothing of it is left."""

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

import redis
from prometheus_client.parser import text_string_to_metric_families

from jobworker.worker.supervision.pdeathsig import tied_to_us
from support.toys import EVENTS_FILE, FOLDER_VARIABLE, Event, read_event

COMMAND = Path(sys.executable).parent / "jobworker-supervise"
TESTS = Path(__file__).parent.parent

#: Five interpreters start at once on a machine that may be busy with other suites.
READY_WITHIN_S = 60.0
#: What must happen soon; far above the promised times, for a busy machine makes everything late.
SOON_S = 40.0
#: Interval between two looks at first, for how long, and later: a look may cost milliseconds of a processor.
FAST_LOOK_S, FAST_LOOKS_S, SLOW_LOOK_S = 0.01, 1.0, 0.05
#: How long the children of a supervisor that was killed may still be there.
ORPHANS_WITHIN_S = 15.0

#: The stream and group that tests use unless they say otherwise.
STREAM, GROUP = "stream:story:gen", "cg-gen-worker"
GROUPS = {STREAM: GROUP, "stream:memory:update": "cg-mem-writer", "stream:audit:log": "cg-archiver"}

T = TypeVar("T")

_TITLE = re.compile(r"jobworker: (supervisor|reader|reaper|guard|forkserver|api|worker \d+) \[")


def eventually(look: Callable[[], T], within_s: float = SOON_S, saying: object = "") -> T:
    """The first true answer of ``look``; fails with ``saying`` and the last answer when time is over."""
    began = time.monotonic()
    while not (answer := look()):
        waited_s = time.monotonic() - began
        if waited_s > within_s:
            text = saying() if callable(saying) else saying
            raise AssertionError(f"not within {within_s} s: {text} {answer!r}")
        # Other processes' state, seen through /proc, HTTP or the store, sends no event.
        time.sleep(FAST_LOOK_S if waited_s < FAST_LOOKS_S else SLOW_LOOK_S)
    return answer


L = TypeVar("L")


class Lines(Generic[L]):
    """A growing file, each line of which is read and parsed once: tests look at it many times a second.

    ``parse`` gives None for a line to leave out. A line is seen once it is whole.
    """

    def __init__(self, path: Path, parse: Callable[[str], L | None]) -> None:
        self.path, self._parse = path, parse
        self._parsed: list[L] = []
        self._read_bytes = 0

    def restart(self) -> None:
        """Forget what the file holds now."""
        self._read_bytes = self.path.stat().st_size if self.path.exists() else 0
        self._parsed = []

    def since_restart(self) -> list[L]:
        """Every line since the last `restart`, parsed; a new list."""
        if self.path.exists() and self.path.stat().st_size > self._read_bytes:
            with self.path.open("rb") as file:
                file.seek(self._read_bytes)
                whole, end, _ = file.read().rpartition(b"\n")
            self._read_bytes += len(whole + end)
            lines = whole.decode(errors="replace").splitlines()
            self._parsed += [one for line in lines if (one := self._parse(line)) is not None]
        return list(self._parsed)


def _log_event(line: str) -> dict[str, Any] | None:
    """The event of a log line; None for other text."""
    return json.loads(line) if line.startswith("{") and line.endswith("}") else None


class Service:
    """One service on folders and ports of its own. ``redis_url`` empty: with its embedded Valkey."""

    def __init__(
        self, folder: Path, handlers: Mapping[str, str], *, procs: int = 2, redis_url: str = "",
        environment: Mapping[str, str] | None = None, data_dir: Path | None = None, **options: object,
    ) -> None:  # fmt: skip
        self.folder = folder
        self.data_dir = data_dir or folder / "data"
        self.toys_dir = folder / "toys"
        self.tmp_dir = folder / "tmp"
        self.cwd = folder / "cwd"
        for made in (self.toys_dir, self.tmp_dir, self.cwd):
            made.mkdir(exist_ok=True)
        options = {"metrics_addr": "127.0.0.1:0", "data_dir": self.data_dir, "procs": procs} | options
        options |= {"redis_url": redis_url} if redis_url else {}
        self._arguments = ["--no-builtin-handlers", *_flags(options)]
        self._arguments += [f"--handler={kind}={target}" for kind, target in handlers.items()]
        python_path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._environment = {**os.environ, "PYTHONPATH": python_path, "TMPDIR": str(self.tmp_dir),
                             FOLDER_VARIABLE: str(self.toys_dir), **(environment or {})}  # fmt: skip
        self._redis_url = redis_url or (environment or {}).get("JOBWORKER_REDIS_URL", "")
        self._log = Lines(folder / "service.log", _log_event)
        self._events = Lines(self.toys_dir / EVENTS_FILE, read_event)
        self._popen: subprocess.Popen[bytes] | None = None
        self._client: Any = None
        self._client_url = ""

    # -- start and end

    def launch(self, redirections: str = "", stderr: int | None = None) -> None:
        """Start it, in a session of its own and tied to this process, without waiting for anything.

        ``redirections`` of its standard streams, as a shell writes them. With ``stderr`` its lines go to that
        descriptor instead of the log file.
        """
        self._log.restart()
        shell = ["/bin/sh", "-c", f'exec "$0" "$@" {redirections}'] if redirections else []
        with self._log.path.open("ab") as log:
            self._popen = subprocess.Popen(
                [*tied_to_us(), *shell, str(COMMAND), *self._arguments], stdin=subprocess.DEVNULL, stdout=log,
                stderr=log if stderr is None else stderr, cwd=self.cwd, env=self._environment,
            )  # fmt: skip

    def start(self) -> "Service":
        """Start it and wait until it says that it is ready."""
        self.launch()
        self.wait_until_ready()
        return self

    def wait_until_ready(self) -> None:
        """Wait until it says that it is ready; fails at once where it ends instead."""
        eventually(lambda: self.exit_code is not None or self.is_ready(), READY_WITHIN_S, "ready")
        assert self.exit_code is None, f"exit {self.exit_code} instead of ready"

    @property
    def pid(self) -> int:
        """The supervisor's."""
        assert self._popen is not None
        return self._popen.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        assert self._popen is not None
        return self._popen.poll()

    def wait(self, within_s: float = SOON_S) -> int:
        """Wait for its end; returns the exit code."""
        assert self._popen is not None
        return self._popen.wait(within_s)

    def send(self, number: signal.Signals) -> None:
        """Send the supervisor a signal."""
        assert self._popen is not None
        self._popen.send_signal(number)

    def terminate(self, within_s: float = SOON_S) -> int:
        """Ask it to drain and wait; returns the exit code."""
        self.send(signal.SIGTERM)
        return self.wait(within_s)

    def kill(self) -> None:
        """Kill the supervisor as a crash would; its children are expected to end by themselves."""
        self.send(signal.SIGKILL)
        self.wait()
        eventually(lambda: not self.everyone(), ORPHANS_WITHIN_S, lambda: f"orphans: {self.everyone()}")

    def destroy(self) -> None:
        """End all there is, whatever state a failed test left it in."""
        for pid in [self.pid, *self.everyone()] if self._popen else []:
            with contextlib.suppress(ProcessLookupError):
                if self._popen and (pid != self.pid or self.exit_code is None):
                    os.kill(pid, signal.SIGKILL)
        if self._popen:
            self.wait()
        self._hang_up()

    def assert_nothing_left(self) -> None:
        """No process of it, no temporary file, no socket or half-written file in its data directory."""
        eventually(lambda: not self.everyone(), ORPHANS_WITHIN_S, lambda: f"still running: {self.everyone()}")
        assert not list(self.tmp_dir.rglob("*"))
        assert not list(self.cwd.rglob("*"))
        files = list(self.folder.rglob("*"))
        assert not [path for path in files if path.is_socket() or path.suffix in (".draft", ".pid")]

    def _hang_up(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    # -- its processes

    def everyone(self) -> dict[int, str]:
        """Every living process that it started, itself included: by id, with the command line.

        Whatever it starts inherits its working folder, or goes into its data directory.
        """
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # another user's, or ended while we looked
                if Path(os.readlink(entry / "cwd")).is_relative_to(self.folder):
                    command = (entry / "cmdline").read_bytes()
                    found[int(entry.name)] = command.replace(b"\0", b" ").decode().strip()
        return found

    def roles(self) -> dict[str, int]:
        """Process ids by role: ``supervisor``, ``reader``, ``reaper``, ``worker 0``, ..., and of the embedded
        stores ``valkey`` and ``milvus``.

        While a worker is being replaced its role belongs to one of the two.
        """
        named = {}
        for pid, command in self.everyone().items():
            if match := _TITLE.match(command):
                named[match[1]] = pid
            elif "valkey-server" in command:
                named["valkey"] = pid
            elif "milvus.lite_server" in command:
                named["milvus"] = pid
        return named

    def kill_role(self, role: str, number: signal.Signals = signal.SIGKILL) -> int:
        """Send a role's process a signal; returns its process id."""
        pid = eventually(lambda: self.roles().get(role))  # it may be restarting
        os.kill(pid, number)
        return pid

    def wait_for_successor(self, role: str, pid: int) -> int:
        """Wait until another process has the role; returns its process id."""

        def successor() -> int | None:
            found = self.roles().get(role)
            return found if found != pid else None

        return eventually(successor, saying=role)

    # -- its log and its HTTP port

    @property
    def log_text(self) -> str:
        """Everything that it and its children wrote, over all of its starts."""
        return self._log.path.read_text(errors="replace")

    def log(self) -> list[dict[str, Any]]:
        """The events since the last start."""
        return self._log.since_restart()

    def logged(self, message: str, **fields: object) -> list[dict[str, Any]]:
        """The events since the last start with this message and these fields."""
        return [e for e in self.log() if e["msg"] == message and fields.items() <= e.items()]

    @property
    def url(self) -> str:
        """Of the HTTP port; it is found in the log, as a person would find it."""
        return str(eventually(lambda: self.logged("health.listening"))[0]["metrics_url"])

    def get(self, path: str, url: str = "") -> tuple[int, str]:
        """Status and body of a page; ``url`` is needed where the log cannot be read."""
        connection = http.client.HTTPConnection(urlsplit(url or self.url).netloc, timeout=SOON_S)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def is_ready(self) -> bool:
        """Whether /readyz says so."""
        return (
            bool(self.logged("health.listening"))
            and self.exit_code is None
            and self._status("/readyz") == 200
        )

    def _status(self, path: str) -> int:
        try:
            return self.get(path)[0]
        except OSError:
            return 0  # it has ended since

    def metrics(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        """Every sample by name and labels."""
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(self.get("/metrics")[1])
            for sample in family.samples
        }

    def metric(self, name: str, **labels: str) -> float:
        """One sample; 0 where it does not exist yet."""
        return self.metrics().get((name, frozenset(labels.items())), 0.0)

    # -- its store

    @property
    def redis_url(self) -> str:
        """Of the store that it uses."""
        return self._redis_url or json.loads((self.data_dir / "endpoints.json").read_text())["redis_url"]

    @property
    def client(self) -> Any:
        """A ``redis.Redis`` for its store; after a restart of the service it may be a new one."""
        if self._client is None or self._client_url != self.redis_url:
            self._hang_up()
            self._client_url = self.redis_url
            self._client = redis.Redis.from_url(self._client_url, socket_timeout=SOON_S)
        return self._client

    def enqueue(self, kind: str, payload: object = None, *, stream: str = STREAM, **more: object) -> str:
        """Put one job on a stream as a producer in another language would; returns its id."""
        return self.enqueue_many([{"type": kind, "payload": payload, **more}], stream)[0]

    def enqueue_many(self, jobs: Iterable[Mapping[str, object]], stream: str = STREAM) -> list[str]:
        """Put jobs on a stream in one transaction, so that one read takes them all; returns their ids."""
        ids = []
        with self.client.pipeline(transaction=True) as pipe:
            for job in jobs:
                envelope = {"id": os.urandom(8).hex(), "payload": None, **job}
                ids.append(str(envelope["id"]))
                pipe.xadd(stream, {"data": json.dumps(envelope)})
            pipe.execute()
        return ids

    def add_raw(self, fields: Mapping[str, bytes], stream: str = STREAM) -> str:
        """Put any entry on a stream; returns the entry's id."""
        return str(self.client.xadd(stream, dict(fields)).decode())

    def dead_letters(self, stream: str = STREAM) -> list[dict[str, Any]]:
        """All of a stream."""
        entries: Any = self.client.xrange(f"dlq:{stream}")
        assert all(set(fields) == {b"data"} for _, fields in entries)
        return [json.loads(fields[b"data"]) for _, fields in entries]

    def dead_letter(self, id: str, stream: str = STREAM, within_s: float = SOON_S) -> dict[str, Any]:
        """Wait for the dead letter of a job (or, where that could not be read, of an entry)."""

        def found() -> list[dict[str, Any]]:
            letters = self.dead_letters(stream)
            return [e for e in letters if (e["task"] or {}).get("id") == id or e["original_id"] == id]

        (letter,) = eventually(found, within_s, f"dead letter of {id}")
        return letter

    def unfinished(self) -> dict[str, int]:
        """What is undelivered, pending, in a lane or scheduled, by where it is; empty when all is done."""
        found = [(stream, place, count) for stream in GROUPS for place, count in self._places(stream).items()]
        return {f"{stream} {place}": count for stream, place, count in found if count}

    def unsettled(self, stream: str = STREAM) -> int:
        """Number of jobs that are undelivered, pending or in a lane."""
        return sum(count for place, count in self._places(stream).items() if place != "scheduled")

    def _places(self, stream: str) -> dict[str, int]:
        def group(groups: list[dict[str, Any]]) -> dict[str, Any]:
            return next(one for one in groups if one["name"] == GROUPS[stream].encode())

        after = b"(" + group(self.client.xinfo_groups(stream))["last-delivered-id"]
        # In one transaction: a job moves from place to place meanwhile, and could be missed in each.
        pipe = self.client.pipeline(transaction=True)
        pipe.xrange(stream, after, "+")
        pipe.xinfo_groups(stream)
        pipe.hget(f"ready:{stream}", "n")
        pipe.zcard(f"retry:{stream}")
        undelivered, groups, in_lanes, scheduled = pipe.execute()
        return {
            "undelivered": len(undelivered), "pending": group(groups)["pending"],
            "in lanes": int(in_lanes or 0), "scheduled": scheduled,
        }  # fmt: skip

    def wait_until_drained(self, within_s: float = SOON_S) -> None:
        """Wait until no job is undelivered, pending, in a lane or scheduled."""
        eventually(lambda: not self.unfinished(), within_s, lambda: f"unfinished: {self.unfinished()}")

    # -- its handlers

    def events(self, what: str, id: str | None = None) -> list[Event]:
        """What the toys wrote down: every ``start`` or ``end``, of one job or of all."""
        return [e for e in self._events.since_restart() if e.what == what and id in (None, e.id)]

    def forget(self) -> None:
        """Make it like new for the next test: close the gates, forget events and dead letters."""
        self._events.restart()
        for file in self.toys_dir.iterdir():
            if file.name != EVENTS_FILE:
                file.unlink()
        self.client.delete(*(f"dlq:{stream}" for stream in GROUPS))

    def wait_for_start(self, id: str, count: int = 1) -> Event:
        """Wait until a job has started `times` times; returns the last start."""
        return eventually(lambda: self.events("start", id)[count - 1 :], saying=f"start {count} of {id}")[0]

    def wait_for_end(self, id: str, within_s: float = SOON_S) -> Event:
        """Wait until a job has succeeded."""
        return eventually(lambda: self.events("end", id), within_s, saying=f"end of {id}")[0]

    def open_gate(self, gate: str) -> None:
        """Let the jobs that wait at a gate continue."""
        (self.toys_dir / gate).touch()


def _flags(options: Mapping[str, object]) -> list[str]:
    """``retry_initial=0.1`` as ``--retry-initial=0.1``."""
    return [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]


@contextlib.contextmanager
def service(tmp_path: Path, handlers: Mapping[str, str], **options: Any) -> Iterator[Service]:
    """A ready service. At the end it must stop as asked and leave nothing; its log is shown if not."""
    one = Service(tmp_path, handlers, **options)
    with ending(one):
        one.start()
        yield one
        if one.exit_code is None:
            assert one.terminate() == 0
        one.assert_nothing_left()


@contextlib.contextmanager
def ending(one: Service) -> Iterator[Service]:
    """End a service on the way out, and show its log where something failed."""
    try:
        yield one
    except BaseException as error:
        error.add_note("--- the service's log\n" + "\n".join(one.log_text.splitlines()[-60:]))
        raise
    finally:
        one.destroy()


def handlers(*toys: str) -> dict[str, str]:
    """The ``handlers`` of a service: each toy under its name in small letters."""
    return {toy.lower(): f"support.toys:{toy}" for toy in toys}
