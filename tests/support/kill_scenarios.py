"""What a successor finds after its predecessor was killed: each scenario kills at every instruction.

``python -m support.kill_scenarios NAME [SEED]`` in the folder of the tests; a process of its own, since it
forks for each instruction and the test runner's is large and has threads. Prints how often it killed.
"""

import itertools
import mmap
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from jobworker.worker.handler import BoundHandler
from jobworker.worker.ipc import inflight, ring
from jobworker.worker.ipc.channel import READY, Channel, OutcomeFrame
from jobworker.worker.ipc.control import ControlSocket
from jobworker.worker.ipc.inflight import FAILED, QUEUED, ROWS, SETTLED, STARTED, SUCCEEDED, InFlightJob
from jobworker.worker.ipc.ring import Ring
from jobworker.worker.reader import dispatch as lane
from jobworker.worker.reader.admission import AdmittedJob
from jobworker.worker.reader.dispatch import WorkerHandle
from jobworker.worker.runner import Runner
from jobworker.worker.store.ports import Entry
from support.kill_points import every_kill

HEAD, TAIL, BEGUN, DONE = range(4)
RING_BYTES = 1024
#: So near the end that the rows of every scenario go round it.
FIRST_ROW = ROWS - 4
HERE = "kill_scenarios.py"


class Shared(NamedTuple):
    """A ring in memory that a forked child shares, and words to leave word in."""

    words: memoryview
    ring: Ring

    def successor(self) -> Ring:
        return Ring(self.words, HEAD, TAIL, self.ring._area)


def shared_ring(consumed: Sequence[int], pending: Sequence[bytes]) -> Shared:
    """A ring through which `consumed` bytes of frames went, and which still holds others."""
    view = memoryview(mmap.mmap(-1, 4096 + RING_BYTES))
    words = view[:4096].cast("Q")
    made = Shared(words, Ring(words, HEAD, TAIL, view[4096:]))
    for length in consumed:
        assert made.ring.push(bytes(length))
        take_all(made.ring)
    for frame in pending:
        assert made.ring.push(frame)
    return made


def take_all(ring: Ring) -> list[bytes]:
    taken = []
    for frame, tail in ring.frames():
        taken.append(bytes(frame))
        ring.release(tail)
    return taken


def seen(ring: Ring) -> list[bytes]:
    return [bytes(frame) for frame, _ in ring.frames()]


class PushCase(NamedTuple):
    consumed: list[int]
    pending: list[bytes]
    frame: bytes
    fits: bool = True


PUSH_CASES = {
    "push_plain": PushCase([40], [b"a" * 30, b"b"], b"x" * 100),
    "push_wrapping": PushCase([400, 400], [b"a" * 30], b"x" * 300),
    "push_rewinding": PushCase([400], [], b"x" * 100),
    "push_full": PushCase([], [b"a" * 500, b"b" * 400], b"x" * 300, fits=False),
}


def push(case: PushCase) -> int:
    """The frame is there whole or not at all, what was there before stays, and the next one follows it."""

    def act(shared: Shared) -> None:
        shared.words[DONE] = 1 + shared.ring.push(case.frame)

    kills = 0
    for shared, ended in every_kill(lambda: shared_ring(case.consumed, case.pending), act, {"ring.py"}):
        kills += not ended
        after = seen(shared.successor())
        whole = [*case.pending, case.frame]
        assert after in ([case.pending, whole] if case.fits else [case.pending]), after
        if ended:
            assert shared.words[DONE] == 1 + case.fits
        if shared.words[DONE] == 2:
            assert after == whole, "push returned and the frame is not there"
        next_producer = shared.successor()
        if next_producer.push(b"next"):
            after.append(b"next")
        else:
            assert not case.fits
        assert take_all(shared.successor()) == after
        assert next_producer.push(b"y" * next_producer.largest), "an empty ring has no room"
    return kills


def release() -> int:
    """A consumer killed on the way is followed by one that sees every frame it had not released."""
    frames = [b"%d" % i * (60 + 20 * i) for i in range(5)]

    def act(shared: Shared) -> None:
        for _, tail in shared.ring.frames():
            shared.words[BEGUN] += 1
            shared.ring.release(tail)
            shared.words[DONE] += 1

    kills = 0
    for shared, ended in every_kill(lambda: shared_ring([400], frames[:3]), act, {"ring.py", HERE}):
        kills += not ended
        left = seen(shared.successor())
        first = 3 - len(left)
        assert left == frames[first:3], left
        assert shared.words[DONE] <= first <= shared.words[BEGUN]
        assert shared.words[BEGUN] - shared.words[DONE] <= 1
        more = list(itertools.takewhile(shared.successor().push, frames[3:]))
        assert take_all(shared.successor()) == frames[first : 3 + len(more)]
        assert shared.ring.empty()
    return kills


