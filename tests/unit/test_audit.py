"""Audit archive: every entry once, durable, readable by common tools, also after kills and disk errors."""

import errno
import json
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
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
from jobworker.handlers.audit.parts import Damage, Torn, read_parts
from jobworker.handlers.audit.units import EntryRef, Unit, pack_unit
from jobworker.handlers.settings import HandlerSettings
from jobworker.worker import Job, PermanentError, Settings, Unavailable
from jobworker.worker.testing import Harness
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


def day_path(folder: Path) -> Path:
    return folder / "audit" / "2026-01-02.jsonl.zst"


#: The archives of the running test.
MADE: list[Archive] = []


@pytest.fixture(autouse=True)
def closed_files() -> Iterator[None]:
    """Close the files of the days: an archive keeps them open until its process ends."""
    yield
    while MADE:
        for day in MADE.pop()._days.values():
            day.close()


def archive(folder: Path) -> Archive:
    made = Archive()
    made.setup(HandlerSettings(data_dir=str(folder)))
    MADE.append(made)
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


@pytest.mark.parametrize(
    "number",
    ["1234567890123456789.5", "0.1000000000000000000000001", "1.10", "1E5", "1e-400", "-0.0", "-1.5e+300",
     "9007199254740993", "-170141183460469231731687303715884105729", "1" + "0" * 400, "0." + "3" * 5000],
)  # fmt: skip
def test_a_number_keeps_every_digit_from_the_stream_to_the_archive(tmp_path: Path, number: str) -> None:
    with Harness({"audit": Archive}, Settings(data_dir=str(tmp_path))) as world:
        payload = f'{{"n": {number}, "list": [{{"deep": {number}}}]}}'
        world.send(f'{{"id": "a", "type": "audit", "payload": {payload}}}'.encode())
        world.run()
        assert len(world.completed) == 1
    (path,) = (tmp_path / "audit").iterdir()
    text = zstandard.ZstdDecompressor().stream_reader(path.read_bytes(), read_across_frames=True).read()
    line = json.loads(text, parse_float=Decimal)
    exact = json.loads(payload, parse_float=Decimal)
    assert (line["payload"], str(line["payload"]["n"])) == (exact, str(exact["n"]))


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


def on_day(days: int, number: int, retry_count: int = 0, **more: Any) -> Job:
    return job(number, entry_id=f"{DAY_MS + days * 86_400_000}-{number}", retry_count=retry_count, **more)


@pytest.mark.parametrize(
    "created_at", ["2026-01-02T00:00:00Z", "", "0001-01-01T00:00:00Z", "2036-01-01", "?"]
)
@pytest.mark.parametrize("days", [2, 5, 31])
def test_a_retry_of_an_earlier_day_is_skipped(tmp_path: Path, days: int, created_at: str) -> None:
    """The service may be stopped for days between two tries."""
    archive(tmp_path).handle_batch([on_day(0, 1, created_at=created_at), on_day(1, 2, created_at=created_at)])
    later = [on_day(days, n, 1, created_at=created_at) for n in (1, 2, 3)]
    assert archive(tmp_path).handle_batch(later) == [None] * 3
    last = max((tmp_path / "audit").iterdir())
    assert numbers(tmp_path, last.name.partition(".")[0]) == [3]


def test_the_search_for_an_earlier_try_changes_no_file(tmp_path: Path) -> None:
    one = archive(tmp_path)
    one.handle_batch([on_day(0, 1)])
    torn, recompressed = day_path(tmp_path), day_path(tmp_path).with_name("2026-01-03.jsonl.zst")
    torn.write_bytes(torn.read_bytes() + torn.read_bytes()[:40])
    recompressed.write_bytes(zstandard.compress(b'{"old": 1}\n'))
    before = torn.read_bytes(), recompressed.read_bytes()
    assert archive(tmp_path).handle_batch([on_day(2, 1, 1), on_day(2, 9, 1)]) == [None, None]
    assert numbers(tmp_path, "2026-01-04") == [9]
    assert (torn.read_bytes(), recompressed.read_bytes()) == before
    assert len(list(torn.parent.iterdir())) == 3


