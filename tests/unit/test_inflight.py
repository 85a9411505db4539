"""The in-flight table compared with a model, and its use by a new reader."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from jobworker.worker.ipc.channel import READY, Channel
from jobworker.worker.ipc.control import ControlSocket
from jobworker.worker.ipc.inflight import (
    FAILED,
    QUEUED,
    RETURNED,
    ROWS,
    SETTLED,
    STARTED,
    SUCCEEDED,
    TABLE_BYTES,
    InFlight,
    InFlightJob,
)
from jobworker.worker.reader.admission import AdmittedJob
from jobworker.worker.reader.dispatch import WorkerHandle
from jobworker.worker.runner import Runner
from jobworker.worker.store.ports import Entry
from support import programs

#: Without the phase that explains a failure: it takes minutes for a machine of this size.
PHASES = (Phase.explicit, Phase.generate, Phase.shrink)
LONGEST_ID = b"18446744073709551615-18446744073709551615"
IDS = st.one_of(
    st.builds(lambda a, b: b"%d-%d" % (a, b), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)),
    st.just(LONGEST_ID),
    st.just(b"0-1"),
)
ROW = st.tuples(st.integers(0, 255), st.integers(0, 255), st.integers(0, 255), st.booleans(), IDS)


def table(start: int = 0) -> InFlight:
    """An empty table whose next row is ``start``."""
    words = memoryview(bytearray(16)).cast("Q")
    words[0] = words[1] = start
    return InFlight(words, 0, 1, memoryview(bytearray(TABLE_BYTES)))


class InFlightAgainstDict(RuleBasedStateMachine):
    """Rows are handed out, run and settled in any order that the two sides allow, over the table's end."""

    def __init__(self) -> None:
        super().__init__()
        self.table = table(3 * ROWS - 5)
        self.rows: dict[int, InFlightJob] = {}
        self.states: dict[int, int] = {}

    @rule(rows=st.lists(ROW, min_size=1, max_size=30))
    def hand_out(self, rows: list[tuple[int, int, int, bool, bytes]]) -> None:
        first = self.table.head
        columns = list(zip(*rows, strict=True))
        self.table.write(*columns)
        self.table.head += len(rows)
        for row, values in enumerate(rows, first):
            self.rows[row] = InFlightJob(row, *values)
            self.states[row] = QUEUED

    @rule(data=st.data(), state=st.sampled_from([STARTED, SUCCEEDED, FAILED]))
    def run(self, data: st.DataObject, state: int) -> None:
        open_rows = [row for row, at in self.states.items() if at in (QUEUED, STARTED)]
        if open_rows:
            chosen = data.draw(st.lists(st.sampled_from(open_rows), unique=True, max_size=10))
            self.table.mark(chosen, state)
            self.states.update(dict.fromkeys(chosen, state))

    @rule()
    def settle_what_succeeded(self) -> None:
        runs = list(self.table.succeeded())
        found = [row for run in runs for row in run]
        assert found == [row for row in sorted(self.states) if self.states[row] == SUCCEEDED]
        for run in runs:
            stream_nos, type_nos, ids = self.table.columns(run)
            rows = [self.rows[row] for row in run]
            assert list(stream_nos) == [r.stream_no for r in rows]
            assert list(type_nos) == [r.type_no for r in rows]
            assert ids == [r.entry_id for r in rows]
            self.table.settle(run)
            self.states.update(dict.fromkeys(run, SETTLED))

    @rule()
    def settle_what_failed(self) -> None:
        failed = [row for row, state in self.states.items() if state == FAILED]
        self.table.mark(failed, SETTLED)
        self.states.update(dict.fromkeys(failed, SETTLED))

    @rule()
    def forget_what_is_settled(self) -> None:
        self.table.advance()
        while self.states and self.states[first := min(self.states)] == SETTLED:
            del self.states[first], self.rows[first]
        assert self.table.tail == min(self.states, default=self.table.head)

    @rule()
    def look(self) -> None:
        assert self.table.unsettled() == [
            self.rows[r] for r in sorted(self.rows) if self.states[r] != SETTLED
        ]
        assert {row: self.table.state(row) for row in self.rows} == self.states
        assert len(self.table) == len(self.states)


TestInFlightAgainstDict = InFlightAgainstDict.TestCase
TestInFlightAgainstDict.settings = settings(max_examples=40, stateful_step_count=30, phases=PHASES)


