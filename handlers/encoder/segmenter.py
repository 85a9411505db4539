"""Segmentation of a long text into windows: token ranges that end at sentence ends if possible."""

import re
from bisect import bisect_left
from collections.abc import Sequence

from ..graphemes import Graphemes

Offsets = Sequence[tuple[int, int]]

_CLOSERS = r"""[”’」』）》〉】〕"')\]}»]*"""
# An ASCII full stop ends a sentence only before a space or the end: 3.14 and example.org are one word.
# A run of full stops is matched once, from its first one; otherwise a long run takes quadratic time.
SENTENCE_END = re.compile(
    rf"(?:[。！？…｡．!?]+|(?<!\.)\.++(?={_CLOSERS}(?:\s|$))){_CLOSERS}|[\r\n\u0085\u2028\u2029]+"
)
# Second choice: after a clause or between words.
CLAUSE_END = re.compile(r"[，、；：,;:]+|\s+")


def cut(text: str, offsets: Offsets, limit: int) -> list[tuple[int, int]]:
    """Cut `text` into windows of at most `limit` tokens.

    `offsets` has one (start, end) pair a token, in characters of `text`, as tokenizers report them.
    Returns token ranges (start, stop) that cover all tokens in order, without gap or overlap. A window ends
    after the last sentence or paragraph that fits, else after the last clause or word, else before the first
    grapheme that does not fit. A grapheme longer than the window is cut between its characters, a character
    of more than `limit` tokens between its tokens. Raises ValueError if `limit` is below 1.
    """
    if limit < 1:
        raise ValueError(f"limit {limit} must be at least 1 token")
    if len(offsets) <= limit:
        return [(0, len(offsets))]
    cutter = _Cutter(text, offsets)
    windows = []
    start = 0
    while len(offsets) - start > limit:
        stop = cutter.stop(start, start + limit)
        windows.append((start, stop))
        start = stop
    return [*windows, (start, len(offsets))]


class _Cutter:
    """Finds the best cut in one text."""

    def __init__(self, text: str, offsets: Offsets) -> None:
        self._offsets = offsets
        self._graphemes = Graphemes(text)
        self._sentences = [match.end() for match in SENTENCE_END.finditer(text)]
        self._clauses = [match.end() for match in CLAUSE_END.finditer(text)]

    def stop(self, start: int, furthest: int) -> int:
        """The first token after the window that begins at `start`: start < stop <= furthest."""
        candidates = range(furthest, start, -1)
        at_characters = [token for token in candidates if self._between_characters(token)]
        for ends in (self._sentences, self._clauses):
            for token in at_characters:
                if self._gap_has_end(token, ends) and self._between_graphemes(token):
                    return token
        for token in at_characters:
            if self._between_graphemes(token):
                return token
        return at_characters[0] if at_characters else furthest

    def _between_characters(self, token: int) -> bool:
        # Byte-level tokenizers split a character into several tokens with overlapping offsets.
        return self._offsets[token - 1][1] <= self._offsets[token][0]

    def _between_graphemes(self, token: int) -> bool:
        return self._graphemes.is_boundary(self._offsets[token][0])

    def _gap_has_end(self, token: int, ends: list[int]) -> bool:
        # Tokenizers drop newlines and spaces, so the end may be anywhere between the two tokens.
        after, before = self._offsets[token - 1][1], self._offsets[token][0]
        first = bisect_left(ends, after)
        return first < len(ends) and ends[first] <= before
