"""Division of a chapter into segments of whole paragraphs and sentences."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from ..encoder.segmenter import cut

_PARAGRAPH_END = re.compile(r"[\r\n\u0085\u2028\u2029]+")


class _CharacterOffsets(Sequence[tuple[int, int]]):
    """Offsets for `cut` in which each character is a token; takes no memory for each."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self._count:
            raise IndexError(index)
        return index, index + 1


def segments(text: str, limit_chars: int) -> Iterator[str]:
    """The segments of a text, each of 1 to `limit_chars` characters, in order and without outer blanks.

    A segment begins at a paragraph and holds as many whole ones as fit, so that an edit leaves the segments
    before it unchanged. A longer paragraph is cut after sentences, else after clauses or words.
    """
    waiting, size = list[str](), 0
    for piece in _pieces(text, limit_chars):
        if waiting and size + 1 + len(piece) > limit_chars:
            yield "\n".join(waiting)
            waiting, size = [], 0
        size += len(piece) + (1 if waiting else 0)
        waiting.append(piece)
    if waiting:
        yield "\n".join(waiting)


def _pieces(text: str, limit_chars: int) -> Iterator[str]:
    """Paragraphs, and the parts of those that are longer than a segment."""
    for paragraph in _PARAGRAPH_END.split(text):
        whole = paragraph.strip()
        for start, stop in cut(whole, _CharacterOffsets(len(whole)), limit_chars):
            if piece := whole[start:stop].strip():
                yield piece
