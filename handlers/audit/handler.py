"""Handler of `audit`: appends entries to one compressed file a day in the data directory.

The format is JSON lines in zstd frames, which `zstdcat`, `jq`, DuckDB and pandas read. Parquet is no choice:
its index is at the end, so a file is unreadable until it is closed, for auditors and after a crash.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import msgspec
import zstandard

from jobworker.worker import Job, PermanentError

from ..settings import HandlerSettings
from .day_file import ArchiveLine, DayFile, find_archived, sync_folder
from .units import EntryRef, parse_ref

#: Default of zstd: higher levels gain little on frames of a few dozen lines.
_LEVEL = 3
#: Bytes of the lines in one frame, which bounds the memory of writer and reader. A longer line is a frame of
#: its own.
_FRAME_BYTES = 4 * 1024 * 1024
#: Open files: of a backlog around midnight, and of retries of earlier days.
_MAX_OPEN_DAYS = 4
#: Days before a retry in which its earlier tries are looked for.
_MAX_RETRY_DAYS = 31
#: How far the clocks of producers and of Redis may differ.
_CLOCK_DAYS = 1
_DAY_MS = 86_400_000
#: orjson writes neither `decimal.Decimal` nor integers beyond 64 bits.
_encode = msgspec.json.Encoder(decimal_format="number").encode
#: Redis accepts any 64-bit number as an entry's time; `datetime` ends here.
_LAST_DAY = (datetime(9999, 12, 31) - datetime(1970, 1, 1)).days


class ArchivedEntry(msgspec.Struct, frozen=True):
    """One line of the archive: the job as received, its stream, entry and time."""

    entry_id: str
    stream: str
    archived_at: str
    id: str
    type: str
    tenant_id: str
    project_id: str
    created_at: str
    metadata: dict[str, str]
    payload: dict[str, Any]


class Archive:
    """Appends each entry once to the file of the UTC day on which it was added to its stream.

    A batch is one write and one sync, and its jobs are done only after the sync. An entry that is delivered
    again, or a job that is retried, is found in the file and skipped, on any worker.
    """

    # A worker's death counts for every job of its batch, so a batch is no larger than needed. With 64 entries
    # and 0.4 ms a sync, two workers on two busy cores archived 30,000 entries/s through the whole service.
    max_batch = 64
    timeout = 60.0
    # A float has 17 digits: 1234567890123456789.5 would become 1.2345678901234568e18.
    exact_numbers = True

    def __init__(self) -> None:
        self._compress = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True).compress
        self._days: dict[int, DayFile] = {}
        #: Running totals of this process.
        self.counters = {"audit_entries": 0, "audit_duplicates": 0}

    def setup(self, settings: HandlerSettings) -> None:
        """Create the folder `audit` in the data directory. Raises OSError if that fails."""
        self._folder = Path(settings.data_dir).resolve() / "audit"
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        sync_folder(self._folder.parent)

    def healthy(self) -> None:
        """Raise OSError if the folder is missing or not writable."""
        if not self._folder.is_dir():
            raise FileNotFoundError(
                f"the folder {self._folder} is missing: mount or restore it, or create it"
            )
        if not os.access(self._folder, os.W_OK | os.X_OK):
            raise PermissionError(f"cannot write to {self._folder}")

    def handle_batch(self, jobs: Sequence[Job]) -> list[BaseException | None]:
        """Archive entries with one sync for each day and stream; returns one outcome a job, in order."""
        outcomes: list[BaseException | None] = [None] * len(jobs)
        for (day, stream), indexes in _group_jobs(jobs, outcomes).items():
            try:
                self._archive(day, stream, [jobs[index] for index in indexes])
            except Exception as error:
                for index in indexes:
                    outcomes[index] = error
        return outcomes

    def _archive(self, day: int, stream: str, jobs: Sequence[Job]) -> None:
        archived_at = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        lines = [_line(job, archived_at) for job in jobs]
        fresh = self._without_archived_retries(day, stream, jobs, lines)
        added = sum(self._day_file(day).append(stream, part) for part in _split_into_frames(fresh))
        self.counters["audit_entries"] += added
        self.counters["audit_duplicates"] += len(jobs) - added

    def _without_archived_retries(
        self, day: int, stream: str, jobs: Sequence[Job], lines: list[ArchiveLine]
    ) -> list[ArchiveLine]:
        """Lines without those of retries whose earlier try was archived: a retry is a new entry."""
        first_days = {
            line.ref.digest: _first_day(job, day)
            for job, line in zip(jobs, lines, strict=True)
            if job.retry_count
        }
        archived = self._find_archived(day, stream, first_days)
        return [
            line
            for job, line in zip(jobs, lines, strict=True)
            if not (job.retry_count and line.ref.digest in archived)
        ]

    def _find_archived(self, day: int, stream: str, first_days: dict[int, int]) -> set[int]:
        """Those of the digests that are in a file of their first day, or of a later one up to `day`."""
        missing = set(first_days)
        while missing and day >= min(first_days[digest] for digest in missing):
            name = _date(day)
            for path in [self._folder / f"{name}.jsonl.zst", *self._folder.glob(f"{name}.*.jsonl.zst")]:
                missing -= find_archived(path, stream, missing)
            day -= 1
        return set(first_days) - missing

    def _day_file(self, day: int) -> DayFile:
        """The file of a day, as a number of days since 1970-01-01."""
        file = self._days.pop(day, None)
        if file is None:
            file = DayFile(self._folder / f"{_date(day)}.jsonl.zst", self._compress)
        self._days[day] = file  # ordered by last use
        if len(self._days) > _MAX_OPEN_DAYS:
            self._days.pop(next(iter(self._days))).close()
        return file


def _group_jobs(
    jobs: Sequence[Job], outcomes: list[BaseException | None]
) -> dict[tuple[int, str], list[int]]:
    """Indexes of the jobs by day and stream; a job with a bad payload gets its outcome instead."""
    groups: dict[tuple[int, str], list[int]] = {}
    for index, job in enumerate(jobs):
        if isinstance(job.payload, dict):
            groups.setdefault((_day(job.entry_id), job.stream), []).append(index)
        else:
            type_name = type(job.payload).__name__
            outcomes[index] = PermanentError(f"payload must be an object, not {type_name}")
    return groups


def _day(entry_id: str) -> int:
    return min(int(entry_id.partition("-")[0]) // _DAY_MS, _LAST_DAY)


def _first_day(job: Job, day: int) -> int:
    """First day on which an earlier try of the job may have been archived."""
    earliest = day - _MAX_RETRY_DAYS
    try:
        created = (date.fromisoformat(job.created_at[:10]) - date(1970, 1, 1)).days
    except ValueError:
        return earliest
    return max(min(created, day) - _CLOCK_DAYS, earliest) if created <= day + _CLOCK_DAYS else earliest


def _date(day: int) -> str:
    return datetime.fromtimestamp(max(day, 0) * _DAY_MS // 1000, UTC).strftime("%Y-%m-%d")


def _line(job: Job, archived_at: str) -> ArchiveLine:
    entry = ArchivedEntry(
        job.entry_id,
        job.stream,
        archived_at,
        job.id,
        job.type,
        job.tenant_id,
        job.project_id,
        job.created_at,
        job.metadata,
        job.payload,
    )
    return ArchiveLine(_ref(job), _encode(entry) + b"\n")


def _ref(job: Job) -> EntryRef:
    content = _encode([job.id, job.created_at, job.tenant_id, job.project_id, job.metadata, job.payload])
    digest = hashlib.blake2b(content, digest_size=8).digest()
    return parse_ref(job.entry_id, int.from_bytes(digest, "little"))


def _split_into_frames(lines: Sequence[ArchiveLine]) -> Iterator[list[ArchiveLine]]:
    """Split lines, in order, into parts of one frame each."""
    part: list[ArchiveLine] = []
    size = 0
    for line in lines:
        if part and size + len(line.json) > _FRAME_BYTES:
            yield part
            part, size = [], 0
        part.append(line)
        size += len(line.json)
    if part:
        yield part
