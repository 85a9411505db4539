"""No text from outside keeps a process busy: every pattern, and every function that reads text, is linear.

Each is given hostile texts of 2,000 and 10,000 characters, and of 50,000 if it took long. Five times the text
takes what is linear five times as long and what is quadratic 25 times, on a fast machine and on a slow one.
"""

import ast
import functools
import gc
import importlib
import pkgutil
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import jobworker.handlers
import jobworker.worker
from jobworker.handlers.encoder import segmenter
from jobworker.handlers.summaries import extract, llm
from jobworker.worker import settings
from jobworker.worker.admin import find_job as whereabouts
from jobworker.worker.admin import status_client as observe
from jobworker.worker.admin.words import strip_control
from jobworker.worker.cli.common import Age
from jobworker.worker.envelope import Envelope
from jobworker.worker.settings import without_credentials
from jobworker.worker.telemetry import log as logs
from jobworker.worker.telemetry.current_job import log_fields, traceparent_trace_id

SHORT, MIDDLE, LONG = 2_000, 10_000, 50_000
#: What is cubic takes seconds for a short text, what is linear takes at most 10 ms.
CUBIC_S = 0.2
#: What takes a second for a long text takes 40 ms for a middle one. More than this is tried with a long one.
SUSPECT_S = 0.01
#: How much longer the long text may take: between the 5 times of what is linear and the 25 of what is not.
GROWTH = 12
#: What hostile texts are made of. Each is repeated, alone or behind a beginning, and given an end that spoils
#: what a pattern had hoped for.
PIECES = [
    "a", "A. ", "0", " ", "\n", ".", ". ", ":", "/", "@", "://", "a://", "a://:", "a://b:c@ ", "://a:@", "?",
    "?\n", "？", "”", ".”", "`", "```", "```\n", "=", "password=", "Bearer ", "Bearer aaaaaaaaa ", "-", "0-",
    "_", "a.", "0.", "，", "Mr.\n", "Mr. ", "\"", "（", "「", "\u4e00", "\u0301", "\x1b", "&", "'",
]  # fmt: skip
BEGINNINGS = ["a://:", "```", "No.", "?", "password=", "Bearer "]
ENDS = ["", "x", "@", "\n!", " \x00"]
#: Module-level patterns are tried with each method that the code calls on them.
METHODS = ("match", "fullmatch", "search", "sub", "finditer", "findall", "split")
ROOT = Path(jobworker.worker.__file__).parent.parent


