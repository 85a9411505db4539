"""Jobs `embedding_batch` from chapters and rows. A file always gives the same jobs in the same order."""

import hashlib
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import orjson

from jobworker.worker import NewJob

from .cutter import segments
from .lines import Chapter, Fault, LineRead, RowLine

JOB_TYPE = "embedding_batch"
#: The rules of this file and of the cutter: a change of them makes other jobs of the same book.
RULES = 1
#: The service's default limit of a job, less its header.
MAX_JOB_BYTES = 8 * 1024 * 1024 - 16 * 1024
#: The limit of the job type.
MAX_SEGMENTS = 50_000
#: Rows of one job, and the bytes of their lines.
_ROWS_A_JOB, _ROWS_BYTES = 64, 512 * 1024
_ID = re.compile(r"[A-Za-z0-9_.:-]{1,64}", re.ASCII)
_COLLECTION = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,199}", re.ASCII)
_NUMBERED = re.compile(r"_v[0-9]+\Z", re.ASCII)


class Target(NamedTuple):
    """Where the rows of a book belong, and how its chapters are cut.

    With ``replace``, older rows of each chapter are removed. ``version`` is that of lines without one; None:
    these have none.
    """

    tenant_id: str
    project_id: str
    collection: str = ""
    segment_chars: int = 400
    version: int | None = None
    replace: bool = False
    priority: int = 3

    def checked(self) -> "Target":
        """The target itself. Raises ValueError for a field that a service would refuse."""
        for name in ("tenant_id", "project_id"):
            if not _ID.fullmatch(getattr(self, name)):
                raise ValueError(f"{name} {getattr(self, name)!r:.80} does not match {_ID.pattern}")
        name = self.collection
        if name and (not _COLLECTION.fullmatch(name) or _NUMBERED.search(name)):
            raise ValueError(f"collection {name!r:.80}: letters, digits and _, no _v and digits at the end")
        if name.endswith("entity_profiles"):
            raise ValueError("entities are sent by jobs entity_upsert: import is for chapters and their rows")
        return self


class BookJob(NamedTuple):
    """A job of a book; ``offset``: bytes of the file up to its last line."""

    job: NewJob
    segments: int
    chapters: int
    offset: int


class RejectedLine(NamedTuple):
    """A line that is left out, the reason, and the line itself, as far as it is known."""

    fault: Fault
    raw: bytes


def segment_id(target: Target, chapter_id: str, number: int) -> str:
    """Id of a segment: the same in each import of the chapter, and of no other tenant or project."""
    scope = "/".join((target.tenant_id, target.project_id, chapter_id))
    return f"seg:{hashlib.blake2b(scope.encode(), digest_size=16).hexdigest()}:{number:05d}"


def jobs_of(reads: Iterable[LineRead], target: Target) -> Iterator[BookJob | RejectedLine]:
    """The jobs of a book in the order of its lines: one for each chapter, and one for some rows.

    A chapter that comes twice is left out the second time, because it would overwrite the first.
    """
    seen: dict[bytes, int] = {}
    rows = _Rows(target)
    for piece, raw, offset in reads:
        if isinstance(piece, Fault):
            yield RejectedLine(piece, raw)
        elif isinstance(piece, RowLine):
            if rows.waiting and not rows.fits(piece, len(raw)):
                yield rows.take()
            rows.add(piece, len(raw), offset)
        else:
            if rows.waiting:
                yield rows.take()
            # Eight bytes a chapter: a book of a million chapters needs some 100 MB.
            key = hashlib.blake2b(piece.chapter_id.encode(), digest_size=8).digest()
            first = seen.setdefault(key, piece.line)
            if first != piece.line:
                reason = f"chapter {piece.chapter_id} is in line {first} already"
                yield RejectedLine(Fault(piece.line, reason), raw)
            else:
                yield _chapter_job(piece, target, raw, offset)
    if rows.waiting:
        yield rows.take()


def _chapter_job(chapter: Chapter, target: Target, raw: bytes, offset: int) -> BookJob | RejectedLine:
    text = f"{chapter.title.strip()}\n{chapter.text}"
    texts = list(segments(text, target.segment_chars))
    version = target.version if chapter.version is None else chapter.version
    payload: dict[str, Any] = {
        "ids": [segment_id(target, chapter.chapter_id, number) for number in range(len(texts))],
        "texts": texts,
        "chapter_ids": [chapter.chapter_id] * len(texts),
    }
    if chapter.segment_type:
        payload["segment_types"] = [chapter.segment_type] * len(texts)
    if chapter.story_time:
        payload["story_times"] = [chapter.story_time] * len(texts)
    if version is not None:
        payload |= {"version": version, "replace": target.replace}
    fault = _too_large(payload, len(texts))
    if fault:
        return RejectedLine(Fault(chapter.line, f"chapter {chapter.chapter_id} {fault}"), raw)
    return BookJob(_job(payload, target), len(texts), 1, offset)


def _too_large(payload: dict[str, Any], count: int) -> str:
    size = len(orjson.dumps(payload))
    if size > MAX_JOB_BYTES:
        return f"is a job of {size} bytes, more than {MAX_JOB_BYTES}: divide it"
    return f"has {count} segments, more than {MAX_SEGMENTS}: divide it" if count > MAX_SEGMENTS else ""


class _Rows:
    """Rows that become one job: they follow each other and have one version."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self.waiting: list[RowLine] = []
        self._size = self._offset = 0

    def fits(self, row: RowLine, size: int) -> bool:
        same = self.waiting[0].version == row.version
        return same and len(self.waiting) < _ROWS_A_JOB and self._size + size <= _ROWS_BYTES

    def add(self, row: RowLine, size: int, offset: int) -> None:
        self.waiting.append(row)
        self._size += size
        self._offset = offset

    def take(self) -> BookJob | RejectedLine:
        rows, self.waiting, self._size = self.waiting, [], 0
        # Rows without a version have 0 in the store.
        version = rows[0].version or self._target.version
        payload: dict[str, Any] = {
            "ids": [row.id for row in rows],
            "texts": [row.text for row in rows],
            "chapter_ids": [row.chapter_id for row in rows],
            "segment_types": [row.segment_type for row in rows],
            "story_times": [row.story_time for row in rows],
        }
        if version is not None:
            payload["version"] = version
        # More than one row is less than the limit, so this is about the first one.
        if fault := _too_large(payload, len(rows)):
            return RejectedLine(Fault(rows[0].line, f"row {rows[0].id} {fault}"), b"")
        return BookJob(_job(payload, self._target), len(rows), 0, self._offset)


def _job(payload: dict[str, Any], target: Target) -> NewJob:
    if target.collection:
        payload["collection"] = target.collection
    metadata = {"priority": str(target.priority)}
    return NewJob(JOB_TYPE, payload, target.tenant_id, target.project_id, metadata=metadata)


def digest_head(target: Target, *, plain_text: bool) -> bytes:
    """What decides, beside the file, which jobs a book gives."""
    return orjson.dumps([RULES, *target._replace(priority=0), plain_text])
