"""JSON goes through orjson: where the standard library is imported, a reason is here and beside it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHECKED = ("worker", "handlers", "scripts", "bench", "examples")
#: Files that import `json`, and why orjson cannot serve them.
REASONS = {
    "worker/safe_text.py": "shows integers beyond 64 bits and unpaired surrogates, which orjson refuses",
    "worker/envelope.py": "sees a key that occurs twice",
    "worker/new_job.py": "refuses NaN, for which orjson writes null",
    "worker/telemetry/log.py": "knows a secret in the form with escaped letters",
    "worker/admin/identity.py": "reads the members before the place that cannot be read",
    "handlers/summaries/secret_mask.py": "knows a secret in the form with escaped letters",
    "handlers/summaries/llm.py": "reads an object inside other text",
    "bench/embed_child.py": "runs in environments without orjson",
    "bench/engines.py": "runs in environments without orjson",
    "bench/peers/feed.py": "runs in environments without orjson",
}


def imports_of_json(source: str) -> Iterator[int]:
    """The lines of a file that import the standard library's `json`."""
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [str(node.module)]
        if any(name.split(".")[0] == "json" for name in names):
            assert isinstance(node, ast.stmt)
            yield node.lineno


def files_with_json() -> dict[str, list[str]]:
    """By file, the line above each import of `json`."""
    found = {}
    for path in [ROOT / "supervisor.py", *(file for name in CHECKED for file in (ROOT / name).rglob("*.py"))]:
        source = path.read_text("utf-8")
        lines = [source.splitlines()[number - 2] for number in imports_of_json(source)]
        if lines:
            found[str(path.relative_to(ROOT))] = lines
    return found


def test_the_standard_library_reads_and_writes_json_for_a_reason_only() -> None:
    found = files_with_json()
    assert found.keys() == REASONS.keys()
    assert [path for path, above in found.items() if not all(line.startswith("# ") for line in above)] == []


@pytest.mark.parametrize(
    "source", ["import json", "import os, json as j", "def f():\n    from json import loads"]
)
def test_a_planted_import_is_seen(source: str) -> None:
    assert list(imports_of_json(source))


@pytest.mark.parametrize("source", ["import orjson", "from .json import x", "import jsonlines"])
def test_other_imports_are_left_alone(source: str) -> None:
    assert not list(imports_of_json(source))
