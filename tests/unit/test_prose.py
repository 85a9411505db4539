"""Comments, docstrings, messages and pages use plain words: an on-call engineer reads them in a hurry."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
#: Literary words, and clauses for which the field has a noun: dependency, poison job, a number.
LIST = (
    r"(?:anew|nobody|whoever|for want of|of late|heed(?:s|ed)?|deeds?|bury|buried|graves?|tales?|behold|"
    r"what it needs|what cannot work|so many|go(?:es)? on|went on|bids?|of before|anybody|somebody|"
    r"(?:that|who|which|one|it|also) stands?|comes? to nothing)\b"
)
WORDS = re.compile(rf"\b{LIST}", re.IGNORECASE)
#: A file without a match has no such word: it need not be parsed. An escape may stand right before a word.
POSSIBLE_WORDS = re.compile(LIST, re.IGNORECASE)
#: Where such a word is a name of the system, or a text that is only data.
ALLOWED = re.compile(
    r"reuid=nobody|user (?:postgres or )?nobody|so many as|that stands for|Nobody had seen the harbour",
    re.IGNORECASE,
)
CODE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def python_prose(source: str, *, messages: bool) -> Iterator[tuple[int, str]]:
    """Comments and docstrings with their lines; with `messages` every other string too."""
    docstrings = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=False)
            if text is not None:
                docstrings.add(node.body[0].lineno)
                yield node.body[0].lineno, text
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        strings = messages and token.type == tokenize.STRING and token.start[0] not in docstrings
        if token.type == tokenize.COMMENT or strings:
            yield token.start[0], token.string


def page_prose(text: str) -> Iterator[tuple[int, str]]:
    """A page without its blocks of code, line by line."""
    plain = CODE.sub(lambda block: "\n" * block[0].count("\n"), text)
    yield from enumerate(plain.splitlines(), 1)


def found(where: str, prose: Iterator[tuple[int, str]]) -> list[str]:
    return [
        f"{where}:{line}: {word[0]}"
        for line, text in prose
        for word in WORDS.finditer(ALLOWED.sub("", re.sub(r"\s+", " ", text)))
    ]


def test_code_speaks_plainly() -> None:
    wrong = []
    files = [ROOT / "supervisor.py"]
    for room in ("worker", "handlers", "tests", "bench", "samples", "scripts", "examples"):
        files += (ROOT / room).rglob("*.py")
    for file in files:
        where = file.relative_to(ROOT).as_posix()
        # Operators read these strings: log events, help texts, errors.
        messages = where.startswith(("worker/", "handlers/")) or where == "supervisor.py"
        source = file.read_text("utf-8")
        if file != Path(__file__) and POSSIBLE_WORDS.search(re.sub(r"\s+", " ", source)):
            wrong += found(where, python_prose(source, messages=messages))
    assert not wrong, "\n".join(wrong)


def test_pages_templates_and_scripts_speak_plainly() -> None:
    wrong = []
    files = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md")]
    for suffix in ("*.lua", "*.html", "page.js"):
        files += [*ROOT.glob(f"worker/**/{suffix}"), *ROOT.glob(f"handlers/**/{suffix}")]
    files += [*ROOT.glob("monitoring/*.yml"), *ROOT.glob("systemd/*"), *ROOT.glob("scripts/*.sh")]
    for file in files:
        if file.is_file():
            wrong += found(file.relative_to(ROOT).as_posix(), page_prose(file.read_text("utf-8")))
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "source",
    [
        '"""Begun anew."""',
        "x = 1  # nobody reads it",
        "x = 1  # others go on",
        'def f():\n    """What it needs."""',
    ],
)
def test_a_planted_word_is_seen(source: str) -> None:
    assert found("x.py", python_prose(source, messages=False))


def test_messages_count_where_operators_read_them() -> None:
    source = 'log.info("whoever comes")'
    assert found("x.py", python_prose(source, messages=True))
    assert not found("x.py", python_prose(source, messages=False))


def test_code_in_a_page_is_not_prose() -> None:
    assert not found("x.md", page_prose("before\n```\nsetpriv nobody\n```\nafter"))
    assert found("x.md", page_prose("It goes on."))
