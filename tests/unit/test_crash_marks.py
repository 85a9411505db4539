"""Crash marks: an entry that ends the reader is rejected by the next reader."""

import base64
import json
import os
import random
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import msgspec
import pytest

from jobworker.worker import envelope
from jobworker.worker.envelope import DeadJob
from jobworker.worker.ipc.channel import READY, Channel, JobFrame, OutcomeFrame
from jobworker.worker.ipc.control import Attach, ControlSocket, SyncDone
from jobworker.worker.ipc.crash_marks import POISON_AT_STRIKES, CrashMarks
from jobworker.worker.ipc.inflight import FAILED, STARTED
from jobworker.worker.keys import Source
from jobworker.worker.outcome import Failure
from jobworker.worker.reader import settlement
from jobworker.worker.reader.reader import Reader
from jobworker.worker.settings import Settings
from jobworker.worker.store.memory.server import MemoryServer
from jobworker.worker.store.memory.store import MemoryStore
from jobworker.worker.store.ports import Entry
from support.reader_rig import release

SOURCE = Source("stream", "group")
SETTINGS = Settings(streams=(Source("other", "group"), SOURCE), handlers={"noop": "nowhere:Noop"})
KILLER = 7


class Died(BaseException):
    """Stands for the end of the reader's process."""


def job(number: int) -> bytes:
    return json.dumps({"id": "killer" if number == KILLER else f"job-{number}", "type": "noop"}).encode()


@pytest.fixture
def marks() -> Iterator[CrashMarks]:
    with closing(CrashMarks.create()) as one:
        yield one


# -- what is counted


def test_a_reader_that_ends_without_a_mark_charges_no_entry(marks: CrashMarks) -> None:
    marks.mark_answer(1)
    marks.mark(1, b"5-0")
    marks.clear()
    assert marks.record_death(proven=True) is None
    assert not CrashMarks(marks.fd).poison
    assert not any(map(marks.lists_one_by_one, range(256)))


def test_a_crash_under_a_mark_makes_an_entry_poison_at_once(marks: CrashMarks) -> None:
    marks.mark(1, b"18446744073709551615-18446744073709551615")
    suspect = marks.record_death(proven=True)
    assert suspect is not None
    assert suspect.is_poison
    assert list(CrashMarks(marks.fd).poison) == [(1, b"18446744073709551615-18446744073709551615")]


def test_a_kill_from_outside_must_hit_the_same_entry_three_times(marks: CrashMarks) -> None:
    for death in range(1, POISON_AT_STRIKES + 1):
        for entry in (b"1-0", b"2-0", b"%d-1" % death):
            marks.mark(1, entry)
            marks.record_death(proven=False)
        assert bool(CrashMarks(marks.fd).poison) == (death == POISON_AT_STRIKES)
    assert set(CrashMarks(marks.fd).poison) == {(1, b"1-0"), (1, b"2-0")}


def test_an_answer_of_many_entries_accuses_none_of_them_but_makes_the_next_reader_careful(
    marks: CrashMarks,
) -> None:
    marks.mark_answer(1)
    assert marks.record_death(proven=True) is None
    assert [source for source in range(3) if marks.lists_one_by_one(source)] == [1]
    marks.end_one_by_one(1)
    for careful in (False, False, True):
        marks.mark_answer(0)
        marks.record_death(proven=False)
        assert marks.lists_one_by_one(0) == careful
    assert not CrashMarks(marks.fd).poison


def test_a_reader_that_is_killed_while_it_changes_the_mark_leaves_no_mixture(marks: CrashMarks) -> None:
    marks.mark(1, b"1-0")
    with pytest.raises(ValueError):  # the id does not fit: stands for an end between the writes
        marks.mark(2, b"9" * 100_000)
    assert marks.record_death(proven=True) is None


def test_many_suspects_are_remembered_and_the_oldest_is_forgotten(marks: CrashMarks) -> None:
    for number in range(100):
        marks.mark(0, b"%d-0" % number)
        marks.record_death(proven=True)
    assert [int(id[:-2]) for _, id in sorted(CrashMarks(marks.fd).poison)] == sorted(range(52, 100), key=str)


# -- what readers do


class Bench:
    """A store, one worker that finishes nothing, and readers one after another."""

    def __init__(self, marks: CrashMarks) -> None:
        self.server = MemoryServer(blocking=False)
        self.marks = marks
        self.channel = Channel.create(1024)
        self.channel.batch_hint, self.channel.phase = 1000, READY
        self.store = MemoryStore
        self.proven = True
        self.deaths = 0

    def add(self, jobs: int) -> None:
        for number in range(jobs):
            self.server.append(SOURCE.stream, job(number))

    def read(self, rounds: int = 80) -> bool:
        """Let one reader run; whether it lived. An end is counted as the supervisor does."""
        ours, sock = ControlSocket.pair()
        marks = CrashMarks(os.dup(self.marks.fd))
        with (
            closing(ours),
            closing(ControlSocket(sock)) as theirs,
            closing(self.store(self.server, "a")) as store,
        ):
            reader = Reader(store, SETTINGS, theirs, marks=marks)
            ours.send(Attach(0, 1), self.channel.fds)
            ours.send(SyncDone())
            try:
                for _ in range(rounds):
                    reader.run_once(0.0)
                return True
            except Died:
                self.deaths += 1
                self.marks.record_death(proven=self.proven)
                return False
            finally:
                release(reader)

    def read_until_one_lives(self) -> None:
        while not self.read():
            assert self.deaths < 20

    def given(self) -> list[str]:
        decode = msgspec.msgpack.Decoder(JobFrame).decode
        frames = [decode(frame) for frame, _ in self.channel.jobs.frames()]
        return [json.loads(data)["id"] for frame in frames for _, _, data in frame.jobs]

    def letters(self) -> list[dict[str, Any]]:
        return [json.loads(letter) for letter in self.server.dead_letters(SOURCE.stream)]


