"""Texts of the embedding benchmarks: chapters, segments, and jobs of segments."""

from collections.abc import Sequence
from pathlib import Path

import orjson

SEGMENT_CHARS = 200
TEXTS_A_JOB = 4
_NOVEL = Path(__file__).resolve().parent.parent / "samples" / "novel"


def chapters(file: Path | None) -> list[str]:
    """The field `content` of each line of a JSONL file; without a file, the chapters of the sample novel."""
    if file is None:
        return [path.read_text("utf-8") for path in sorted(_NOVEL.rglob("*.md")) if path.parent != _NOVEL]
    with file.open(encoding="utf-8") as lines:
        return [str(orjson.loads(line)["content"]) for line in lines if line.strip()]


def segments(chapter: str) -> list[str]:
    """A chapter, cut every 200 characters."""
    return [chapter[start : start + SEGMENT_CHARS] for start in range(0, len(chapter), SEGMENT_CHARS)]


def paragraph_segments(chapter: str) -> list[str]:
    """Paragraphs, each cut every 200 characters: an edit moves no boundary of another paragraph."""
    return [text for paragraph in chapter.split("\n") if paragraph.strip() for text in segments(paragraph)]


def take_segments(chapters: Sequence[str], count: int) -> list[str]:
    """`count` segments of all chapters, repeated as often as needed; 0 for each segment once.

    A repeated segment gets the number of its round as a prefix, since caches recognise equal texts.
    """
    every = [text for chapter in chapters for text in segments(chapter)]
    rounds = [divmod(index, len(every)) for index in range(count or len(every))]
    return [f"{round_} {every[index]}" if round_ else every[index] for round_, index in rounds]


def jobs(texts: Sequence[str]) -> list[list[str]]:
    """The texts in jobs of four segments."""
    return [list(texts[start : start + TEXTS_A_JOB]) for start in range(0, len(texts), TEXTS_A_JOB)]


def edited(chapter: str) -> str:
    """The chapter with a sentence inserted at the start of a paragraph in the middle."""
    paragraphs = chapter.split("\n")
    filled = [index for index, text in enumerate(paragraphs) if text.strip()]
    middle = filled[len(filled) // 2]
    paragraphs[middle] = "他停了一停。" + paragraphs[middle]
    return "\n".join(paragraphs)
