"""The request of a rebuild, names of collections, and the parts of a rebuild that compute."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobworker.handlers.embedding.payload import EmbedPayload
from jobworker.handlers.rebuild import rebuild
from jobworker.handlers.rebuild.handler import RebuildPayload, embedded_text
from jobworker.handlers.rebuild.rebuild import next_collection, thin_sample
from jobworker.handlers.rebuild.recall import TrueScores
from jobworker.handlers.vectors.ports import EntityRow
from jobworker.handlers.vectors.schema import plain_name
from jobworker.worker import Job, PermanentError
from support.rebuild_world import ALIAS, NAME, OLD, World

pytestmark = pytest.mark.usefixtures("small_pages")


@given(st.lists(st.integers(0, 40), max_size=30), st.integers(1, 60))
def test_rows_are_split_by_text_size_in_order(sizes: list[int], most: int) -> None:
    records = [{"id": f"{number:02}", "text_content": "x" * size} for number, size in enumerate(sizes)]
    cut = list(rebuild.split_by_chars(records, most))
    assert [record for part in cut for record in part] == records
    for part in cut:
        assert len(part) <= 1 or sum(2 + len(record["text_content"]) for record in part) <= most


@pytest.mark.parametrize(
    ("payload", "says"),
    [
        (None, "payload must be an object"),
        ({}, "collection must be"),
        ({"collection": 'x" or'}, "collection must be"),
        ({"collection": "story_segments_v2"}, "_v and digits"),
        ({"collection": "z_novel_story_segments_v2"}, "_v and digits"),
        ({"collection": "z_novel_"}, "prefix alone"),
        ({"collection": "a" * 200}, "does not match"),
        ({"collection": "a", "mode": "fast"}, "mode must be"),
        ({"collection": "a", "mode": ["shadow"]}, "mode must be"),
        ({"collection": "a", "model": 5}, "model must be"),
        ({"collection": "a", "model": "m", "mode": "in_place"}, "model needs mode shadow"),
    ],
)
def test_a_bad_payload_is_refused(payload: Any, says: str) -> None:
    with pytest.raises(PermanentError, match=says):
        RebuildPayload.parse(payload, "z_novel_")


def test_the_collection_may_be_named_with_or_without_prefix() -> None:
    assert RebuildPayload.parse({"collection": ALIAS}, "z_novel_").collection == NAME
    assert RebuildPayload.parse({"collection": NAME}, "z_novel_") == (NAME, "shadow", "")


@given(
    st.sampled_from(["", "z_novel_", "story_", "x_v1_"]),
    st.sampled_from(["story_segments", "entity_profiles", "notes", "z_novel_notes", "v2", "a_v2", "story_"]),
    st.booleans(),
)
def test_all_job_types_accept_the_same_collection_names(prefix: str, name: str, prefixed: bool) -> None:
    """Both job types read a name as the same collection, or both refuse it."""
    name = prefix * prefixed + name
    answers = []
    for read in (
        lambda: RebuildPayload.parse({"collection": name}, prefix).collection,
        lambda: (
            EmbedPayload.parse(
                Job(
                    "j",
                    "embedding_batch",
                    "t",
                    "p",
                    {"ids": [], "texts": [], "collection": name},
                    {},
                    "",
                    "s",
                    "1",
                    0,
                ),
                prefix,
            ).collection
        ),
    ):
        try:
            answers.append(read())
        except PermanentError as error:
            answers.append(str(error))
    assert answers[0] == answers[1]


def test_builtin_collection_names_work_with_every_prefix() -> None:
    assert plain_name("story_segments", "story_") == "story_segments"
    assert plain_name("story_story_segments", "story_") == "story_segments"


def test_an_unknown_collection_or_model_is_a_permanent_error() -> None:
    world = World(0)
    with pytest.raises(PermanentError):
        world.rebuild(collection="nothing")
    with pytest.raises(PermanentError):
        world.rebuild(model="/no/such/model")


def test_an_entity_is_embedded_from_its_name_and_description() -> None:
    entity = EntityRow("e", OLD.encode(["x"])[0], "t", "p", name="Bao", description="a poet")
    assert embedded_text(entity._asdict()) == "Bao\na poet"
    assert embedded_text(entity._replace(description="")._asdict()) == "Bao"


# ---- pure functions


@pytest.mark.parametrize(("source", "target"), [("a_v1", "a_v2"), ("a_v9", "a_v10"), ("other", "a_v2")])
def test_the_version_in_the_name_is_incremented(source: str, target: str) -> None:
    assert next_collection("a", source, lambda name: False) == target


def test_existing_names_are_skipped() -> None:
    assert next_collection("a", "a_v1", {"a_v2", "a_v3", "a_v5"}.__contains__) == "a_v4"


@given(st.integers(1, 2000))
def test_a_sample_stays_small_and_spread(pages: int) -> None:
    sample: list[str] = []
    for page in range(pages):
        sample = thin_sample([*sample, str(page)])
    assert min(pages, rebuild.SAMPLE_ROWS // 2) <= len(sample) <= rebuild.SAMPLE_ROWS
    assert int(sample[-1]) >= pages // 2 - 1


@given(st.integers(0, 40), st.integers(1, 5), st.integers(1, 12), st.integers(0, 2**32))
def test_recall_equals_that_of_an_exact_search(rows: int, queries: int, limit: int, seed: int) -> None:
    random_ = np.random.default_rng(seed)
    vectors = random_.normal(size=(rows, 4)).astype(np.float32)
    asked = random_.normal(size=(queries, 4)).astype(np.float32)
    true = TrueScores(list(asked), limit)
    for start in range(0, rows, 7):
        true.add(list(vectors[start : start + 7]))
    norms = np.linalg.norm(asked, axis=1)[:, None] * np.linalg.norm(vectors, axis=1)[None]
    scores = asked @ vectors.T / norms
    best = [[(str(row), float(line[row])) for row in np.argsort(-line)[:limit]] for line in scores]
    assert true.recall(best) == 1.0
    if rows > limit:
        worst = [[(str(row), float(line[row])) for row in np.argsort(line)[:1]] for line in scores]
        assert true.recall(worst) == 0.0
    if rows >= 2:
        assert true.recall([hits[:1] for hits in best]) == pytest.approx(1 / min(limit, rows), abs=0.5)
