"""The handler of `audit`: entries are appended to one compressed file a day under the data directory.

JSON lines in zstd frames (`zstdcat`, `jq`, DuckDB and pandas read them) and not Parquet: a Parquet file has
its index at the end and cannot be read, by us after a crash or by an auditor today, until it is closed.
"""

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import zstandard

from jobworker.worker import Job, PermanentError

from ..settings import HandlerSettings
from .day_file import ArchiveLine, DayFile, sync_folder
from .units import Ref, entry_ref

log = logging.getLogger("jobworker.audit")

#: zstd's own default: higher levels gain little on frames of a few dozen lines.
_LEVEL = 3
#: Lines of one frame, in bytes; a longer line is a frame of its own. Bounds the memory of writer and reader.
_FRAME_BYTES = 4 * 1024 * 1024
#: Days whose files stay open: a backlog over midnight, and a few retries from before.
_DAYS_OPEN = 4
_DAY_MS = 86_400_000
#: Redis takes any 64-bit number as an entry's time: beyond this no calendar goes.
_LAST_DAY = (datetime(9999, 12, 31) - datetime(1970, 1, 1)).days


class ArchivedEntry(msgspec.Struct, frozen=True):
    """One line of the archive: the job as it came, and where and when."""

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
    """Appends each entry once to the file of the UTC day at which it was put on its stream.

    A batch is one write and one sync of the disk; only then are its jobs done. An entry that is delivered
    again, to any worker, is found in the file and skipped, and so is a retried job.
    """

    # A worker's death is charged to all that it had started, so no more than is needed: with this many a sync
    # of 0.4 ms, two workers on two busy cores archived 30,000 entries a second through the whole service.
    max_batch = 64
    timeout = 60.0

    def __init__(self) -> None:
        self._compress = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True).compress
        self._days: dict[int, DayFile] = {}
        #: Running totals of this process.
        self.counters = {"audit_entries": 0, "audit_duplicates": 0}

    def setup(self, settings: HandlerSettings) -> None:
        """Make the folder `audit` in the data directory. Raises OSError where that cannot be."""
        self._folder = Path(settings.data_dir).resolve() / "audit"
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        sync_folder(self._folder.parent)

    def healthy(self) -> None:
        """Raise OSError where the folder cannot be written to."""
        if not os.access(self._folder, os.W_OK | os.X_OK):
            raise PermissionError(f"cannot write to {self._folder}")

    def handle_batch(self, jobs: Sequence[Job]) -> list[BaseException | None]:
        """Archive several entries with one sync a day and stream; one outcome a job, in order."""
        outcomes: list[BaseException | None] = [None] * len(jobs)
        for (day, stream), places in self._sorted(jobs, outcomes).items():
            try:
                self._archive(day, stream, [jobs[place] for place in places])
            except Exception as error:
                for place in places:
                    outcomes[place] = error
        return outcomes

    def _sorted(
        self, jobs: Sequence[Job], outcomes: list[BaseException | None]
    ) -> dict[tuple[int, str], list[int]]:
        """The places of the jobs by day and stream; bad ones get their outcome."""
        groups: dict[tuple[int, str], list[int]] = {}
        for place, job in enumerate(jobs):
            if isinstance(job.payload, dict):
                groups.setdefault((_day(job.entry_id), job.stream), []).append(place)
            else:
                kind = type(job.payload).__name__
                outcomes[place] = PermanentError(f"payload must be an object, not {kind}")
        return groups

    def _archive(self, day: int, stream: str, jobs: Sequence[Job]) -> None:
        archived_at = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        lines = [_line(job, archived_at) for job in jobs]
        fresh = self._without_tried(day, stream, jobs, lines)
        added = sum(self._day(day).append(stream, part) for part in _parts(fresh))
        self.counters["audit_entries"] += added
        self.counters["audit_duplicates"] += len(jobs) - added

    def _without_tried(
        self, day: int, stream: str, jobs: Sequence[Job], lines: list[ArchiveLine]
    ) -> list[ArchiveLine]:
        """Leave out jobs of which an earlier try got as far as the file: a retry is a new entry."""
        again = {line.ref.digest for job, line in zip(jobs, lines, strict=True) if job.retry_count}
        if not again:
            return lines
        tried = self._day(day).jobs(stream, again) | self._day(day - 1).jobs(stream, again)
        return [
            line
            for job, line in zip(jobs, lines, strict=True)
            if not (job.retry_count and line.ref.digest in tried)
        ]

    def _day(self, day: int) -> DayFile:
        """The file of a day, counted from 1970-01-01."""
        file = self._days.pop(day, None)
        if file is None:
            file = DayFile(self._folder / f"{_date(day)}.jsonl.zst", self._compress)
        self._days[day] = file  # the last one used stands last
        if len(self._days) > _DAYS_OPEN:
            self._days.pop(next(iter(self._days))).close()
        return file


def _day(entry_id: str) -> int:
    return min(int(entry_id.partition("-")[0]) // _DAY_MS, _LAST_DAY)


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
    return ArchiveLine(_ref(job), msgspec.json.encode(entry) + b"\n")


def _ref(job: Job) -> Ref:
    told = msgspec.json.encode(
        [job.id, job.created_at, job.tenant_id, job.project_id, job.metadata, job.payload]
    )
    digest = hashlib.blake2b(told, digest_size=8).digest()
    return entry_ref(job.entry_id, int.from_bytes(digest, "little"))


def _parts(lines: Sequence[ArchiveLine]) -> Iterator[list[ArchiveLine]]:
    """Cut lines, in order, into frames' worth."""
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
