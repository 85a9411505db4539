"""Line writer: a descriptor that blocks delays a caller once, and no line is lost without being counted."""

import os
import select
import threading
from collections.abc import Iterator

import pytest

from jobworker.worker.telemetry.line_writer import LineWriter, write_all, write_briefly

WITHIN_S = 10.0


class Blocking:
    """A destination that takes nothing until it is opened."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.full_disk = False
        self.gate = threading.Event()

    def write(self, line: bytes) -> None:
        assert self.gate.wait(WITHIN_S)
        if self.full_disk:
            raise OSError(28, "No space left on device")
        self.lines.append(line)


@pytest.fixture
def destination() -> Iterator[Blocking]:
    blocking = Blocking()
    yield blocking
    blocking.gate.set()


def writer_to(destination: Blocking, max_bytes: int = 8) -> LineWriter:
    return LineWriter(destination.write, b"%d dropped".__mod__, max_bytes=max_bytes, patience_s=0.001)


def test_a_blocked_destination_keeps_a_bounded_number_of_bytes_and_counts_the_rest(
    destination: Blocking,
) -> None:
    writer = writer_to(destination)
    for line in (b"aaaa", b"bbbb", b"cccc", b"dddd"):
        writer.put(line)
    assert writer.take_dropped() == 2
    assert writer.take_dropped() == 0
    destination.gate.set()
    writer.flush()
    assert destination.lines == [b"aaaa", b"bbbb", b"2 dropped"]


def test_a_caller_waits_once_for_a_blocked_destination(
    destination: Blocking, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = writer_to(destination, max_bytes=1000)
    writer.put(b"a")
    waits: list[object] = []
    monkeypatch.setattr(writer, "_wait_for", lambda *a: waits.append(a))
    for _ in range(100):
        writer.put(b"b")
    assert waits == []


def test_a_line_is_written_when_the_call_returns(destination: Blocking) -> None:
    """The last lines before a crash are the most wanted."""
    destination.gate.set()
    writer = LineWriter(destination.write, bytes, patience_s=WITHIN_S)
    for number in range(100):
        writer.put(b"%d" % number)
        assert len(destination.lines) == number + 1


def test_lines_lost_on_a_full_disk_are_counted_once(destination: Blocking) -> None:
    destination.gate.set()
    destination.full_disk = True
    writer = LineWriter(destination.write, b"%d dropped".__mod__, patience_s=WITHIN_S)
    for _ in range(3):
        writer.put(b"a")
    assert writer.take_dropped() == 3
    destination.full_disk = False
    writer.put(b"b")
    assert destination.lines == [b"3 dropped", b"b"]


def test_a_forked_child_writes_its_own_lines_only(destination: Blocking) -> None:
    writer = writer_to(destination, max_bytes=1000)
    writer.put(b"of the parent")
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:  # pragma: no cover
        writer._write = lambda line: os.write(theirs, line)
        writer.put(b"of the child")
        writer.flush()
        os._exit(0)
    os.close(theirs)
    assert os.waitpid(pid, 0)[1] == 0
    with open(ours, "rb") as pipe:
        assert pipe.read() == b"of the child"


def test_a_non_blocking_pipe_gets_the_whole_text() -> None:
    """Another program that shares stderr may have made it non-blocking."""
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    text = bytes(range(256)) * 4096
    thread = threading.Thread(target=write_all, args=(theirs, text))
    thread.start()
    received = b""
    while len(received) < len(text):
        assert select.select([ours], [], [], WITHIN_S)[0]
        received += os.read(ours, 1 << 16)
    thread.join(WITHIN_S)
    os.close(ours)
    os.close(theirs)
    assert received == text


def test_last_words_do_not_keep_a_process_from_its_exit() -> None:
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    os.write(theirs, b"x" * (1 << 20))
    os.set_blocking(theirs, True)
    write_briefly(theirs, b"the last words")
    os.close(ours)  # ends the thread that writes
    os.close(theirs)