def test_the_whole_table_can_be_in_use_over_its_end() -> None:
    full = table(ROWS // 2)
    ids = [b"%d-0" % i for i in range(ROWS)]
    full.write([1] * ROWS, [2] * ROWS, [3] * ROWS, [True] * ROWS, ids)
    full.head += ROWS
    rows = range(full.tail, full.head)
    assert [one.entry_id for one in full.unsettled()] == ids
    full.mark(rows, SUCCEEDED)
    assert [row for run in full.succeeded() for row in run] == list(rows)
    assert full.columns(rows) == (bytes([1]) * ROWS, bytes([2]) * ROWS, ids)
    full.settle(rows)
    full.advance()
    assert (len(full), full.tail) == (0, ROWS // 2 + ROWS)


def one_queued() -> InFlight:
    made = table()
    made.write([0], [0], [0], [False], [b"1-0"])
    made.head += 1
    return made


@pytest.mark.parametrize(
    "begins", ["before it is asked for", "before it is taken", "while it is taken", "later"]
)
def test_a_job_that_is_asked_back_while_it_starts_belongs_to_one_side(begins: str) -> None:
    rows = one_queued()
    begun = []
    if begins == "before it is asked for":
        begun.append(rows.begin(0))
    rows.ask_back([0])
    if begins == "before it is taken":
        begun.append(rows.begin(0))
    if begins == "while it is taken":
        rows.state = lambda row, state=rows.state: (state(row), begun.append(rows.begin(row)))[0]  # type: ignore[method-assign]
    taken = rows.take_back([0])
    vars(rows).pop("state", None)
    if begins == "later":
        begun.append(rows.begin(0))
    came_back = rows.state(0) == RETURNED and not rows.is_taken_back(0)
    assert [begun[0], bool(taken), came_back].count(True) == 1, "exactly one side has it"
    assert [job.entry_id for job in rows.unsettled()] == ([] if taken else [b"1-0"])


def test_a_reused_row_is_not_asked_back() -> None:
    rows = one_queued()
    rows.ask_back([0])
    assert rows.queued() == []
    assert rows.take_back([0]) == [0]
    assert not rows.begin(0)
    rows.mark([0], SETTLED)
    rows.advance()
    for _ in range(ROWS):
        rows.write([0], [0], [0], [False], [b"2-0"])
        rows.head += 1
        assert rows.begin(rows.head - 1)
        rows.mark([rows.head - 1], SETTLED)
        rows.advance()


def test_a_row_more_than_the_table_has_is_refused() -> None:
    full = table()
    full.write([0] * ROWS, [0] * ROWS, [0] * ROWS, [False] * ROWS, [b"1-1"] * ROWS)
    full.head += ROWS
    with pytest.raises(AssertionError):
        full.write([0], [0], [0], [False], [b"1-1"])


# -- a new reader


@pytest.fixture
def channel() -> Iterator[Channel]:
    made = Channel.create(1024)
    made.phase = READY
    yield made
    made.close()


def arrivals(count: int, start: int = 0) -> list[AdmittedJob]:
    body = b'{"id":"a","type":"t"}'
    return [AdmittedJob(0, 0, Entry(b"%d-0" % i, body), False) for i in range(start, start + count)]


@pytest.fixture
def runner(channel: Channel) -> Iterator[Runner]:
    link, theirs = ControlSocket.pair()
    made = Runner(channel, ControlSocket(theirs), {}, ["s"])
    made._lookahead = 10_000
    yield made
    made._states.release()  # or the channel's memory could not be given back
    link.close()
    theirs.close()


def new_reader(channel: Channel) -> WorkerHandle:
    return WorkerHandle(0, 1, Channel(*[os.dup(fd) for fd in channel.fds]), 0.0)


@pytest.mark.parametrize(
    ("before", "taken", "after"), [(0, False, 5), (5, True, 0), (5, True, 7), (700, True, 600)]
)
def test_a_new_reader_finds_the_head(
    channel: Channel, runner: Runner, before: int, taken: bool, after: int
) -> None:
    """From frames that the worker took, from those it did not, and from both."""
    first = WorkerHandle(0, 0, channel, 0.0)
    assert first.dispatch(arrivals(before)) == before
    if taken:
        runner._pull_frames()
    assert first.dispatch(arrivals(after, before)) == after
    second = new_reader(channel)
    assert second.table.head == before + after
    assert [one.entry_id for one in second.table.unsettled()] == [b"%d-0" % i for i in range(before + after)]
    assert second.dispatch(arrivals(1, before + after)) == 1
    assert second.table.unsettled()[-1].row == before + after
    second.channel.close()


def test_a_new_reader_finds_the_head_though_the_worker_takes_meanwhile(
    channel: Channel, runner: Runner
) -> None:
    assert WorkerHandle(0, 0, channel, 0.0).dispatch(arrivals(5)) == 5
    opened = Channel(*[os.dup(fd) for fd in channel.fds])
    runner._pull_frames()  # between the reader's opening the table and its looking into the ring
    second = WorkerHandle(0, 1, opened, 0.0)
    assert second.table.head == 5
    opened.close()


def drain(channel: Channel) -> None:
    for _, tail in channel.jobs.frames():
        channel.jobs.release(tail)


@pytest.mark.parametrize("max_payload", [1024, 65536, 8 * 1024 * 1024])
def test_jobs_of_any_allowed_size_fit_into_frames(max_payload: int) -> None:
    made = Channel.create(max_payload)
    made.phase = READY
    lane = WorkerHandle(0, 0, made, 0.0)
    for size in (1000, max_payload // 2, max_payload):
        jobs = [
            AdmittedJob(0, 0, Entry(LONGEST_ID, b"x" * size), False)
            for _ in range(min(600, 2**20 // size + 1))
        ]
        given = 0
        while given < len(jobs):
            more = lane.dispatch(jobs[given:])
            assert more, f"stuck at job {given} of {size} bytes"
            given += more
            drain(made)
    made.close()


@pytest.mark.parametrize("name", ["hand_one_frame", "hand_three_frames", "take", "settle"])
def test_killed_at_any_instruction(name: str) -> None:
    assert int(programs.run("kill_scenarios", name)) > 50


def test_no_job_runs_twice_though_its_worker_is_stopped_while_it_is_asked_back() -> None:
    ran, taken, returned = map(int, programs.run("hand_back").split())
    assert min(ran, taken, returned) > 0
