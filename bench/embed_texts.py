"""The texts that embedding is measured with: chapters, their segments, and jobs of segments."""

import json
from collections.abc import Sequence
from pathlib import Path

SEGMENT_CHARS = 200
TEXTS_A_JOB = 4
_NOVEL = Path(__file__).resolve().parent.parent / "samples" / "novel"


def chapters(file: Path | None) -> list[str]:
    """The field `content` of each line of a JSONL file; without one the sample novel's chapters."""
    if file is None:
        return [path.read_text("utf-8") for path in sorted(_NOVEL.rglob("*.md")) if path.parent != _NOVEL]
    with file.open(encoding="utf-8") as lines:
        return [str(json.loads(line)["content"]) for line in lines if line.strip()]


def segments(chapter: str) -> list[str]:
    """A chapter every 200 characters, wherever that is."""
    return [chapter[start : start + SEGMENT_CHARS] for start in range(0, len(chapter), SEGMENT_CHARS)]


def paragraph_segments(chapter: str) -> list[str]:
    """A chapter's paragraphs, each cut every 200 characters: an edit moves no border outside of its own."""
    return [text for paragraph in chapter.split("\n") if paragraph.strip() for text in segments(paragraph)]


def take_segments(chapters: Sequence[str], count: int) -> list[str]:
    """`count` segments of all chapters together, from the beginning as often as needed; 0 for each once.

    A repeated segment has its round before it, for a cache or a database might know the same text again.
    """
    every = [text for chapter in chapters for text in segments(chapter)]
    rounds = [divmod(place, len(every)) for place in range(count or len(every))]
    return [f"{round_} {every[place]}" if round_ else every[place] for round_, place in rounds]


def jobs(texts: Sequence[str]) -> list[list[str]]:
    """Four segments a job."""
    return [list(texts[start : start + TEXTS_A_JOB]) for start in range(0, len(texts), TEXTS_A_JOB)]


def edited(chapter: str) -> str:
    """One paragraph changed, in the middle: a sentence is put into its beginning."""
    paragraphs = chapter.split("\n")
    longest = [place for place, text in enumerate(paragraphs) if text.strip()]
    middle = longest[len(longest) // 2]
    paragraphs[middle] = "他停了一停。" + paragraphs[middle]
    return "\n".join(paragraphs)
