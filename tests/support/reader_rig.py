"""A reader on an in-memory store and a simulated clock, with workers that do only what a test asks for."""

import contextlib
import json
import random
from collections.abc import Iterator
from typing import Any

import msgspec

from jobworker.worker.ipc.channel import READY, Channel, JobFrame, OutcomeFrame
from jobworker.worker.ipc.control import Attach, ControlSocket, Drain, Message, Report, SyncDone, WorkerExited
from jobworker.worker.ipc.inflight import FAILED, STARTED, SUCCEEDED
from jobworker.worker.keys import Source
from jobworker.worker.outcome import Failure, RetryPolicy
from jobworker.worker.reader.reader import Reader
from jobworker.worker.settings import Settings
from jobworker.worker.store.memory.server import MemoryServer
from jobworker.worker.store.memory.store import MemoryStore

SOURCE = Source("stream", "group")
WALL_START_S = 1_767_345_600.0


class _Id(msgspec.Struct):
    id: str


_ids = msgspec.json.Decoder(_Id)


class FakeWorker:
    """The worker's side of a channel. Jobs are named by their ids."""

    def __init__(self, batch_hint: int, slot: int = 0, generation: int = 1) -> None:
        self.slot, self.generation = slot, generation
        self.channel = Channel.create(64 * 1024)
        self.channel.batch_hint, self.channel.phase = batch_hint, READY
        self._rows: dict[str, int] = {}
        self._decode = msgspec.msgpack.Decoder(JobFrame).decode

    def take(self) -> list[str]:
        """Take all frames from the ring; returns the ids of their jobs."""
        ids = []
        for frame, tail in self.channel.jobs.frames():
            decoded = self._decode(frame)
            for row, (_, _, data) in enumerate(decoded.jobs, decoded.first_row):
                ids.append(_ids.decode(data).id)  # it may be malformed otherwise
                self._rows[ids[-1]] = row
            self.channel.table.taken = decoded.first_row + len(decoded.jobs)
            self.channel.jobs.release(tail)
        return ids

    def start(self, *job_ids: str) -> None:
        """Mark jobs as started."""
        self.channel.table.mark([self._rows[job_id] for job_id in job_ids], STARTED)

    def run_long(self, job_id: str, mono_since_s: float) -> None:
        """Start a job that runs since then and does not end soon."""
        assert self.begin(job_id) == [job_id]
        self.channel.set_running(mono_since_s, mono_since_s + 3600.0)

    def begin(self, *job_ids: str) -> list[str]:
        """Start jobs as a worker does; returns those that the reader has not asked back."""
        return [job_id for job_id in job_ids if self.channel.table.begin(self._rows[job_id])]

    def end_long(self, job_id: str) -> None:
        """The long job succeeds."""
        self.succeed(job_id)
        self.channel.set_running(0.0, 0.0)

    def succeed(self, *job_ids: str) -> None:
        """Finish jobs successfully."""
        self.channel.table.mark([self._rows[job_id] for job_id in job_ids], SUCCEEDED)

    def fail(self, job_id: str, failure: Failure) -> None:
        """Finish a job with a failure."""
        self.channel.table.mark([self._rows[job_id]], FAILED)
        frame = OutcomeFrame(self._rows[job_id], failure)
        assert self.channel.outcomes.push(msgspec.msgpack.encode(frame))


def release(reader: Reader) -> None:
    """Close the descriptors of a reader that did not close them: the end of its process would."""
    if reader._selector.get_map() is None:
        return
    reader._store.close()
    for handle in reader._dispatcher.workers:
        handle.channel.close()
    reader._selector.close()
    reader._marks.close()


