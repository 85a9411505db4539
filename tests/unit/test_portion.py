"""How much the reader asks for and holds, by the size of what comes."""

import pytest

from jobworker.worker.reader import prefetch as backlogs
from jobworker.worker.reader.admission import AdmittedJob
from jobworker.worker.reader.leases import ReadCount
from jobworker.worker.reader.prefetch import PrefetchBuffer
from jobworker.worker.store.ports import Entry

MIB = 1024 * 1024


def entries(*sizes: int) -> list[Entry]:
    return [Entry(b"%d-0" % number, b"x" * size) for number, size in enumerate(sizes)]


def test_small_entries_are_soon_asked_for_by_the_hundred() -> None:
    portion = ReadCount()
    for _ in range(7):
        portion.learn(entries(*[200] * portion.entries))
    assert portion.entries == 1024


def test_the_first_answer_is_bounded_whatever_comes() -> None:
    assert ReadCount().entries * 8 * MIB <= 64 * MIB


def test_after_one_large_entry_among_small_ones_one_is_asked_for() -> None:
    portion = ReadCount()
    portion.learn(entries(200, 8 * MIB, 200))
    assert portion.entries == 1
    portion.learn(entries(200))
    assert portion.entries == 2, "and then more again"


def test_no_more_are_asked_for_than_fit() -> None:
    portion = ReadCount()
    for _ in range(9):
        portion.learn(entries(64 * 1024))
    assert portion.entries == 64


def test_an_entry_without_data_is_a_small_one() -> None:
    portion = ReadCount()
    portion.learn([Entry(b"1-0", None)])
    assert portion.entries == 16


def test_what_waits_is_full_by_bytes_and_operators_pauses_do_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backlogs, "_HELD_BYTES", 1000)
    backlog = PrefetchBuffer(["small", "large"])
    assert not backlog.full
    for entry in entries(1, 1, 1, 400):
        backlog.add(AdmittedJob(0, 0, entry, False))
    assert not backlog.full, "four jobs of the largest's size would be"
    for entry in entries(300, 300):
        backlog.add(AdmittedJob(0, 1, entry, False))
    assert backlog.full
    backlog.set_paused_types({1})
    assert not backlog.full
    backlog.set_paused_types(set())
    assert backlog.full
    backlog.clear()
    assert not backlog.full
