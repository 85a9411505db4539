"""The engine knows no job type: the words of the built-in types do not occur below worker/."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORDS = re.compile(
    r"(?<![a-z])(chapters?|entity|entities|collections?|(?:py)?milvus|models?|vectors?|embed(?:s|dings?)?"
    r"|summar(?:y|ies))"
    r"(?![a-z])",
    re.IGNORECASE,
)
#: The standard library, HTML, a log summary, a line of the driver's file, and names of pydantic.
ALLOWED = re.compile(
    r"collections(?:\.abc)? import|</?summary>|summary \{|is_summary|_SUMMARY|a summary of|'Model:'"
    r"|BaseModel|model_validate_json"
)
#: Where a word begins within a CamelCase name.
CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
SUFFIXES = {".py", ".lua", ".html", ".js", ".css"}


def engine_words(text: str) -> list[tuple[int, str]]:
    return [
        (number, word[0])
        for number, line in enumerate(text.splitlines(), 1)
        for word in WORDS.finditer(CAMEL.sub(" ", ALLOWED.sub("", line.replace('"', "'")).replace("_", " ")))
    ]


def test_the_engine_names_nothing_of_the_built_in_types() -> None:
    wrong = []
    for file in (ROOT / "worker").rglob("*"):
        if file.suffix in SUFFIXES and "vendor" not in file.parts:
            found = engine_words(file.read_text("utf-8"))
            wrong += [f"{file.relative_to(ROOT)}:{number}: {word}" for number, word in found]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "line",
    [
        "milvus_uri: str",
        "# a chapter's text",
        'key = "entity:1"',
        "load_model()",
        "class EmbeddedMilvus:",
        "VectorStore",
        "import pymilvus",
        "to embed a text",
    ],
)
def test_a_planted_word_is_seen(line: str) -> None:
    assert engine_words(line)


@pytest.mark.parametrize(
    "line", ["from collections.abc import Sequence", "from collections import deque", "class EmbeddedValkey:"]
)
def test_other_uses_of_the_words_are_allowed(line: str) -> None:
    assert not engine_words(line)