def test_a_retry_whose_first_try_is_in_a_renamed_file_is_skipped(tmp_path: Path) -> None:
    archive(tmp_path).handle_batch([on_day(0, 1)])
    day_path(tmp_path).rename(day_path(tmp_path).with_name("2026-01-02.123.jsonl.zst"))
    assert (
        archive(tmp_path).handle_batch([on_day(0, 7, 1, id="a-1", payload={"n": 1}), on_day(0, 8)])
        == [None] * 2
    )
    assert numbers(tmp_path) == [8]


def test_an_equal_job_that_is_no_retry_is_archived_beside_its_retry(tmp_path: Path) -> None:
    archive(tmp_path).handle_batch([on_day(0, 1)])
    same = {"id": "a-1", "payload": {"n": 1}}
    archive(tmp_path).handle_batch([on_day(0, 2, 1, **same), on_day(0, 3, 0, **same)])
    assert numbers(tmp_path) == [1, 1]


@pytest.mark.parametrize("left", ["half", "header", "magic"])
def test_a_torn_end_is_cut_off_and_saved(tmp_path: Path, left: str) -> None:
    archive(tmp_path).handle_batch([job(1)])
    path = tmp_path / "audit" / "2026-01-02.jsonl.zst"
    whole = path.read_bytes()
    tail = {"half": whole[:-3], "header": whole[:30], "magic": whole[:3]}[left]
    path.write_bytes(whole + tail)
    assert archive(tmp_path).handle_batch([job(1), job(2)]) == [None, None]
    assert numbers(tmp_path) == [1, 2]
    (aside,) = path.parent.glob("*.torn-*")
    assert aside.read_bytes() == tail


