"""What ``run.py`` compares: the service with two forms of handlers, a bare loop, Dramatiq and huey.

Every contender has the same job and the same number of worker processes. Each runs one call at a time, but
Dramatiq has the 8 threads of its default, with which it is faster. Jobs are enqueued before the workers
start, invisible to them, and then released in one step.
"""

import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from chaos_peer import Peer
from hosts import tree_of
from rig import JOB_TYPE, LIMIT_S, Backlog, bare_loops, end, job, paced, service, start, wait_until

from jobworker.worker import Producer

#: A first fill is followed by this pause: the other workers connect while one runs the first job.
_SETTLE_S = 1.0


class Contender(Protocol):
    """A job system under test, with a queue of its own that `close` deletes."""

    def fill(self, jobs: int) -> None:
        """Enqueue jobs that no worker sees until `release`."""

    def running(self, procs: int, **environment: str) -> Any:
        """Context manager: the started system; its value is the list of the root processes."""

    def release(self, jobs: int) -> None:
        """Make the jobs of `fill` visible at once."""

    @property
    def drained(self) -> bool:
        """Whether all jobs are done."""

    def send(self, jobs: int, every_s: float) -> dict[str, int]:
        """Enqueue one job at a time with its own client. Job id -> monotonic ns just before."""

    def close(self) -> None:
        """Delete its keys."""


class Ours:
    """The service; ``handler`` is the target of `--handler`."""

    def __init__(self, url: str, client: Any, handler: str, payload: "str | None" = None) -> None:
        self._url = url
        self._handler = handler
        self._backlog = Backlog(client, _job_with(payload) if payload else None)
        self.fill, self.release, self.close = self._backlog.fill, self._backlog.release, self._backlog.close

    @contextmanager
    def running(self, procs: int, **environment: str) -> Iterator[list[int]]:
        """A ready service."""
        # The others have no idempotency keys, so those of the jobs do not count here.
        given = {"JOBWORKER_UNIQUE_WINDOW": "0", **environment}
        with service(self._url, self._backlog, self._handler, procs, 0, **given) as pid:
            yield [pid]

    @property
    def drained(self) -> bool:
        """Whether the group has neither lag nor pending entries."""
        return self._backlog.drained

    def send(self, jobs: int, every_s: float) -> dict[str, int]:
        """Enqueue with the Python producer."""
        sent: dict[str, int] = {}
        with Producer(self._url) as producer:
            for number in paced(jobs, every_s):
                job_id = f"bench-{number:012d}"
                payload = {"tenant_id": "t001", "ids": ["seg-1"], "texts": ["It snowed."]}
                sent[job_id] = time.monotonic_ns()
                producer.enqueue(JOB_TYPE, payload, id=job_id, stream=self._backlog.stream)
        return sent


class Bare(Ours):
    """Loops that read and acknowledge with the plain client; see ``bare.py``."""

    def __init__(self, url: str, client: Any, payload: "str | None" = None) -> None:
        super().__init__(url, client, "", payload)

    @contextmanager
    def running(self, procs: int, **environment: str) -> Iterator[list[int]]:
        """Connected loops."""
        with bare_loops(self._url, self._backlog, procs, **environment) as pids:
            yield pids


@dataclass(frozen=True)
class PeerSystem:
    """Another job system: its packages, its module in ``peers/``, its command line, its queue's keys."""

    peer: Peer
    module: str
    queue: str
    contents: str


PEER_SYSTEMS = {
    "dramatiq": PeerSystem(
        Peer("dramatiq", ("dramatiq[redis]",), "dramatiq",
             lambda procs, url: [["dramatiq", "noop_dramatiq", "-p", str(procs)]], ""),
        "noop_dramatiq", "dramatiq:default", "dramatiq:default.msgs",
    ),
    "huey": PeerSystem(
        Peer("huey", ("huey[redis]", "redis"), "huey",
             lambda procs, url: [["huey_consumer", "noop_huey.huey", "-q", "-kprocess", f"-w{procs}"]], ""),
        "noop_huey", "huey.redis.bench", "huey.redis.bench",
    ),
}  # fmt: skip


class Other:
    """A peer on the same server. Its client runs in the peer's own environment."""

    def __init__(self, url: str, client: Any, system: PeerSystem) -> None:
        system.peer.install()
        self._client = client
        self._system = system
        self._environment = {"PEER_REDIS_URL": url}

    def _run_client(self, *arguments: str) -> str:
        python = str(self._system.peer.home / "bin" / "python")
        process = start(
            [python, "-m", self._system.module, *arguments], self._environment, stdout=subprocess.PIPE
        )
        output, _ = process.communicate(timeout=LIMIT_S)
        if process.returncode:
            raise RuntimeError(f"the client of {self._system.peer.name} ended with {process.returncode}")
        return output.decode()

    def fill(self, jobs: int) -> None:
        """Enqueue, then rename the queue."""
        self._run_client("fill", str(jobs))
        self._client.rename(self._system.queue, f"{self._system.queue}.hidden")

    @contextmanager
    def running(self, procs: int, **environment: str) -> Iterator[list[int]]:
        """Started workers that have run a first job."""
        with ExitStack() as stack:
            pids = []
            for command in self._system.peer.commands(procs, ""):
                whole = [str(self._system.peer.home / "bin" / command[0]), *command[1:]]
                process = start(whole, self._environment | environment)
                stack.callback(end, process)
                pids.append(process.pid)
                self._run_client("fill", "1")
                wait_until(lambda: not self._client.exists(self._system.queue), process)
            time.sleep(_SETTLE_S)  # the other workers give no sign of being connected
            yield pids

    def release(self, jobs: int) -> None:
        """Rename the queue back."""
        self._client.rename(f"{self._system.queue}.hidden", self._system.queue)

    @property
    def drained(self) -> bool:
        """Whether the queue is empty; of huey a last job per worker may still run."""
        return not self._client.exists(self._system.queue, self._system.contents)

    def send(self, jobs: int, every_s: float) -> dict[str, int]:
        """Enqueue with the peer's client."""
        lines = self._run_client("send", str(jobs), str(every_s)).splitlines()
        return {job_id: int(mono_ns) for job_id, mono_ns in map(str.split, lines)}

    def close(self) -> None:
        """Delete its keys."""
        for key in self._client.scan_iter(match=f"{self._system.queue.partition(':')[0].partition('.')[0]}*"):
            self._client.unlink(key)


def _job_with(payload: str) -> Any:
    """A function that makes jobs with that JSON as their payload."""

    def make(number: int) -> bytes:
        data = job(number)
        start_at, stop_at = data.index(b'"payload":'), data.index(b',"metadata"')
        return data[:start_at] + b'"payload":' + payload.encode() + data[stop_at:]

    return make


def trees(pids: list[int]) -> list[int]:
    """All processes of a contender."""
    return [one for pid in pids for one in tree_of(pid)]
