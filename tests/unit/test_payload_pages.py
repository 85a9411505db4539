"""The pages state every field of the payloads and every limit, and errors show what was sent."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobworker.handlers.embedding import payload as embedding
from jobworker.handlers.rebuild.handler import RebuildPayload
from jobworker.handlers.summaries import payload as summaries
from jobworker.handlers.vectors.schema import COLLECTION, ID, shown
from jobworker.worker import Job, PermanentError
from jobworker.worker.cli import main as tool

enqueue = tool.commands["enqueue"]
DOCS = Path(__file__).resolve().parents[2] / "docs"


class Recording(dict[str, Any]):
    """A payload that records which fields are read."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(fields)
        self.names: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        self.names.add(name)
        return super().get(name, default)

    def __getitem__(self, name: str) -> Any:
        self.names.add(name)
        return super().__getitem__(name)


def job(payload: Any) -> Job:
    return Job("a", "type", "t1", "p1", payload, {}, "", "s", "1-1", 0)


def embed(**fields: Any) -> embedding.EmbedPayload:
    return embedding.EmbedPayload.parse(job(Recording(**{"ids": ["a"], "texts": ["x"]} | fields)), "z_")


def rows(page: str, heading: str) -> dict[str, str]:
    """The rows of the first table behind a heading, by the names in their first cell."""
    section = (DOCS / page).read_text().split(f"\n{heading}\n", 1)[1]
    table = re.search(r"\n\| field \|.*?\n\n", section, re.DOTALL)
    assert table is not None
    found = {}
    for row in table[0].strip().splitlines()[2:]:
        for name in re.findall(r"`(\w+)`", row.split("|")[1]):
            found[name] = row
    return found


def read_fields() -> Iterator[tuple[str, str, set[str]]]:
    payload = Recording(ids=["a"], texts=["x"])
    embedding.EmbedPayload.parse(job(payload), "z_")
    yield "embedding.md", "## Payload", payload.names
    payload = Recording(chapter_id="c", content="x")
    summaries.ChapterPayload.parse(job(payload))
    yield "summaries.md", "## Payload", payload.names
    payload = Recording(collection="notes")
    RebuildPayload.parse(payload, "z_")
    yield "vectors.md", "## Rebuilding: `index_rebuild`", payload.names


@pytest.mark.parametrize(
    ("page", "heading", "names"),
    list(read_fields()),
    ids=lambda given: given if isinstance(given, str) else "fields",
)
def test_the_page_lists_every_field_that_is_read(page: str, heading: str, names: set[str]) -> None:
    assert set(rows(page, heading)) == names
    producers = (DOCS / "producers.md").read_text()
    assert all(f"`{name}`" in producers for name in names)


def test_the_pages_state_the_limits() -> None:
    embed, summary = rows("embedding.md", "## Payload"), rows("summaries.md", "## Payload")
    assert f"{embedding.MAX_TEXTS:,}" in embed["ids"]
    assert ID.pattern in embed["ids"]
    assert COLLECTION.pattern in embed["collection"]
    assert "64-bit integers" in embed["story_times"]
    assert f"{embedding.SEGMENT_TYPE_LIMIT_BYTES} bytes" in embed["segment_types"]
    assert f"{summaries.MAX_CONTENT_CHARS:,} characters" in summary["content"]
    assert f"{summaries.CHAPTER_ID_CHARS} at most" in summary["chapter_id"]


EXAMPLES = [page.read_text() for page in [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))]]


def test_row_ids_in_examples_are_unique_over_all_tenants() -> None:
    lists = [ids for text in EXAMPLES for ids in re.findall(r'"ids": (?:\[\]string)?[\[{]([^]}]+)[]}]', text)]
    ids = [id for one in lists for id in re.findall(r'"([^"]+)"', one)]
    assert len(ids) > 8
    assert [id for id in ids if not id.startswith("t001:p123:")] == []
    assert [chapter for text in EXAMPLES for chapter in re.findall(r'"chapter_id": "(\w+-\d+)"', text)] == []


def test_the_example_of_enqueue_is_a_job_of_its_type() -> None:
    (text,) = re.findall(r"enqueue shout .*--payload '([^']+)'", str(enqueue.callback.__doc__))
    assert isinstance(json.loads(text).pop("text"), str), "the payload of the handler in README and tutorial"


@pytest.mark.parametrize("value", [3.0, 1.5, True, "3", None, 2**63, -(2**63) - 1, [1]])
def test_a_story_time_is_a_64_bit_integer(value: Any) -> None:
    with pytest.raises(PermanentError, match=r"story_times\[0\] must be a 64-bit integer"):
        embed(story_times=[value])
    assert embed(story_times=[2**63 - 1]).story_times == [2**63 - 1]


@pytest.mark.parametrize(
    "name", ["collection", "replace", "chapter_ids", "story_times", "segment_types", "version"]
)
def test_null_counts_as_absent(name: str) -> None:
    assert embed(**{name: None}) == embed()


@pytest.mark.parametrize("name", ["collection", "replace", "tenant_id", "project_id"])
def test_an_empty_text_counts_as_absent(name: str) -> None:
    assert embed(**{name: ""}) == embed()


def test_other_fields_are_ignored() -> None:
    assert embed(chapters=["x"]) == embed()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("第七十七章", "'第七十七章'"), ("naïve عربي 한국어", "'naïve عربي 한국어'"),
        (["章"], "['章']"), ({"章": 1}, "{'章': 1}"),
        ("a\nb\x1b[31m\x9b\u202e\u2028\ud800", r"'a\nb\x1b[31m\x9b\u202e\u2028\ud800'"),
        ("雪" * 100, "'" + "雪" * 79 + "…"), ("雪" * 78 + "e\u0301" * 9, "'" + "雪" * 78 + "…"),
        ([["雪" * 40]] * 9, "[['" + "雪" * 40 + "'], ['" + "雪" * 31 + "…"),
    ],
)  # fmt: skip
def test_errors_show_what_was_sent(value: Any, text: str) -> None:
    assert shown(value) == text


def test_errors_name_a_value_that_is_nested_too_deeply() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert shown(deep) == "list that is nested too deeply"
    while deep:  # from the outside in: Python would free it recursively
        deep = deep.pop()


def test_an_error_about_a_chapter_shows_its_id() -> None:
    with pytest.raises(PermanentError, match="not '第七十七章'"):
        summaries.ChapterPayload.parse(job({"chapter_id": "第七十七章", "content": "x"}))
    with pytest.raises(PermanentError, match=r"ids\[0\] must be .*, not '第七十七章'"):
        embed(ids=["第七十七章"])
    with pytest.raises(PermanentError, match=r"collection must be .*, not '章节'"):
        embed(collection="章节")
