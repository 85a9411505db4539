"""Graphemes: characters as a reader perceives them, such as a letter with its accents."""

import unicodedata

_JOINER = "\u200d"
_VIRAMA_CLASS = 9
# Characters that belong to the letter or digit after them (Unicode property Prepend).
_PREPENDED = frozenset(
    "\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2\u0d4e\U000110bd\U000110cd"
)
_PREPENDED_RANGES = ((0x111C2, 0x111C3), (0x113D1, 0x113D1), (0x1193F, 0x11941), (0x11A3A, 0x11A3A),
                     (0x11A84, 0x11A89), (0x11D46, 0x11D46), (0x11F02, 0x11F02))  # fmt: skip
_EXTENDING = frozenset(("Mn", "Me", "Mc"))


class Graphemes:
    """Grapheme boundaries of one text; any number of questions about it takes linear time altogether."""

    def __init__(self, text: str) -> None:
        self._text = text
        #: The run of flag letters that was asked about last: its start, and a position in it or at its end.
        self._run = (0, 0)

    def is_boundary(self, position: int) -> bool:
        """Whether a cut before `text[position]` is between two graphemes.

        Conservative: False at every position that Unicode's rules forbid, and at a few harmless ones.
        """
        text = self._text
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
            or (_is_flag(after) and _is_flag(before) and (position - self._run_start(position)) % 2 == 1)
        )

    def last_boundary(self, position: int, after: int = 0) -> int | None:
        """The last boundary behind `after`, up to `position`; None if one grapheme fills that range."""
        span = range(min(position, len(self._text)), after, -1)
        return next((at for at in span if self.is_boundary(at)), None)

    def _run_start(self, position: int) -> int:
        """Start of the run of flag letters that ends at a position or continues there."""
        first, known = self._run
        start = position
        while start > 0 and _is_flag(self._text[start - 1]):
            if first <= start <= known:
                start = first
                break
            start -= 1
        self._run = (start, max(position, known) if start == first else position)
        return start


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
