"""The worker's loop in one process, with a channel, for unit tests of the runner."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from jobworker.worker import Job
from jobworker.worker.event_loop import EventLoop
from jobworker.worker.handler import BoundHandler
from jobworker.worker.ipc.channel import READY, Channel, OutcomeFrame
from jobworker.worker.ipc.control import ControlSocket, Ready, Report
from jobworker.worker.outcome import Failure
from jobworker.worker.reader.admission import AdmittedJob
from jobworker.worker.reader.dispatch import WorkerHandle
from jobworker.worker.runner import Runner
from jobworker.worker.store.ports import Entry

WITHIN_S = 40.0


class RunnerRig:
    """A worker with its channel, and what it is told and tells."""

    def __init__(self, linger_s: float = 0.0, **handlers: Any) -> None:
        self.channel = Channel.create(64 * 1024)
        self.channel.phase = READY
        self.handle = WorkerHandle(0, 0, self.channel, 0.0)
        self.supervisor, theirs = ControlSocket.pair()
        self.link = ControlSocket(theirs)
        self.kinds = list(handlers)
        self.loop = EventLoop()
        bound = {kind: BoundHandler(kind, handler, 60.0, self.loop) for kind, handler in handlers.items()}
        self.stop_after = 0
        self.runner = Runner(
            *(self.channel, self.link, bound, ["s0", "s1"]),
            linger_s=linger_s,
            mono_s=self.mono_s,
            wall_s=lambda: 1767348010.0,
        )
        self.dispatched = 0

    def mono_s(self) -> float:
        """The clock; once all is done it ends the loop, as a signal would between two jobs."""
        if self.stop_after and self.channel.finished >= self.stop_after:
            self.runner.stop = True
        return time.monotonic()

    def dispatch(self, *kinds: str, **more: Any) -> None:
        """Give it one job for each kind; their ids are 0, 1, 2, …"""
        arrivals = []
        for number, kind in enumerate(kinds, self.dispatched):
            body = msgspec.json.encode({"id": str(number), "type": kind, **more})
            entry = Entry(b"%d-0" % number, body)
            arrivals.append(AdmittedJob(number % 2, self.kinds.index(kind), entry, False))
        assert self.handle.dispatch(arrivals) == len(kinds)
        self.dispatched += len(kinds)

    def run(self) -> None:
        """Until every job has ended."""
        self.stop_after = self.dispatched
        self.runner.run()

    def states(self) -> list[int]:
        return [self.channel.table.state(row) for row in range(self.dispatched)]

    def failures(self) -> dict[int, Failure]:
        frames = [
            msgspec.msgpack.decode(view, type=OutcomeFrame) for view, _ in self.channel.outcomes.frames()
        ]
        return {frame.row: frame.failure for frame in frames}

    def errors(self) -> dict[int, Failure]:
        """The failures without their tracebacks."""
        return {row: msgspec.structs.replace(one, traceback="") for row, one in self.failures().items()}

    def reports(self) -> list[Report]:
        found = []
        while received := self.supervisor.receive():
            assert isinstance(received[0], Report | Ready)
            if isinstance(received[0], Report):
                found.append(received[0])
        return found

    def close(self) -> None:
        self.loop.close()
        self.channel.close()
        self.supervisor.close()
        self.link.close()


Make = Callable[..., RunnerRig]


class Single:
    """Notes what it is given; raises what the test says for an id."""

    def __init__(self, log: list[Any] | None = None, **raises: BaseException) -> None:
        self.log = [] if log is None else log
        self.raises = raises

    def handle(self, job: Job) -> None:
        self.log.append(job.id)
        if error := self.raises.get(f"id{job.id}"):
            raise error


class Batch:
    """Notes each batch; answers as the test says."""

    max_batch = 3

    def __init__(
        self, log: list[Any] | None = None, answer: Callable[[Sequence[Job]], Any] | None = None
    ) -> None:
        self.log = [] if log is None else log
        self.answer = answer or (lambda jobs: [None] * len(jobs))

    def handle_batch(self, jobs: Sequence[Job]) -> Any:
        self.log.append([job.id for job in jobs])
        return self.answer(jobs)