@dataclass(frozen=True)
class Hostile:
    """A text of any length."""

    beginning: str
    piece: str
    end: str

    def text(self, length: int) -> str:
        return self.beginning + self.piece * (length // len(self.piece)) + self.end


def hostile() -> Iterator[Hostile]:
    for piece in PIECES:
        yield from (Hostile(beginning, piece, "x") for beginning in BEGINNINGS)
        yield from (Hostile("", piece, end) for end in ENDS)


class TooSlow(Exception):
    """It takes too long for a text of this length."""


def cpu_s(call: Callable[[str], object], text: str, tries: int = 1) -> float:
    """Processor seconds of this thread, the least of the tries.

    The collector is off: it would go through the objects of every test before this one.
    """
    gc.disable()
    try:
        return min(_cpu_s(call, text) for _ in range(tries))
    finally:
        gc.enable()


def _cpu_s(call: Callable[[str], object], text: str) -> float:
    began_s = time.thread_time()
    call(text)
    return time.thread_time() - began_s


def try_with(name: str, call: Callable[[str], object], hostile: Hostile) -> None:
    """Raises TooSlow if a longer text takes more than its share of time."""
    what = f"{name}: {hostile}"
    if cpu_s(call, hostile.text(SHORT)) > CUBIC_S:
        raise TooSlow(what)
    middle_s = cpu_s(call, hostile.text(MIDDLE))
    if middle_s <= SUSPECT_S or cpu_s(call, hostile.text(LONG)) <= GROWTH * middle_s:
        return
    # One measure may be off on a busy machine.
    if cpu_s(call, hostile.text(LONG), tries=3) > GROWTH * cpu_s(call, hostile.text(MIDDLE), tries=3):
        raise TooSlow(what)


@pytest.mark.parametrize("pattern", [r"\w+://", r"\w+\w+://"], ids=["quadratic", "cubic"])
def test_what_is_not_linear_is_found(pattern: str) -> None:
    """Else the tests below would prove nothing."""
    with pytest.raises(TooSlow):
        try_with("a pattern", lambda text: re.search(pattern, text[::2]), Hostile("", "a", ""))


def modules() -> Iterator[ModuleType]:
    for package in (jobworker.worker, jobworker.handlers):
        yield package
        for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            try:
                yield importlib.import_module(found.name)
            except ImportError:  # it needs a library that is not installed here
                continue


@functools.cache
def code() -> list[ast.AST]:
    """Every node of the syntax trees of the code."""
    paths = [ROOT / "supervisor.py"]
    for folder in ("worker", "handlers"):
        paths += (ROOT / folder).rglob("*.py")
    return [node for path in paths for node in ast.walk(ast.parse(path.read_text()))]


def methods_by_name() -> dict[str, set[str]]:
    """Which methods the code calls on a pattern of this name, wherever it was imported."""
    found: dict[str, set[str]] = {}
    for node in code():
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.attr in METHODS:
            found.setdefault(node.value.id, set()).add(node.attr)
    return found


@functools.cache
def used() -> dict[tuple[str, int, str], re.Pattern[str]]:
    """Every pattern over text in the code, by its text, flags and a method that is called on it."""
    calls = methods_by_name()
    found: dict[tuple[str, int, str], re.Pattern[str]] = {}
    for module in modules():
        for name, value in vars(module).items():
            if isinstance(value, re.Pattern) and isinstance(value.pattern, str):
                # A loop may call it by another name: then it is tried as the slowest would be.
                for method in calls.get(name, {"search"}):
                    found[value.pattern, value.flags, method] = value
    for node in code():
        match node:
            case ast.Call(ast.Attribute(ast.Name("re"), method), [ast.Constant(str() as text), *_]) if (
                method in METHODS
            ):
                found[text, 0, method] = re.compile(text)
    return found


def test_the_patterns_are_found() -> None:
    texts = {text for text, _, _ in used()}
    assert len(texts) > 20
    assert {logs._SECRET_PARAMETER.pattern, segmenter.SENTENCE_END.pattern} <= texts


@pytest.mark.parametrize("method", METHODS)
def test_every_pattern_is_linear(method: str) -> None:
    """The patterns are found here and not as parameters: that imports every module, which takes seconds."""
    for pattern in [found for (_, _, called), found in used().items() if called == method]:
        call = caller(pattern, method)
        for one in hostile():
            try_with(f"{method} of {pattern.pattern}", call, one)


def caller(pattern: re.Pattern[str], method: str) -> Callable[[str], Any]:
    calls: dict[str, Callable[[str], Any]] = {
        "sub": lambda text: pattern.sub("", text),
        "finditer": lambda text: sum(1 for _ in pattern.finditer(text)),
    }
    return calls.get(method) or getattr(pattern, method)


def about(text: str) -> Envelope:
    return Envelope(id=text, type=text, tenant_id=text, metadata={"request_id": text, "traceparent": text})


def tolerant(call: Callable[[str], object], *refusals: type[Exception]) -> Callable[[str], None]:
    def tried(text: str) -> None:
        try:
            call(text)
        except refusals:
            return

    return tried


def logged(text: str) -> str:
    record = logs.logging.makeLogRecord(
        {"msg": "%s", "args": (text,), "error": text, **log_fields(about(text))}
    )
    return logs.JsonFormatter("reader").format(record) + logs.TextFormatter("reader").format(record)


READERS: dict[str, Callable[[str], object]] = {
    "redacted": logs.redacted,
    "without_credentials": without_credentials,
    "secrets_of": lambda text: logs.secrets_of(settings.Settings(redis_url=text), {}),
    "a log line": logged,
    "traceparent_trace_id": traceparent_trace_id,
    "same_store": lambda text: observe.same_store(text, text),
    "strip_control": strip_control,
    "Age": tolerant(lambda text: Age().convert(text, None, None), Exception),
    "an answer of a language model": llm.parse_findings,
    "Retry-After": lambda text: llm.retry_after_s({"retry-after": text[:20_000]}, llm.datetime.now(llm.UTC)),
    "sentences": extract.split_sentences,
    "whether it is dialogue": extract._is_dialogue,
    "shorten": lambda text: extract.shorten(text, 100),
    "an id that is looked for": lambda text: whereabouts._matcher(text)(b"{}"),
}


@pytest.mark.parametrize("name", READERS)
def test_every_reader_of_text_is_linear(name: str) -> None:
    read = READERS[name]
    for one in [Hostile("", piece, end) for piece in PIECES for end in ("", "x")]:
        try_with(name, read, one)
