"""Segmentation of a long text into windows: token ranges that end at sentence ends if possible."""

import re
import unicodedata
from bisect import bisect_left
from collections.abc import Sequence

Offsets = Sequence[tuple[int, int]]

_CLOSERS = r"""[”’」』）》〉】〕"')\]}»]*"""
# An ASCII full stop ends a sentence only before a space or the end: 3.14 and example.org are one word.
# A run of full stops is matched once, from its first one; otherwise a long run takes quadratic time.
SENTENCE_END = re.compile(
    rf"(?:[。！？…｡．!?]+|(?<!\.)\.++(?={_CLOSERS}(?:\s|$))){_CLOSERS}|[\r\n\u0085\u2028\u2029]+"
)
# Second choice: after a clause or between words.
CLAUSE_END = re.compile(r"[，、；：,;:]+|\s+")

_JOINER = "\u200d"
_VIRAMA_CLASS = 9
# Characters that belong to the letter or digit after them (Unicode property Prepend).
_PREPENDED = frozenset(
    "\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2\u0d4e\U000110bd\U000110cd"
)
_PREPENDED_RANGES = ((0x111C2, 0x111C3), (0x113D1, 0x113D1), (0x1193F, 0x11941), (0x11A3A, 0x11A3A),
                     (0x11A84, 0x11A89), (0x11D46, 0x11D46), (0x11F02, 0x11F02))  # fmt: skip
_EXTENDING = frozenset(("Mn", "Me", "Mc"))


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
        self._text = text
        self._offsets = offsets
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
        return is_grapheme_boundary(self._text, self._offsets[token][0])

    def _gap_has_end(self, token: int, ends: list[int]) -> bool:
        # Tokenizers drop newlines and spaces, so the end may be anywhere between the two tokens.
        after, before = self._offsets[token - 1][1], self._offsets[token][0]
        first = bisect_left(ends, after)
        return first < len(ends) and ends[first] <= before


def is_grapheme_boundary(text: str, position: int) -> bool:
    """Whether a cut before `text[position]` is between two graphemes (user-perceived characters).

    Conservative: False at every position that Unicode's rules forbid, and at a few harmless ones.
    """
    if position <= 0 or position >= len(text):
        return True
    before, after = text[position - 1], text[position]
    if before < "\u0300" and after < "\u0300":
        return not (before == "\r" and after == "\n")
    return not (
        _extends(after)
        or before == _JOINER
        or _joins_next(before)
        or (_is_jamo_or_syllable(before) and _is_jamo(after))
        or (_is_flag(after) and _flags_before(text, position) % 2 == 1)
    )


def _extends(char: str) -> bool:
    code = ord(char)
    return (
        unicodedata.category(char) in _EXTENDING
        or char in "\u200c\u200d\uff9e\uff9f\u0e33\u0eb3"
        or 0x1F3FB <= code <= 0x1F3FF  # skin tones
        or 0xE0020 <= code <= 0xE007F  # tags, as in the flags of Scotland and Wales
        or 0xDC00 <= code <= 0xDFFF  # second half of a surrogate pair
    )


def _joins_next(char: str) -> bool:
    """Whether it joins the next character: prepended marks, and viramas, which join consonants."""
    code = ord(char)
    return (
        char in _PREPENDED
        or any(low <= code <= high for low, high in _PREPENDED_RANGES)
        or unicodedata.combining(char) == _VIRAMA_CLASS
    )


def _is_jamo(char: str) -> bool:
    return "\u1100" <= char <= "\u11ff" or "\ua960" <= char <= "\ua97f" or "\ud7b0" <= char <= "\ud7ff"


def _is_jamo_or_syllable(char: str) -> bool:
    return _is_jamo(char) or "\uac00" <= char <= "\ud7a3"


def _is_flag(char: str) -> bool:
    return "\U0001f1e6" <= char <= "\U0001f1ff"


def _flags_before(text: str, position: int) -> int:
    start = position
    while start > 0 and _is_flag(text[start - 1]):
        start -= 1
    return position - start
