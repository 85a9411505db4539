"""Reading of books: JSON lines or plain text become chapters and rows, one after another.

Only one line or chapter is in memory at a time. A wrong line becomes a `Fault`, and reading continues.
"""

import re
from collections.abc import Iterator
from typing import Annotated, BinaryIO, NamedTuple

import msgspec

from jobworker.worker.safe_text import is_unicode

#: Longest line and longest chapter of a plain text: twice the largest job, as JSON may escape characters.
MAX_LINE_BYTES = 16 * 1024 * 1024
#: Bytes of the field in Milvus.
_SEGMENT_TYPE_BYTES = 32
_BOM = b"\xef\xbb\xbf"
_WORD = (
    "one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|(?:thir|four|fif|six|seven|eigh|nine)teen"
    "|(?:twen|thir|for|fif|six|seven|eigh|nine)ty(?:-[a-z]{3,5})?"
)
#: A whole line of a novel that begins a chapter.
HEADING = re.compile(
    r"\s*(?:第\s{0,3}[0-9０-９〇零一二两三四五六七八九十百千万]{1,12}\s{0,3}[章回节卷][^\r\n]{0,60}"
    rf"|chapter\s{{1,3}}(?:[0-9]{{1,5}}|[ivxlcdm]{{1,12}}|{_WORD})(?:[\s.:—–-][^\r\n]{{0,60}})?)\s*",
    re.IGNORECASE,
)
#: A longer line is no heading.
_HEADING_CHARS = 120

#: Empty counts as absent: Go writes it for an empty string.
_Id = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_.:-]{0,64}\Z")]
_Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]


class Chapter(NamedTuple):
    """A chapter of a book. ``version`` None: the file gives none."""

    line: int
    chapter_id: str
    title: str
    text: str
    segment_type: str
    story_time: int
    version: int | None


class RowLine(NamedTuple):
    """A row with an id of its own, which is not cut."""

    line: int
    id: str
    text: str
    chapter_id: str
    segment_type: str
    story_time: int
    version: int | None


class Fault(NamedTuple):
    """A line that cannot be imported, and the reason."""

    line: int
    reason: str


Piece = Chapter | RowLine | Fault


class LineRead(NamedTuple):
    """What was read, the line itself (empty if it is too long), and the bytes of the file up to its end."""

    piece: Piece
    raw: bytes
    offset: int


class _BookLine(msgspec.Struct):
    """The fields of a line; others are ignored."""

    id: _Id | None = None
    chapter_id: _Id | None = None
    title: str | None = None
    text: str | None = None
    segment_type: str | None = None
    story_time: _Int64 | None = None
    version: _Int64 | None = None


class _RawLine(NamedTuple):
    number: int
    data: bytes
    too_long: bool
    offset: int


def read_json_lines(file: BinaryIO) -> Iterator[LineRead]:
    """Chapters and rows of a file with one JSON object a line. Empty lines are passed over."""
    decoder = msgspec.json.Decoder(_BookLine)
    for line in _lines(file):
        if line.too_long:
            yield LineRead(Fault(line.number, f"longer than {MAX_LINE_BYTES} bytes"), b"", line.offset)
        elif line.data.strip():
            yield LineRead(_parse(line, decoder), line.data, line.offset)


def _parse(line: _RawLine, decoder: "msgspec.json.Decoder[_BookLine]") -> Piece:
    try:
        found = decoder.decode(line.data)
        return _piece(line.number, found)
    except UnicodeDecodeError as error:
        return Fault(line.number, _not_utf_8(error))
    except (ValueError, RecursionError) as error:  # msgspec's are ValueErrors
        reason = str(error) or "nested too deeply"
        hint = ": give one JSON object a line" if reason.startswith("Expected `object`") else ""
        return Fault(line.number, reason + hint)


def _not_utf_8(error: UnicodeDecodeError) -> str:
    return f"no UTF-8 ({error.reason} at byte {error.start}); convert the file with iconv"


def _piece(number: int, found: _BookLine) -> Piece:
    """Raises ValueError with the field at fault."""
    if found.text is None:
        raise ValueError("it has no text")
    if not found.text.strip():
        raise ValueError("its text is empty")
    kind, time = found.segment_type or "", found.story_time or 0
    for name, value in (("text", found.text), ("title", found.title), ("segment_type", kind)):
        if value and not is_unicode(value):
            raise ValueError(f"{name} has half a surrogate pair")
    if len(kind.encode()) > _SEGMENT_TYPE_BYTES:
        raise ValueError(f"segment_type has more than {_SEGMENT_TYPE_BYTES} bytes")
    if found.id:
        return RowLine(number, found.id, found.text, found.chapter_id or "", kind, time, found.version)
    if not found.chapter_id:
        raise ValueError("it has neither chapter_id nor id")
    return Chapter(number, found.chapter_id, found.title or "", found.text, kind, time, found.version)


def read_text(file: BinaryIO) -> Iterator[LineRead]:
    """Chapters of a plain text in UTF-8, which begin at lines such as "第三章 …" or "Chapter 3".

    They get the ids c1, c2, … in their order, and the text before the first heading gets c0. A heading
    without text, as in a table of contents, begins no chapter.
    """
    chapter = _OpenChapter(1, 0, "")
    offset = 0
    for line in _lines(file):
        try:
            text = line.data.decode()
        except UnicodeDecodeError as error:
            yield LineRead(Fault(line.number, _not_utf_8(error)), line.data, line.offset)
            continue
        if "\0" in text:
            reason = "it has a NUL, as text in UTF-16; convert the file with iconv"
            yield LineRead(Fault(line.number, reason), line.data, line.offset)
            continue
        if len(text) <= _HEADING_CHARS and HEADING.fullmatch(text):
            if chapter.filled:
                yield LineRead(chapter.piece(), b"", offset)
            number = chapter.number + (1 if chapter.filled or not chapter.number else 0)
            chapter = _OpenChapter(line.number, number, text.strip())
        else:
            chapter.add(text, too_long=line.too_long)
        offset = line.offset
    if chapter.filled:
        yield LineRead(chapter.piece(), b"", offset)


class _OpenChapter:
    def __init__(self, line: int, number: int, title: str) -> None:
        self.number = number
        self._line, self._title = line, title
        self._parts: list[str] = []
        self._chars = 0
        self.filled = False
        self._too_long = False

    def add(self, text: str, *, too_long: bool) -> None:
        self._chars += len(text)
        self._too_long |= too_long or self._chars > MAX_LINE_BYTES
        self.filled |= self._too_long or bool(text.strip())
        if self._too_long:
            self._parts.clear()
        else:
            self._parts.append(text)

    def piece(self) -> Piece:
        if self._too_long:
            return Fault(self._line, f"the chapter is longer than {MAX_LINE_BYTES} characters")
        return Chapter(self._line, f"c{self.number}", self._title, "".join(self._parts), "", 0, None)


def _lines(file: BinaryIO) -> Iterator[_RawLine]:
    """The lines of a file; of one that is too long only its number, with data empty."""
    number, offset = 0, 0
    while data := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        offset += len(data)
        too_long = len(data) > MAX_LINE_BYTES
        while too_long and not data.endswith(b"\n") and (data := file.readline(MAX_LINE_BYTES)):
            offset += len(data)
        if number == 1:
            data = data.removeprefix(_BOM)
        yield _RawLine(number, b"" if too_long else data, too_long, offset)
