"""The shared memory of one worker: both sides see the same, wake each other, and leave nothing behind."""

import mmap
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobworker.worker.ipc.channel import READY, STARTING, STOPPING, Channel, clear_eventfd


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    """The supervisor's view and a child's."""
    one = Channel.create(4096)
    other = Channel(*[os.dup(fd) for fd in one.fds])
    yield one, other
    one.close()
    other.close()


def test_both_ends_see_what_either_writes(ends: tuple[Channel, Channel]) -> None:
    one, other = ends
    assert (one.phase, one.batch_hint, one.finished, one.mono_deadline_s) == (STARTING, 0, 0, 0.0)
    other.phase, other.batch_hint, other.finished = STOPPING, 32, 2**40
    other.set_running(12.5, 72.5)
    other.heartbeat(99.25)
    assert (one.phase, one.batch_hint, one.finished) == (STOPPING, 32, 2**40)
    assert (one.mono_since_s, one.mono_deadline_s, one.mono_heartbeat_s) == (12.5, 72.5, 99.25)


def test_no_two_words_are_one(ends: tuple[Channel, Channel]) -> None:
    """Each is written in turn; all the others keep what they had."""
    one, other = ends
    one.phase, one.batch_hint, one.finished = READY, 7, 11
    one.set_running(1.5, 2.5)
    one.heartbeat(3.5)
    one.table.taken = 0
    assert one.jobs.push(b"job")
    assert one.outcomes.push(b"outcome")
    for ring, frame in ((other.jobs, b"job"), (other.outcomes, b"outcome")):
        (seen,) = [bytes(view) for view, _ in ring.frames()]
        assert seen == frame
    one.table.write([1], [2], [3], [True], [b"9-9"])
    assert (other.phase, other.batch_hint, other.finished) == (READY, 7, 11)
    assert (other.mono_since_s, other.mono_deadline_s, other.mono_heartbeat_s) == (1.5, 2.5, 3.5)
    assert (other.table.tail, other.table.taken) == (0, 0)
    assert other.table.job(0) == (0, 1, 2, 3, True, b"9-9")


def test_the_areas_do_not_overlap(ends: tuple[Channel, Channel]) -> None:
    one, other = ends
    for ring in (one.jobs, one.outcomes):
        assert ring.push(b"\xff" * ring.largest)
    longest_id = b"18446744073709551615-18446744073709551615"
    one.table.write([1] * 4096, [2] * 4096, [3] * 4096, [True] * 4096, [longest_id] * 4096)
    one.table.head = 4096
    assert len(other.table.states) == 4096
    for ring in (other.jobs, other.outcomes):
        (frame,) = [bytes(view) for view, _ in ring.frames()]
        assert frame == b"\xff" * ring.largest
    assert one.table.job(4095) == (4095, 1, 2, 3, True, longest_id)


def test_the_worker_is_woken_by_jobs(ends: tuple[Channel, Channel]) -> None:
    one, other = ends
    quiet, _writing_end = os.pipe()
    one.wake_worker()
    one.wake_worker()
    assert other.wait_for_jobs(5.0, quiet) == (True, False)
    assert other.wait_for_jobs(0.0, quiet) == (False, False), "two wakes are one"
    os.close(quiet)
    os.close(_writing_end)


def test_the_worker_is_woken_by_the_supervisors_line(ends: tuple[Channel, Channel]) -> None:
    reading, writing = os.pipe()
    os.close(writing)
    started = time.monotonic()
    assert ends[1].wait_for_jobs(30.0, reading) == (False, True)
    assert time.monotonic() - started < 10
    os.close(reading)


def test_the_reader_is_woken_once(ends: tuple[Channel, Channel]) -> None:
    one, other = ends
    assert not clear_eventfd(one.fds[2])
    other.wake_reader()
    other.wake_reader()
    assert clear_eventfd(one.fds[2])
    assert not clear_eventfd(one.fds[2])


def test_the_largest_job_fits_twice_over() -> None:
    for max_payload in (1024, 10**6):
        channel = Channel.create(max_payload)
        assert channel.jobs.largest > max_payload + 1024
        channel.close()


def test_memory_is_taken_only_as_it_is_touched() -> None:
    """A channel for jobs of 512 MiB costs next to nothing until such a job comes."""
    channel = Channel.create(512 * 1024 * 1024)
    status = os.fstat(channel.fds[0])
    assert status.st_size > 2**30
    assert status.st_blocks * 512 < 2**20
    channel.close()


def test_closing_gives_memory_and_descriptors_back() -> None:
    def open_files() -> list[str]:
        found = [os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
        return [name for name in found if "jobworker" in name or "eventfd" in name]

    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count("memfd:jobworker")

    before = sorted(open_files()), mapped()
    channels = [Channel.create(4096) for _ in range(5)]
    for channel in channels:
        channel.jobs.push(b"x")
        assert [tail for _, tail in channel.jobs.frames()]
        channel.close()
    assert (sorted(open_files()), mapped()) == before


def test_descriptors_are_not_inherited_by_chance(ends: tuple[Channel, Channel]) -> None:
    assert not any(os.get_inheritable(fd) for fd in ends[0].fds)
    assert mmap.PAGESIZE <= 4096 or ends[0].jobs.largest  # the layout is in units of 4 KiB