@pytest.fixture
def bench(marks: CrashMarks) -> Iterator[Bench]:
    one = Bench(marks)
    yield one
    one.channel.close()


def deadly(real: Callable[..., Any]) -> Callable[..., Any]:
    """A parser that ends its process at the killer."""

    def read(data: bytes) -> Any:
        if b"killer" in data:
            raise Died
        return real(data)

    return read


OTHERS = [f"job-{number}" for number in range(20) if number != KILLER]


@pytest.mark.parametrize(("proven", "deaths"), [(True, 2), (False, 6)])
def test_an_entry_that_ends_readers_is_dead_lettered_and_the_others_are_run(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, proven: bool, deaths: int
) -> None:
    """The first death blames an answer of many entries, the second the entry; unless they were kills that
    may have come from outside."""
    monkeypatch.setattr(envelope, "_decode_route", deadly(envelope._decode_route))
    bench.proven = proven
    bench.add(20)
    bench.read_until_one_lives()
    assert bench.deaths == deaths
    assert sorted(bench.given()) == sorted(OTHERS)
    (letter,) = bench.letters()
    assert (letter["reason"], letter["task"]) == ("poison", None)
    assert letter["error"].startswith("ReaderDied: ")
    assert base64.b64decode(letter["raw"]) == job(KILLER)
    assert bench.read(), "and no later reader is bothered"
    assert not any(map(bench.marks.lists_one_by_one, range(2)))


def test_one_that_came_alone_ends_one_reader(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(envelope, "_decode_route", deadly(envelope._decode_route))
    bench.server.append(SOURCE.stream, job(KILLER))
    bench.read_until_one_lives()
    assert bench.deaths == 1
    assert [letter["reason"] for letter in bench.letters()] == ["poison"]


def test_one_that_ends_readers_by_its_mere_bytes_is_given_up_without_them(bench: Bench) -> None:
    """Say, an answer that the client library cannot survive."""

    class Deadly(MemoryStore):
        def finish_read(self, source: Source) -> list[Entry]:
            return self._alive(super().finish_read(source))

        def own_pending(self, source: Source, after: bytes, count: int) -> list[Entry]:
            return self._alive(super().own_pending(source, after, count))

        def own_ids(self, source: Source, after: bytes, count: int) -> list[bytes]:
            return [entry.id for entry in MemoryStore.own_pending(self, source, after, count)]

        @staticmethod
        def _alive(entries: list[Entry]) -> list[Entry]:
            if any(b"killer" in (entry.data or b"") for entry in entries):
                raise Died
            return entries

    bench.store = Deadly
    bench.add(20)
    bench.read_until_one_lives()
    assert bench.deaths == 3
    assert sorted(bench.given()) == sorted(OTHERS)
    (letter,) = bench.letters()
    assert (letter["reason"], letter["task"], letter.get("raw")) == ("poison", None, None)


def test_one_that_ends_the_reader_as_it_is_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dead letter of a malformed job, its log line, or whatever else is made of it."""
    real = settlement.dead_letter

    def dead_letter(job: DeadJob, **facts: str) -> bytes:
        if job.reason == "malformed":
            raise Died
        return real(job, **facts)

    monkeypatch.setattr(settlement, "dead_letter", dead_letter)
    bench.add(3)
    bench.server.append(SOURCE.stream, b"no job")
    bench.read_until_one_lives()
    assert bench.deaths == 1
    assert sorted(bench.given()) == ["job-0", "job-1", "job-2"]
    assert [base64.b64decode(letter["raw"]) for letter in bench.letters()] == [b"no job"]


def test_one_that_ends_the_reader_as_its_failure_is_settled(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.add(20)
    assert bench.read()
    row = bench.given().index("killer")
    for state in (STARTED, FAILED):
        bench.channel.table.states[row] = state
    bench.channel.outcomes.push(msgspec.msgpack.encode(OutcomeFrame(row, Failure("ValueError: no"))))
    monkeypatch.setattr(envelope, "_decode_header", deadly(envelope._decode_header))
    bench.read_until_one_lives()
    assert bench.deaths == 1
    (letter,) = bench.letters()
    assert letter["reason"] == "poison"
    assert base64.b64decode(letter["raw"]) == job(KILLER)


def test_readers_that_are_killed_all_the_time_give_nothing_up(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each entry that is parsed is as likely to be hit as any other, and the first ones are hit often."""
    real, rng = envelope._decode_route, random.Random(20260102)

    def read(data: bytes) -> Any:
        if rng.random() < 0.1:
            raise Died
        return real(data)

    monkeypatch.setattr(envelope, "_decode_route", read)
    bench.proven = False
    bench.add(300)
    while not bench.read():
        assert bench.deaths < 200
    assert bench.deaths > 10
    assert bench.letters() == []
    assert len(set(bench.given())) == len(bench.given()) == 300
