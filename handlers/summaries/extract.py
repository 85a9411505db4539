"""A chapter's summary out of its own sentences: those nearest to what it is about, no two alike (pure)."""

import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..encoder.segmenter import CLAUSE_END, SENTENCE_END
from ..vectors.ports import Vector

#: Weight of being near to the whole chapter against being unlike what is chosen already. At the 0.7 that is
#: often used a sentence that says the same again still wins over one that says something else.
RELEVANCE = 0.5
#: "He nodded." is near to everything and says nothing; two Han characters say about what a word does.
MIN_WORDS = 6
_HAN_A_WORD = 2
#: A quotation is kept whole up to this length: half a dialogue reads like a mistake.
QUOTED_CHARS = 120
#: Similarities are rounded before they are compared, so that the last digits, which differ between machines
#: and batch sizes, do not choose between sentences.
_DECIMALS = 4

_OPENERS, _CLOSERS = "“‘「『（《〈【(", "”’」』）》〉】)"
#: Words before a full stop that ends no sentence.
_ABBREVIATION = re.compile(r"(?:\b(?:Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|etc|No|e\.g|i\.e)|\b[A-Z])\.\s{0,8}$")
#: No abbreviation is longer, with the blanks behind it.
_ABBREVIATION_CHARS = 16
_HAN = r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\U00020000-\U0003ffff]"
_WORD = re.compile(rf"({_HAN})|[^\W_]+")
_APOSTROPHE = re.compile(r"(?<=\w)’(?=\w)")
_ENDED = re.compile(rf"[。！？…｡．!?.][{re.escape(_CLOSERS)}\"']*$")
#: Dialogue, or a question to the reader: neither has a meaning without its context.
_SPEECH = re.compile(r"(?:^|[:：,，])\s*[“‘「『\"]")


class Sentence(NamedTuple):
    """`whole`: it begins and ends outside any quotation and leads up to nothing that is not in it."""

    text: str
    whole: bool


def sentences(text: str) -> list[Sentence]:
    """The sentences of a Chinese or Western text, in order, without the blanks around them."""
    found: list[Sentence] = []
    start = depth = balance = seen = 0
    for match in SENTENCE_END.finditer(text):
        end = match.end()
        depth = max(0, depth + _opened(text[seen:end]))
        seen = end
        broken = match[0].isspace()
        inside = depth > 0 and end - start < QUOTED_CHARS and not broken
        if inside or _goes_on(text, start, end):
            continue
        sentence, balance = _sentence(text[start:end], balance)
        found.append(sentence)
        start, depth, balance = end, 0, 0 if broken else balance
    found.append(_sentence(text[start:], balance)[0])
    return [sentence for sentence in found if _WORD.search(sentence.text)]


def _sentence(text: str, balance: int) -> tuple[Sentence, int]:
    """A sentence, and how many quotations are open behind it; `balance`: how many were before it."""
    text, before, least = text.strip(), balance, balance
    for char in _APOSTROPHE.sub("", text):
        balance += (char in _OPENERS) - (char in _CLOSERS)
        least = min(least, balance)
    begun = text[:1].isalnum() or text[:1] in _OPENERS
    whole = begun and before == balance == least == 0 and _ENDED.search(text) is not None
    return Sentence(text, whole), max(0, balance)


def choose(found: Sequence[Sentence], vectors: Vector, limit_chars: int) -> str:
    """A summary of at most `limit_chars` characters: sentences of `found`, in their order.

    `vectors` has shape (len(found), dim). The sentence next chosen is the one that is nearest to the average
    of all and least like those chosen. Where not even one fits, the beginning of the most central one is
    given. The same arguments give the same summary. Raises ValueError where there is no sentence.
    """
    if not found:
        raise ValueError("no sentence to choose from")
    texts = [sentence.text for sentence in found]
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    central = np.round(unit @ unit.mean(axis=0), _DECIMALS)
    candidates = _candidates(found, limit_chars)
    chosen = _most_relevant(texts, unit, central, candidates, limit_chars)
    if not chosen:
        return shorten(texts[max(candidates, key=lambda place: (central[place], -place))], limit_chars)
    return join([texts[place] for place in chosen])