@pytest.mark.parametrize("tail", [bytes(5000), b"\xff" * 77], ids=["zeros", "rubbish"])
def test_an_end_that_no_killed_writer_leaves_stays_in_its_place(tmp_path: Path, tail: bytes) -> None:
    archive(tmp_path).handle_batch([job(1)])
    path = day_path(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    assert archive(tmp_path).handle_batch([job(1), job(2)]) == [None, None]
    assert archive(tmp_path).handle_batch([job(3)]) == [None]
    assert numbers(tmp_path) == [1, 2, 3]
    (aside,) = path.parent.glob("*.damaged-*")
    assert aside.read_bytes() == tail
    assert path.read_bytes()[len(whole) + 8 : len(whole) + len(tail)] == tail[8:]


def archived_in_units(tmp_path: Path, units: int, each: int = 4) -> list[int]:
    """Archive `units` batches; returns the offset of each unit."""
    offsets, one = [], archive(tmp_path)
    for n in range(units):
        offsets.append(day_path(tmp_path).stat().st_size if n else 0)
        one.handle_batch([job(m) for m in range(n * each, (n + 1) * each)])
    return offsets


#: Fields of a unit of `archived_in_units` by their offset: its frame, name and four references come last.
FIELDS = {"magic": 0, "header size": 5, "checksum": 9, "frame size": 12, "name size": 16, "reference": 40}


@pytest.mark.parametrize("field", [*FIELDS, "lines"])
@pytest.mark.parametrize("broken", [0, 3, 9])
@pytest.mark.parametrize("flip", [8, 24])  # 24 bytes are one reference
@pytest.mark.parametrize("checked_bytes", [day_file.CHECKED_BYTES, 0])
def test_a_flipped_bit_hides_only_its_own_unit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, broken: int, flip: int, checked_bytes: int
) -> None:
    offsets = archived_in_units(tmp_path, 10)
    path = day_path(tmp_path)
    data = bytearray(path.read_bytes())
    end = [*offsets, len(data)][broken + 1]
    at = offsets[broken] + FIELDS[field] if field != "lines" else end - 40
    data[at] ^= flip
    path.write_bytes(data)
    monkeypatch.setattr(day_file, "CHECKED_BYTES", checked_bytes)
    assert archive(tmp_path).handle_batch([job(n) for n in (*range(4, 12), 50)]) == [None] * 9
    assert not list(path.parent.glob("*.torn-*"))
    now = path.read_bytes()
    assert now[: offsets[broken]] == data[: offsets[broken]]
    assert now[offsets[broken] + 8 : len(data)] == data[offsets[broken] + 8 :], "nothing moves"
    if field == "lines" and not checked_bytes:
        return  # the writer does not verify old units; zstd tools report the damage to who reads them
    others = [n for n in range(40) if n // 4 != broken]
    assert set(others) | {50} <= set(numbers(tmp_path))
    assert len([n for n in numbers(tmp_path) if n in others]) == len(others), "and nothing is archived twice"
    if field not in ("reference", "checksum") or checked_bytes:  # else nothing shows the damage
        (aside,) = path.parent.glob("*.damaged-*")
        assert aside.read_bytes() == data[offsets[broken] : end]


def test_damage_is_reported_with_its_place(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    offsets = archived_in_units(tmp_path, 3)
    data = bytearray(day_path(tmp_path).read_bytes())
    data[offsets[1] + 9] ^= 1
    day_path(tmp_path).write_bytes(data)
    archive(tmp_path).handle_batch([job(50)])
    (record,) = (one for one in caplog.records if one.message == "audit.damaged")
    assert record.levelname == "ERROR"
    assert (vars(record)["offset"], vars(record)["bytes"]) == (offsets[1], offsets[2] - offsets[1])


def test_two_damaged_units_at_the_end_are_not_taken_for_a_torn_one(tmp_path: Path) -> None:
    offsets = archived_in_units(tmp_path, 3)
    data = bytearray(day_path(tmp_path).read_bytes())
    data[offsets[1] + 14] ^= 0x10  # its frame seems to reach beyond the end of the file
    data[-5] ^= 1
    day_path(tmp_path).write_bytes(data)
    archive(tmp_path).handle_batch([job(50)])
    assert not list(day_path(tmp_path).parent.glob("*.torn-*"))
    assert numbers(tmp_path) == [0, 1, 2, 3, 50]


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


RECOMPRESSED: dict[str, Callable[[bytes], bytes]] = {
    "one frame": zstandard.ZstdCompressor(level=19).compress,
    "with a checksum": zstandard.ZstdCompressor(level=1, write_checksum=True).compress,
    "larger": zstandard.ZstdCompressor(level=-50).compress,
    "without a size": lambda data: (
        (one := zstandard.ZstdCompressor().compressobj()).compress(data) + one.flush()
    ),
    "several frames": lambda data: b"".join(zstandard.compress(line) for line in data.splitlines(True)),
    "pzstd": lambda data: struct.pack("<IIIx", 0x184D2A50, 5, 4) + zstandard.compress(data),
}


@pytest.mark.parametrize("compress", RECOMPRESSED.values(), ids=RECOMPRESSED)
@pytest.mark.parametrize("count", [2, 3000])
@pytest.mark.parametrize("is_open", [True, False])
def test_a_recompressed_day_stays_in_its_place(
    tmp_path: Path, compress: Callable[[bytes], bytes], count: int, is_open: bool
) -> None:
    """Put back by `cp`, which keeps the file and replaces its bytes."""
    one = archive(tmp_path)
    one.handle_batch([job(n, payload={"n": n, "text": hex(n**9)}) for n in range(count)])
    path = day_path(tmp_path)
    text = zstandard.ZstdDecompressor().stream_reader(path.read_bytes(), read_across_frames=True).read()
    path.write_bytes(compress(text))
    before = path.read_bytes()
    for n in range(count, count + 3):
        writer = one if is_open else archive(tmp_path)
        assert writer.handle_batch([job(n)]) == [None]
    assert numbers(tmp_path) == list(range(count + 3))
    assert path.read_bytes().startswith(before)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("length", [0, 3, 40, -1])
@pytest.mark.parametrize("is_foreign", [True, False])
def test_a_file_that_another_program_is_writing_is_renamed_as_it_is(
    tmp_path: Path, length: int, is_foreign: bool
) -> None:
    """`cp` empties the file, then fills it, without the lock: nothing may be added or cut meanwhile."""
    one = archive(tmp_path)
    for n in range(3):
        one.handle_batch([job(n, payload={"n": n, "text": hex(7**300)})])
    path = day_path(tmp_path)
    data = path.read_bytes()
    if is_foreign:
        data = zstandard.compress(
            zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True).read()
        )
    with path.open("wb") as cp:
        cp.write(data[:length])
        cp.flush()
        assert one.handle_batch([job(7)]) == [None]
        cp.write(data[length:] if length else data)
    assert numbers(tmp_path) == [7]
    (aside,) = (file for file in path.parent.iterdir() if file != path)
    assert aside.read_bytes() == data
    assert aside.match("2026-01-02.*.jsonl.zst")


def test_a_file_of_another_format_is_renamed_as_it_is(tmp_path: Path) -> None:
    archive(tmp_path).handle_batch([job(1)])
    path = day_path(tmp_path)
    path.write_bytes(b'{"plain": "text"}\n' * 9)
    assert archive(tmp_path).handle_batch([job(3)]) == [None]
    assert numbers(tmp_path) == [3]
    (aside,) = (file for file in path.parent.glob("2026-01-02*.jsonl.zst") if file != path)
    assert aside.read_bytes() == b'{"plain": "text"}\n' * 9


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
    assert len(list(read_parts(lambda at, size: data[at : at + size], 0, len(data)))) > 5


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
    read = list(read_parts(lambda at, size: file[at : min(at + size, length)], 0, length))
    assert all(isinstance(part, Torn) for part in read if not isinstance(part, Unit))
    ends = [sum(map(len, packed[: n + 1])) for n in range(len(packed))]
    assert [(unit.stream, unit.refs, unit.end) for unit in read if isinstance(unit, Unit)] == [
        (stream, refs, end) for (stream, refs, _), end in zip(parts, ends, strict=True) if end <= length
    ]


@given(UNITS.filter(bool), st.data())
def test_a_changed_byte_hides_only_its_own_unit(
    parts: list[tuple[str, list[EntryRef], bytes]], data: st.DataObject
) -> None:
    packed = [pack_unit(*part) for part in parts]
    file = bytearray(b"".join(packed))
    at = data.draw(st.integers(0, len(file) - 1))
    file[at] ^= data.draw(st.integers(1, 255))
    ends = [sum(map(len, packed[: n + 1])) for n in range(len(packed))]
    whole = [end for end in ends if at >= end or at < end - len(packed[ends.index(end)])]
    (damaged,) = set(ends) - set(whole)
    read = list(read_parts(lambda start, size: bytes(file[start : start + size]), 0, len(file)))
    assert [unit.end for unit in read if isinstance(unit, Unit)] == whole
    (damage,) = (part for part in read if not isinstance(part, Unit))
    assert isinstance(damage, Damage)
    assert damage.end == damaged


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


def test_a_missing_folder_is_named_as_missing(tmp_path: Path) -> None:
    one = archive(tmp_path)
    one.healthy()
    (tmp_path / "audit").rmdir()
    with pytest.raises(FileNotFoundError, match="is missing"):
        one.healthy()


def test_a_symbolic_link_in_the_place_of_the_day_is_not_followed(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("not an archive")
    path = tmp_path / "day.jsonl.zst"
    path.symlink_to(other)
    day = DayFile(path, zstandard.ZstdCompressor().compress)
    with pytest.raises(Unavailable, match="symbolic link"):
        day.append("s", [])
    assert other.read_text() == "not an archive"
