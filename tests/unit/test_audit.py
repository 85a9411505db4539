"""Audit archive: every entry once, durable, readable by common tools, also after kills and disk errors."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from jobworker.handlers.audit import day_file
from jobworker.handlers.audit.day_file import ArchiveLine, DayFile
from jobworker.handlers.audit.handler import Archive
from jobworker.handlers.audit.index import StreamIndex, entry_key
from jobworker.handlers.audit.units import EntryRef, Unit, pack_unit, read_units
from jobworker.handlers.settings import HandlerSettings
from jobworker.worker import Job, PermanentError, Unavailable
from support.tools import why_missing

#: 2026-01-02T00:00:00Z.
DAY_MS = 1_767_312_000_000
STREAM = "stream:audit:log"
NO_TOOLS = why_missing("zstd", "zstdcat") or why_missing("jq", "jq")


def job(number: int, *, ms: int = DAY_MS, retry_count: int = 0, **more: Any) -> Job:
    fields = {
        "id": f"a-{number}", "type": "audit", "tenant_id": "t1", "project_id": "", "payload": {"n": number},
        "metadata": {"request_id": "r"}, "created_at": "2026-01-02T00:00:00Z", "stream": STREAM,
        "entry_id": f"{ms}-{number}", "retry_count": retry_count,
    }  # fmt: skip
    return Job(**(fields | more))


def archive(folder: Path) -> Archive:
    made = Archive()
    made.setup(HandlerSettings(data_dir=str(folder)))
    return made


def lines(folder: Path, day: str = "2026-01-02") -> list[dict[str, Any]]:
    path = folder / "audit" / f"{day}.jsonl.zst"
    with (
        path.open("rb") as file,
        zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True) as reader,
    ):
        return [json.loads(line) for line in reader.read().splitlines()]


def numbers(folder: Path, day: str = "2026-01-02") -> list[int]:
    return [line["payload"]["n"] for line in lines(folder, day)]


def test_a_line_holds_the_job_as_received(tmp_path: Path) -> None:
    payload = {
        "actor": "阿Q",
        "big": 9007199254740993,
        "huge": 10**30,
        "tiny": 1e-7,
        "nested": [None, {"ok": True}],
    }
    assert archive(tmp_path).handle_batch([job(1, payload=payload)]) == [None]
    (line,) = lines(tmp_path)
    assert line.pop("archived_at").endswith("Z")
    assert line == {
        "entry_id": f"{DAY_MS}-1", "stream": STREAM, "id": "a-1", "type": "audit", "tenant_id": "t1",
        "project_id": "", "created_at": "2026-01-02T00:00:00Z", "metadata": {"request_id": "r"},
        "payload": payload,
    }  # fmt: skip


@pytest.mark.skipif(NO_TOOLS is not None, reason=str(NO_TOOLS))
def test_zstdcat_and_jq_read_the_archive(tmp_path: Path) -> None:
    one = archive(tmp_path)
    for start in range(0, 30, 10):
        one.handle_batch([job(n) for n in range(start, start + 10)])
    command = f"zstdcat {tmp_path}/audit/2026-01-02.jsonl.zst | jq -s 'map(.payload.n) | add'"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60, check=True)
    assert int(done.stdout) == sum(range(30))
    assert done.stderr == ""


def test_an_entry_goes_to_the_file_of_its_stream_time(tmp_path: Path) -> None:
    outcomes = archive(tmp_path).handle_batch(
        [job(1, ms=DAY_MS - 1), job(2), job(3, ms=0), job(4, ms=2**64 - 1)]
    )
    assert outcomes == [None] * 4
    files = sorted(path.name for path in (tmp_path / "audit").iterdir())
    assert files == [f"{day}.jsonl.zst" for day in ("1970-01-01", "2026-01-01", "2026-01-02", "9999-12-31")]


def test_a_bad_payload_does_not_fail_the_rest_of_the_batch(tmp_path: Path) -> None:
    outcomes = archive(tmp_path).handle_batch([job(1, payload=[1]), job(2), job(3, payload=None)])
    assert [type(outcome) for outcome in outcomes] == [PermanentError, type(None), PermanentError]
    assert "payload must be an object, not list" in str(outcomes[0])
    assert numbers(tmp_path) == [2]


def test_an_entry_delivered_again_to_any_worker_is_skipped(tmp_path: Path) -> None:
    first, second = archive(tmp_path), archive(tmp_path)
    first.handle_batch([job(1), job(2)])
    second.handle_batch([job(2), job(3), job(3)])
    first.handle_batch([job(3), job(1), job(4)])
    archive(tmp_path).handle_batch([job(n) for n in (4, 1, 5)])
    assert numbers(tmp_path) == [1, 2, 3, 4, 5]
    assert first.counters == {"audit_entries": 3, "audit_duplicates": 2}


def test_equal_ids_of_different_streams_or_jobs_are_different_entries(tmp_path: Path) -> None:
    one = archive(tmp_path)
    one.handle_batch([job(1), job(1, stream="stream:other"), job(1, payload={"n": 7})])
    one.handle_batch([job(1), job(1, stream="stream:other"), job(1, payload={"n": 7})])
    assert sorted(numbers(tmp_path)) == [1, 1, 7]


def test_a_retry_of_an_archived_job_is_skipped(tmp_path: Path) -> None:
    """A job killed at its timeout may have been archived already; its retry is a new entry."""
    archive(tmp_path).handle_batch([job(1), job(2, ms=DAY_MS + 86_400_000)])
    later = [
        job(1, entry_id=f"{DAY_MS + 86_400_005}-0", retry_count=1),
        job(2, entry_id=f"{DAY_MS + 86_400_006}-0", retry_count=1),
        job(3, entry_id=f"{DAY_MS + 86_400_007}-0", retry_count=1),
    ]
    assert archive(tmp_path).handle_batch(later) == [None] * 3
    assert (numbers(tmp_path), numbers(tmp_path, "2026-01-03")) == ([1], [2, 3])


@pytest.mark.parametrize("left", ["half", "header", "zeros", "rubbish"])
def test_a_torn_end_is_cut_off_and_saved(tmp_path: Path, left: str) -> None:
    archive(tmp_path).handle_batch([job(1)])
    path = tmp_path / "audit" / "2026-01-02.jsonl.zst"
    whole = path.read_bytes()
    tail = {"half": whole[:-3], "header": whole[:9], "zeros": bytes(5000), "rubbish": b"\xff" * 77}[left]
    path.write_bytes(whole + tail)
    assert archive(tmp_path).handle_batch([job(1), job(2)]) == [None, None]
    assert numbers(tmp_path) == [1, 2]
    (aside,) = path.parent.glob("*.torn-*")
    assert aside.read_bytes() == tail


def test_a_writer_cuts_off_the_torn_end_of_another(tmp_path: Path) -> None:
    one = archive(tmp_path)
    one.handle_batch([job(1)])
    with (tmp_path / "audit" / "2026-01-02.jsonl.zst").open("ab") as file:
        file.write(b"killed while it wrote")
    one.handle_batch([job(2)])
    assert numbers(tmp_path) == [1, 2]


def test_a_new_file_is_created_after_a_move(tmp_path: Path) -> None:
    one = archive(tmp_path)
    one.handle_batch([job(1)])
    path = tmp_path / "audit" / "2026-01-02.jsonl.zst"
    path.rename(tmp_path / "taken")
    assert one.handle_batch([job(2)]) == [None]
    assert numbers(tmp_path) == [2]


def test_a_day_that_another_program_compressed_is_kept_beside_the_new_file(tmp_path: Path) -> None:
    archive(tmp_path).handle_batch([job(1), job(2)])
    path = tmp_path / "audit" / "2026-01-02.jsonl.zst"
    path.write_bytes(zstandard.ZstdCompressor(level=19).compress(b'{"old": 1}\n'))
    before = path.read_bytes()
    assert archive(tmp_path).handle_batch([job(3)]) == [None]
    assert numbers(tmp_path) == [3]
    (aside,) = (file for file in path.parent.glob("2026-01-02*.jsonl.zst") if file != path)
    assert aside.read_bytes() == before


def test_concurrent_writers_lose_and_duplicate_no_entry(tmp_path: Path) -> None:
    """Threads are as good as processes here: the lock belongs to an open file, and each has its own."""
    count, writers = 300, 4
    rounds = [[job(n) for n in range(start, start + 20)] for start in range(0, count, 20)]

    def write(number: int) -> None:
        one = archive(tmp_path)
        for batch in rounds[number:] + rounds[:number]:
            assert one.handle_batch(batch) == [None] * len(batch)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(numbers(tmp_path)) == list(range(count))


def test_a_full_disk_is_unavailable_and_leaves_no_half_unit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = archive(tmp_path)
    one.handle_batch([job(1)])
    real = os.pwrite

    def full(fd: int, data: bytes, offset: int) -> int:
        real(fd, bytes(data)[:10], offset)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(day_file.os, "pwrite", full)
    (outcome,) = one.handle_batch([job(2)])
    assert isinstance(outcome, Unavailable)
    assert "No space left" in str(outcome)
    monkeypatch.setattr(day_file.os, "pwrite", real)
    assert one.handle_batch([job(2), job(3)]) == [None, None]
    assert numbers(tmp_path) == [1, 2, 3]
    assert not list((tmp_path / "audit").glob("*.torn-*"))


def test_no_job_is_done_before_its_entry_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = archive(tmp_path), archive(tmp_path)
    one.handle_batch([job(0)])
    other.handle_batch([job(0)])
    real, written = os.pwrite, []

    def failing(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    def recorded(fd: int, data: bytes, offset: int) -> int:
        written.append(offset)
        return real(fd, data, offset)

    monkeypatch.setattr(day_file.os, "fsync", failing)
    assert isinstance(one.handle_batch([job(1)])[0], Unavailable)
    assert isinstance(other.handle_batch([job(1)])[0], Unavailable), "a duplicate must be synced, too"
    monkeypatch.setattr(day_file.os, "pwrite", recorded)
    monkeypatch.setattr(day_file.os, "fsync", lambda fd: None)
    assert one.handle_batch([job(1)]) == [None]
    assert len(written) == 1, "pages of a failed sync must be written again"
    assert numbers(tmp_path) == [0, 1]


def test_the_wait_for_the_file_lock_has_a_timeout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(day_file, "LOCK_WITHIN_S", 0.05)
    holder = DayFile(tmp_path / "day", zstandard.ZstdCompressor().compress)
    with holder._locked():
        waiting = DayFile(tmp_path / "day", zstandard.ZstdCompressor().compress)
        with pytest.raises(Unavailable, match="held"):
            waiting.append("s", [ArchiveLine(EntryRef(1, 1, 1), b"{}\n")])
    holder.close()
    waiting.close()


KILLED_WITH_HALF_A_UNIT = """
import os, signal, sys
from jobworker.handlers.audit import day_file
from jobworker.handlers.audit.units import EntryRef
real = os.pwrite
def half(fd, data, offset):
    real(fd, bytes(data)[: len(data) // 2], offset)
    os.kill(os.getpid(), signal.SIGKILL)
day_file.os.pwrite = half
line = day_file.ArchiveLine(EntryRef(9, 9, 9), b"x" * 99)
day_file.DayFile(day_file.Path(sys.argv[1]), bytes).append("s", [line])
"""


def test_a_writer_killed_with_the_lock_and_half_a_unit_blocks_no_other(tmp_path: Path) -> None:
    one = archive(tmp_path)
    one.handle_batch([job(1)])
    path = tmp_path / "audit" / "2026-01-02.jsonl.zst"
    before = path.stat().st_size
    done = subprocess.run([sys.executable, "-c", KILLED_WITH_HALF_A_UNIT, path], timeout=60, check=False)
    assert (done.returncode, path.stat().st_size > before) == (-signal.SIGKILL, True)
    assert one.handle_batch([job(1), job(2)]) == [None, None]
    assert numbers(tmp_path) == [1, 2]


def test_a_large_batch_is_split_into_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobworker.handlers.audit.handler._FRAME_BYTES", 1000)
    archive(tmp_path).handle_batch([job(n, payload={"n": n, "text": "x" * 400 * (n % 4)}) for n in range(20)])
    assert numbers(tmp_path) == list(range(20))
    data = (tmp_path / "audit" / "2026-01-02.jsonl.zst").read_bytes()
    assert len(list(read_units(lambda at, size: data[at : at + size], 0, len(data)))) > 5


REFS = st.lists(
    st.builds(EntryRef, *[st.integers(0, 2**64 - 1)] * 3), unique_by=entry_key, max_size=12
)  # fmt: skip
UNITS = st.lists(st.tuples(st.sampled_from(["s", "流"]), REFS, st.binary(max_size=50)), max_size=6)


@given(UNITS, st.data())
def test_a_truncated_file_yields_its_whole_units(
    parts: list[tuple[str, list[EntryRef], bytes]], data: st.DataObject
) -> None:
    packed = [pack_unit(*part) for part in parts]
    file = b"".join(packed)
    length = data.draw(st.integers(0, len(file)))
    read = list(read_units(lambda at, size: file[at : min(at + size, length)], 0, length))
    ends = [sum(map(len, packed[: n + 1])) for n in range(len(packed))]
    assert [(unit.stream, unit.refs, unit.end) for unit in read] == [
        (stream, refs, end) for (stream, refs, _), end in zip(parts, ends, strict=True) if end <= length
    ]


@given(UNITS.filter(bool), st.data())
def test_a_changed_byte_is_detected(
    parts: list[tuple[str, list[EntryRef], bytes]], data: st.DataObject
) -> None:
    file = bytearray(b"".join(pack_unit(*part) for part in parts))
    at = data.draw(st.integers(0, len(file) - 1))
    file[at] ^= data.draw(st.integers(1, 255))
    stop = 0
    for unit in read_units(lambda start, size: bytes(file[start : start + size]), 0, len(file)):
        assert unit.end <= at or unit.start > at
        stop = unit.end
    assert stop <= at


@given(
    st.lists(st.lists(st.integers(0, 300), min_size=1, max_size=20), max_size=40),
    st.sets(st.integers(0, 310)),
)
def test_the_index_contains_exactly_the_added_entries(parts: list[list[int]], asked: set[int]) -> None:
    def refs(part: Sequence[int]) -> list[EntryRef]:
        return [EntryRef(n // 10, n % 10, n) for n in part]

    whole = [Unit(n, n + 1, "s", refs(part)) for n, part in enumerate(parts)]

    def read(start: int, stop: int) -> Iterator[Unit]:
        return iter(whole[start:stop])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jobworker.handlers.audit.index._SPAN_ENTRIES", 8)
        patch.setattr("jobworker.handlers.audit.index._CACHED_SPANS", 2)
        index = StreamIndex("s", read)
        for unit in whole:
            index.add(unit)
        there = {n for part in parts for n in part}
        keys = {entry_key(ref): ref.digest for ref in refs(sorted(asked))}
        assert {keys[key] for key in index.contained(set(keys))} == asked & there