# -- what reader and worker do with a channel


@dataclass
class Desk:
    """A channel with some rows of an earlier time, and both who sit at it."""

    channel: Channel
    lane: WorkerHandle
    runner: Runner
    ran: memoryview
    links: tuple[ControlSocket, ControlSocket]

    def successor(self) -> WorkerHandle:
        """A new reader's view."""
        return WorkerHandle(0, 1, Channel(*[os.dup(fd) for fd in self.channel.fds]), 0.0)

    def close(self, successor: WorkerHandle) -> None:
        successor.channel.close()
        self.runner._states.release()
        self.channel.close()
        for link in self.links:
            link.close()


class Flagging:
    """Leaves word in shared memory that it ran; fails where it is told to."""

    def __init__(self, ran: memoryview, fails: bool) -> None:
        self._ran, self._fails = ran, fails

    def handle(self, job: object) -> str:
        self._ran[0] += 1
        if self._fails:
            raise ValueError("told to")
        return "done"


def arrivals(start: int, count: int, keeps: bool = False) -> list[AdmittedJob]:
    return [
        AdmittedJob(i % 3, i % 2, Entry(b"%d-%d" % (10**12 + i, i), job(i, keeps), 1, i % 4), i % 4 > 0)
        for i in range(start, start + count)
    ]


def job(i: int, keeps: bool = False) -> bytes:
    metadata = b',"metadata":{"keep_result":"true"}' if keeps else b""
    kind = [b"even", b"odd"][i % 2]
    return b'{"id":"job-%d","type":"%s","payload":"%s"%s}' % (i, kind, b"p" * i, metadata)


def held(i: int) -> InFlightJob:
    """What row ``FIRST_ROW + i`` says of arrival ``i``."""
    arrival = arrivals(i, 1)[0]
    return InFlightJob(
        *(FIRST_ROW + i, arrival.stream_no, arrival.type_no, arrival.entry.deaths, arrival.isolated),
        arrival.entry.id,
    )


def desk(fails: bool = False, waiting: int = 0, keeps: bool = False) -> Desk:
    """Nothing was handed out yet but ``waiting`` jobs; the next row is `FIRST_ROW`."""
    channel = Channel.create(1024)
    channel.phase = READY
    table = channel.table
    table._words[table._tail] = table.taken = table.head = FIRST_ROW
    parent, theirs = ControlSocket.pair()
    links = (parent, ControlSocket(theirs))
    ran = memoryview(mmap.mmap(-1, 4096)).cast("Q")
    handlers = {kind: BoundHandler(kind, Flagging(ran, fails), 60.0) for kind in ("even", "odd")}
    # Room to look ahead at everything, though the handlers take one job at once.
    runner = Runner(channel, links[1], handlers, ["s0", "s1", "s2"])
    runner._lookahead = 100
    made = Desk(channel, WorkerHandle(0, 0, channel, 0.0), runner, ran, links)
    assert made.lane.dispatch(arrivals(0, waiting, keeps)) == waiting
    return made


def hand(handed: int, frame_jobs: int, lines: bool) -> int:
    """Rows and frames agree whatever happens, earlier rows stay, a new reader continues at the right row."""
    lane._FRAME_JOBS = frame_jobs
    earlier = [STARTED, SUCCEEDED, QUEUED]

    def prepare() -> Desk:
        made = desk(waiting=2)
        made.runner._pull_frames()
        made.channel.table.mark([FIRST_ROW], STARTED)
        made.channel.table.mark([FIRST_ROW + 1], SUCCEEDED)
        assert made.lane.dispatch(arrivals(2, 1)) == 1  # not taken yet
        return made

    def act(made: Desk) -> None:
        assert made.lane.dispatch(arrivals(3, handed)) == handed

    kills = 0
    borders = {min(3 + n * frame_jobs, 3 + handed) for n in range(handed + 1)}
    for made, ended in every_kill(prepare, act, {"dispatch.py", "inflight.py", "ring.py"}, lines=lines):
        kills += not ended
        successor = made.successor()
        table = successor.table
        count = table.head - FIRST_ROW
        assert count in borders if not ended else count == 3 + handed, count
        assert table.unsettled() == [held(i) for i in range(count)]
        assert [table.state(FIRST_ROW + i) for i in range(count)] == earlier + [QUEUED] * (count - 3)
        assert successor.dispatch(arrivals(count, 10 - count)) == 10 - count
        made.runner._pull_frames()
        taken = [(w.row, w.stream_no, w.entry_id, w.envelope.id) for w in made.runner._queue][2:]
        assert taken == [(held(i).row, held(i).stream_no, held(i).entry_id, f"job-{i}") for i in range(2, 10)]
        made.close(successor)
    return kills