class ReaderRig:
    """A reader of two types, ``a`` and ``b``, on one stream; the clock is the test's."""

    def __init__(self, server: MemoryServer | None = None, host: str = "one", **settings: Any) -> None:
        self.now_s = 0.0
        self.server = server or MemoryServer(lambda: WALL_START_S + self.now_s, blocking=False)
        self.store = MemoryStore(self.server, f"{host}/one")
        handlers = {"a": "nowhere:A", "b": "nowhere:B"}
        retry = RetryPolicy(jitter=0.0)
        self.settings = Settings(
            **{"streams": (SOURCE,), "handlers": handlers, "host": host, "instance": "one", "retry": retry}
            | settings
        )
        self.control, sock = ControlSocket.pair()
        self._reader_end = ControlSocket(sock)
        self.reader = Reader(
            self.store,
            self.settings,
            self._reader_end,
            mono_s=lambda: 1000.0 + self.now_s,
            wall_s=self.server.wall_now_s,
            rng=random.Random(0),
        )
        self.workers: list[FakeWorker] = []
        self.metrics: dict[tuple[str, tuple[str, ...]], float] = {}
        self.messages: list[Message] = []
        #: Trouble and warnings of the last report.
        self.trouble: str | None = None
        self.warnings: list[str] = []
        self._exited: list[FakeWorker] = []
        self._crashed = False

    def attach(self, batch_hint: int = 8) -> FakeWorker:
        """Attach a ready worker in a new slot."""
        slots = {worker.slot for worker in self.workers}
        return self._attach(FakeWorker(batch_hint, len(slots)))

    def restart(self, worker: FakeWorker) -> FakeWorker:
        """Attach the ready successor of a worker that exited."""
        return self._attach(FakeWorker(worker.channel.batch_hint, worker.slot, worker.generation + 1))

    def _attach(self, worker: FakeWorker) -> FakeWorker:
        self.workers.append(worker)
        self.control.send(Attach(worker.slot, worker.generation), worker.channel.fds)
        return worker

    def sync(self) -> None:
        """Tell the reader that all workers are attached, and let it connect."""
        self.control.send(SyncDone())
        self.tick()

    def other_host(self) -> MemoryStore:
        """The store of a reader of another host, which may claim entries."""
        other = MemoryStore(self.server, "other/one")
        other.acquire([SOURCE])
        return other

    def exit(self, worker: FakeWorker, cause: str = "SIGKILL", *, charge: bool = True, **more: Any) -> None:
        """Tell the reader that a worker exited."""
        self._exited.append(worker)
        self.control.send(WorkerExited(worker.slot, worker.generation, cause, charge, details={}, **more))

    def add(self, *job_ids: str, type_name: str = "a", **fields: Any) -> None:
        """Enqueue jobs."""
        for job_id in job_ids:
            job = {"id": job_id, "type": type_name, **fields}
            self.server.append(SOURCE.stream, json.dumps(job).encode())

    def tick(self, cycles: int = 6) -> None:
        """Run cycles: one reads, the next settles and dispatches; several follow from each other."""
        for _ in range(cycles):
            self.reader.run_once(0.0)

    @property
    def mono_s(self) -> float:
        """The reader's clock."""
        return 1000.0 + self.now_s

    def advance(self, seconds: float) -> None:
        """Advance the clock, then run cycles."""
        self.now_s += seconds
        self.tick()

    @property
    def pending(self) -> int:
        """Number of entries that are delivered and not settled."""
        return self.store.depths(SOURCE).pending

    @property
    def retries(self) -> list[dict[str, Any]]:
        """Scheduled retries, soonest first."""
        return [json.loads(job) for job in self.server.waiting(SOURCE.stream)]

    @property
    def letters(self) -> list[dict[str, Any]]:
        """Dead letters, oldest first."""
        return [json.loads(letter) for letter in self.server.dead_letters(SOURCE.stream)]

    def metric(self, name: str, *labels: str) -> float:
        """Value of a counter or gauge."""
        self.reader.report()
        self.receive()
        return self.metrics.get((name, labels), 0.0)

    def receive(self) -> None:
        """Collect the messages of the reader."""
        while received := self.control.receive():
            message, _ = received
            if isinstance(message, Report):
                for name, labels, count in message.counts:
                    self.metrics[name, labels] = self.metrics.get((name, labels), 0.0) + count
                self.trouble, self.warnings = message.trouble, message.warnings
                self.metrics |= {(name, labels): value for name, labels, value in message.gauges}
            else:
                self.messages.append(message)

    def drain(self) -> None:
        """Drain the reader: its workers exit first."""
        self.control.send(Drain())
        for worker in self.workers:
            if worker not in self._exited:
                self.exit(worker, "exit 0", charge=False)
        for _ in range(100):
            if self.reader.drained:
                break
            self.now_s += 1.0  # a reader that waits for the store tries again
            self.reader.run_once(0.0)
        assert self.reader.drained
        self.reader.run()  # returns at once, and releases what it holds

    def crash(self) -> None:
        """The reader's process is killed: it settles nothing more."""
        self._crashed = True

    def close(self) -> None:
        """Drain unless the reader has crashed, then release all resources."""
        if not (self._crashed or self.reader.drained):
            self.drain()
        self.control.close()
        self._reader_end.close()
        for worker in self.workers:
            worker.channel.close()
        release(self.reader)


@contextlib.contextmanager
def reader_rig(workers: int = 1, *, batch_hint: int = 8, **settings: Any) -> Iterator[ReaderRig]:
    """A connected reader with idle workers."""
    with contextlib.closing(ReaderRig(**settings)) as rig:
        for _ in range(workers):
            rig.attach(batch_hint)
        rig.sync()
        yield rig
