"""Extractive summaries: the central sentences of a chapter, without near-duplicates (pure).

Narration is preferred. Dialogue, questions, and sentences that begin or end inside a quotation are poor
summaries, because they need their context.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import NamedTuple

import numpy as np

from ..encoder.segmenter import CLAUSE_END, SENTENCE_END
from ..graphemes import Graphemes
from ..vectors.ports import Vector

#: Weight of similarity to the whole chapter against difference from the sentences already selected (maximal
#: marginal relevance). At the usual 0.7, a repetition of a selected sentence wins over one with new content.
RELEVANCE = 0.5
#: "He nodded." is similar to everything and has no content. Two Han characters count as one word.
MIN_WORDS = 6
_HAN_A_WORD = 2
#: A quotation is one sentence up to this length: half of a dialogue reads like a mistake.
QUOTED_CHARS = 120
#: A longer sentence is divided: the time of a model grows with it, and no summary has room for it.
MAX_SENTENCE_CHARS = 500
#: Similarities are rounded before they are compared: their last digits differ between machines and batch
#: sizes, and must not decide between sentences.
_DECIMALS = 4

_OPENERS, _CLOSERS = "“‘「『（《〈【(", "”’」』）》〉】)"
#: Words before a full stop that ends no sentence.
_ABBREVIATION = re.compile(r"(?:\b(?:Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|etc|No|e\.g|i\.e)|\b[A-Z])\.\s{0,8}$")
#: No abbreviation is longer, with the whitespace after it.
_ABBREVIATION_CHARS = 16
_HAN = r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\U00020000-\U0003ffff]"
_WORD = re.compile(rf"({_HAN})|[^\W_]+")
_APOSTROPHE = re.compile(r"(?<=\w)’(?=\w)")
_ENDED = re.compile(rf"[。！？…｡．!?.][{re.escape(_CLOSERS)}\"']*$")
#: A quotation at the start, or after a colon or comma.
_DIALOGUE = re.compile(r"(?:^|[:：,，])\s*[“‘「『\"]")


class Sentence(NamedTuple):
    """A sentence; `complete` if it has a final mark, and begins and ends outside quotations."""

    text: str
    complete: bool


def split_sentences(text: str) -> list[Sentence]:
    """The sentences of a Chinese or Western text, in order, without the whitespace around them.

    A short quotation is not split, and every letter and digit of the text is in one sentence. Parts of a
    sentence of more than `MAX_SENTENCE_CHARS` characters are sentences that are not complete.
    """
    result: list[Sentence] = []
    graphemes = Graphemes(text)
    start = depth = open_quotes = scanned = 0
    for match in SENTENCE_END.finditer(text):
        end = match.end()
        depth = max(0, depth + _opened(text[scanned:end]))
        scanned = end
        is_line_break = match[0].isspace()
        in_quotation = depth > 0 and end - start < QUOTED_CHARS and not is_line_break
        if in_quotation or _is_false_end(text, start, end) or not graphemes.is_boundary(end):
            continue
        sentence, open_quotes = _to_sentence(text[start:end], open_quotes)
        result += _divide(sentence)
        start, depth, open_quotes = end, 0, 0 if is_line_break else open_quotes
    result += _divide(_to_sentence(text[start:], open_quotes)[0])
    return [sentence for sentence in result if _WORD.search(sentence.text)]


def _divide(sentence: Sentence) -> Iterator[Sentence]:
    """The sentence, or parts of it that end after a clause or word, else between two graphemes."""
    text, start = sentence.text, 0
    if len(text) <= MAX_SENTENCE_CHARS:
        yield sentence
        return
    graphemes = Graphemes(text)
    while start < len(text):
        stop = start + MAX_SENTENCE_CHARS
        if stop < len(text):
            clauses = [match.end() for match in CLAUSE_END.finditer(text, start, stop)]
            ends = [end for end in clauses if graphemes.is_boundary(end)]
            stop = ends[-1] if ends else graphemes.last_boundary(stop, start) or stop
        yield Sentence(text[start:stop].strip(), False)
        start = stop


def _to_sentence(text: str, open_before: int) -> tuple[Sentence, int]:
    """A sentence, and how many quotations are open after it; `open_before`: how many are open before it."""
    text, open_now, lowest = text.strip(), open_before, open_before
    for char in _APOSTROPHE.sub("", text):
        open_now += (char in _OPENERS) - (char in _CLOSERS)
        lowest = min(lowest, open_now)
    has_start = text[:1].isalnum() or text[:1] in _OPENERS
    complete = has_start and open_before == open_now == lowest == 0 and _ENDED.search(text) is not None
    return Sentence(text, complete), max(0, open_now)


def select_sentences(sentences: Sequence[Sentence], vectors: Vector, limit_chars: int) -> str:
    """A summary of at most `limit_chars` characters: some of the sentences, in their order.

    `vectors` has shape (len(sentences), dim). Each step selects the sentence that is most similar to the
    average of all and least similar to those selected. If not even one fits, the most central one is
    shortened. Equal arguments give equal summaries. Raises ValueError without a sentence.
    """
    if not sentences:
        raise ValueError("no sentence to choose from")
    texts = [sentence.text for sentence in sentences]
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    central = np.round(unit @ unit.mean(axis=0), _DECIMALS)
    candidates = _candidates(sentences, limit_chars)
    selected = _select_diverse(texts, unit, central, candidates, limit_chars)
    if not selected:
        return shorten(texts[max(candidates, key=lambda index: (central[index], -index))], limit_chars)
    return join_sentences([texts[index] for index in selected])


def _candidates(sentences: Sequence[Sentence], limit_chars: int) -> list[int]:
    """Indexes of the sentences that can be understood without their context.

    Complete narration if it fills half of the summary; otherwise complete sentences, then sentences with
    enough words, then all.
    """
    wordy = [index for index, sentence in enumerate(sentences) if _count_words(sentence.text) >= MIN_WORDS]
    complete = [index for index in wordy if sentences[index].complete]
    narration = [index for index in complete if not _is_dialogue(sentences[index].text)]
    lengths = (len(sentences[index].text) for index in narration)
    if sum(length for length in lengths if length <= limit_chars) >= limit_chars / 2:
        return narration
    return complete or wordy or list(range(len(sentences)))


def _count_words(text: str) -> float:
    return sum(1 / _HAN_A_WORD if match[1] else 1 for match in _WORD.finditer(text))


def _select_diverse(
    texts: Sequence[str], unit: Vector, central: Vector, candidates: Sequence[int], limit_chars: int
) -> list[int]:
    """Sorted indexes of the selected sentences; a sentence that does not fit is skipped."""
    selected: list[int] = []
    max_similarity = np.zeros(len(texts), np.float32)
    remaining = np.array(sorted(candidates))
    while len(remaining):
        score = np.round(RELEVANCE * central - (1 - RELEVANCE) * max_similarity, _DECIMALS)
        ranked = remaining[np.argsort(-score[remaining], kind="stable")].tolist()
        best = next((index for index in ranked if _fits(texts, [*selected, index], limit_chars)), None)
        if best is None:
            break
        selected = sorted([*selected, best])
        max_similarity = np.maximum(max_similarity, np.round(unit @ unit[best], _DECIMALS))
        # One before it did not fit, and will not fit later.
        behind = ranked[ranked.index(best) + 1 :]
        remaining = np.array(sorted(index for index in behind if texts[index] != texts[best]), int)
    return selected


def _fits(texts: Sequence[str], indexes: Sequence[int], limit_chars: int) -> bool:
    parts = [texts[index] for index in sorted(indexes)]
    return sum(map(len, parts)) <= limit_chars and len(join_sentences(parts)) <= limit_chars


def join_sentences(parts: Sequence[str]) -> str:
    """Sentences as one text, with a space between them unless one side is Chinese."""
    text = ""
    for part in parts:
        text += (" " if text and not (_is_wide(text[-1]) or _is_wide(part[0])) else "") + part
    return text


def shorten(text: str, limit_chars: int) -> str:
    """At most `limit_chars` characters of a text.

    It ends after the last sentence that fits, else after the last clause with `…`, else inside one with `…`,
    and never inside a grapheme.
    """
    text = text.strip()
    if len(text) <= limit_chars:
        return text
    graphemes = Graphemes(text)
    sentences = [match.end() for match in _matches_within(SENTENCE_END, text, limit_chars)]
    clauses = [match.start() for match in _matches_within(CLAUSE_END, text, limit_chars - 1)]
    for ends, mark in ((sentences, ""), (clauses, "…")):
        whole = [end for end in ends if graphemes.is_boundary(end)]
        if whole and _WORD.search(text, 0, whole[-1]):
            return text[: whole[-1]].rstrip() + mark
    if limit_chars == 1 and graphemes.is_boundary(1):
        return text[:1]
    return text[: graphemes.last_boundary(limit_chars - 1) or 0].rstrip() + "…"


def _matches_within(pattern: re.Pattern[str], text: str, stop: int) -> Iterator[re.Match[str]]:
    return takewhile(lambda match: match.end() <= stop, pattern.finditer(text))


def _is_false_end(text: str, start: int, end: int) -> bool:
    """Whether the sentence continues: after an abbreviation, or with a lower-case letter."""
    after = text[end : end + 2].lstrip(" ")[:1]
    # Only the end is searched: a search of the whole sentence at each full stop in it would be quadratic.
    last = max(start, end - _ABBREVIATION_CHARS)
    return after.islower() or _ABBREVIATION.search(text, last, end) is not None


def _is_dialogue(text: str) -> bool:
    """Whether it is direct speech, or a question to another person or to the reader."""
    return _DIALOGUE.search(text) is not None or _is_question(text)


def _is_question(text: str) -> bool:
    """Whether there is a question mark after the last letter or digit."""
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