def _candidates(found: Sequence[Sentence], limit_chars: int) -> list[int]:
    """The places of those that say something by themselves: what is told rather than said, where that fills
    half of the summary, else what is whole, else what is no mere nod, else all."""
    wordy = [place for place, sentence in enumerate(found) if _words(sentence.text) >= MIN_WORDS]
    whole = [place for place in wordy if found[place].whole]
    told = [place for place in whole if not _is_speech(found[place].text)]
    lengths = (len(found[place].text) for place in told)
    if sum(length for length in lengths if length <= limit_chars) >= limit_chars / 2:
        return told
    return whole or wordy or list(range(len(found)))


def _words(text: str) -> float:
    return sum(1 / _HAN_A_WORD if match[1] else 1 for match in _WORD.finditer(text))


def _most_relevant(
    found: Sequence[str], unit: Vector, central: Vector, candidates: Sequence[int], limit_chars: int
) -> list[int]:
    """The places chosen one after another while one more fits, sorted."""
    chosen: list[int] = []
    nearest = np.zeros(len(found), np.float32)
    left = set(candidates)
    while left:
        score = np.round(RELEVANCE * central - (1 - RELEVANCE) * nearest, _DECIMALS)
        best = max(left, key=lambda place: (score[place], -place))
        left.discard(best)
        attempt = sorted([*chosen, best])
        if len(join([found[place] for place in attempt])) > limit_chars:
            continue
        chosen = attempt
        nearest = np.maximum(nearest, np.round(unit @ unit[best], _DECIMALS))
        left = {place for place in left if found[place] != found[best]}
    return chosen


def join(parts: Sequence[str]) -> str:
    """Sentences as one text: a blank between them only where the script has blanks."""
    text = ""
    for part in parts:
        text += (" " if text and not (_is_wide(text[-1]) or _is_wide(part[0])) else "") + part
    return text


def shorten(text: str, limit_chars: int) -> str:
    """At most `limit_chars` characters: up to the last sentence that fits, else clause, else cut with `…`."""
    text = text.strip()
    if len(text) <= limit_chars:
        return text
    for ends, mark in ((SENTENCE_END, ""), (CLAUSE_END, "…")):
        room = limit_chars - len(mark)
        fitting = [match for match in ends.finditer(text) if match.end() <= room]
        if fitting and _WORD.search(text, 0, fitting[-1].start()):
            last = fitting[-1]
            return text[: last.end()].rstrip() if not mark else text[: last.start()].rstrip() + mark
    return text[: limit_chars - 1].rstrip() + "…" if limit_chars > 1 else text[:limit_chars]


def _goes_on(text: str, start: int, end: int) -> bool:
    """Whether what looks like an end is none: after an abbreviation, or before a small letter."""
    after = text[end : end + 2].lstrip(" ")[:1]
    # Only the end is searched: a search of the whole sentence at each full stop in it would be quadratic.
    last = max(start, end - _ABBREVIATION_CHARS)
    return after.islower() or _ABBREVIATION.search(text, last, end) is not None


def _is_speech(text: str) -> bool:
    """Whether it is dialogue or a question."""
    return _SPEECH.search(text) is not None or _asks(text)


def _asks(text: str) -> bool:
    """Whether a question mark stands behind the last letter or digit."""
    for char in reversed(text):
        if char in "？?":
            return True
        if char.isalnum() or char == "_":
            return False
    return False


def _opened(text: str) -> int:
    return sum(char in _OPENERS for char in text) - sum(char in _CLOSERS for char in text)


def _is_wide(char: str) -> bool:
    return unicodedata.east_asian_width(char) in "WF" or char in "“”‘’…—"