def take() -> int:
    """Whatever a worker was doing with the ring, a new reader knows every row that was handed out."""
    lane._FRAME_JOBS = 2

    def act(made: Desk) -> None:
        made.runner._pull_frames()

    kills = 0
    for made, ended in every_kill(lambda: desk(waiting=5), act, {"runner.py", "inflight.py", "ring.py"}):
        kills += not ended
        successor = made.successor()
        for table in (made.lane.table, successor.table):
            assert table.unsettled() == [held(i) for i in range(5)]
            assert {table.state(FIRST_ROW + i) for i in range(5)} == {QUEUED}
        made.close(successor)
    return kills


def run_one(fails: bool, keeps: bool = False) -> int:
    """The state byte never says less than what happened, and a frame never comes before it."""

    def prepare() -> Desk:
        made = desk(fails, 2, keeps)
        made.runner._pull_frames()
        return made

    def act(made: Desk) -> None:
        made.runner._run_next()

    kills = 0
    outcome = FAILED if fails or keeps else SUCCEEDED
    for made, ended in every_kill(prepare, act, {"runner.py", "ring.py", "outcome.py"}):
        kills += not ended
        state, ran = made.channel.table.state(FIRST_ROW), made.ran[0]
        frames = [msgspec.msgpack.decode(f, type=OutcomeFrame) for f in seen(made.channel.outcomes)]
        if ran:
            assert state in (STARTED, outcome), "it ran, and the row does not say so"
        if state == STARTED:
            assert made.channel.mono_deadline_s > 0, "it runs without a limit"
        if state == outcome:
            assert ran
        if frames:
            assert state == FAILED, "a frame whose row does not say FAILED is passed over"
            assert [f.row for f in frames] == [FIRST_ROW]
            failure, kept = frames[0].failure, frames[0].kept
            assert (failure and failure.error) == ("ValueError: told to" if fails else None)
            assert (kept and (kept.job_id, kept.value)) == (("job-0", b'"done"') if keeps else None)
        if ended:
            assert (state, len(frames)) == (outcome, int(fails or keeps))
        assert made.channel.table.state(FIRST_ROW + 1) == QUEUED
        made.close(made.successor())
    return kills


def settle() -> int:
    """A row is forgotten only once it is settled; what was not settled is found again by a new reader."""

    def prepare() -> Desk:
        made = desk(waiting=8)
        made.runner._pull_frames()
        made.channel.table.mark([FIRST_ROW + i for i in (0, 1, 2, 3, 4, 6)], SUCCEEDED)
        return made

    def act(made: Desk) -> None:
        for run in list(made.lane.table.succeeded()):
            made.lane.record_settled(run)
        made.lane.table.advance()

    kills = 0
    for made, ended in every_kill(prepare, act, {"inflight.py", "dispatch.py"}, lines=True):
        kills += not ended
        successor = made.successor()
        table = successor.table
        states = [table.state(FIRST_ROW + i) for i in range(8)]
        left = [i for i in range(8) if states[i] != SETTLED]
        assert {5, 7} <= set(left), "settled what had not ended"
        assert table.tail - FIRST_ROW <= min(left), "forgot a row that is not settled"
        assert [one.row - FIRST_ROW for one in table.unsettled()] == left
        again = [row - FIRST_ROW for run in table.succeeded() for row in run]
        assert again == [i for i in left if i not in (5, 7)]
        if ended:
            assert (left, table.tail) == ([5, 7], FIRST_ROW + 5)
        made.close(successor)
    return kills


SCENARIOS: dict[str, Callable[[], int]] = {
    **{name: lambda case=case: push(case) for name, case in PUSH_CASES.items()},  # type: ignore[misc]
    "release": release,
    "hand_one_frame": lambda: hand(2, 512, lines=False),
    "hand_three_frames": lambda: hand(7, 3, lines=True),
    "take": take,
    "run_succeeding": lambda: run_one(False),
    "run_failing": lambda: run_one(True),
    "run_keeping": lambda: run_one(False, keeps=True),
    "settle": settle,
}


def main() -> None:
    ring._REWIND_BYTES = 256  # so that the small rings here go back to their start too
    assert inflight.ROWS == ROWS
    print(SCENARIOS[sys.argv[1]]())


if __name__ == "__main__":
    main()
