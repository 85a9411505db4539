"""Handler of `entity_upsert`: one row an entity, with the versions of `embedding_batch`."""

from typing import Any

import numpy as np
import pytest

from jobworker.handlers.embedding.handler import EmbeddingBatch, EntityUpsert
from jobworker.handlers.encoder.base import DummyEncoder
from jobworker.handlers.jobstore.memory_fence import MemoryFence
from jobworker.handlers.settings import HandlerSettings
from jobworker.handlers.vectors.memory import MemoryVectors
from jobworker.handlers.vectors.ports import EntityRow
from jobworker.handlers.vectors.schema import TEXT_LIMIT_BYTES, entity_row_id
from jobworker.worker import Job, PermanentError

ENTITIES = "entity_profiles"
CREATED = "2026-01-02T00:00:00Z"


class World:
    def __init__(self) -> None:
        self.store, self.fence = MemoryVectors(), MemoryFence()
        self.upsert = EntityUpsert(DummyEncoder(8), self.store, self.fence)
        self.upsert.setup(HandlerSettings())

    def send(self, *entities: dict[str, Any], job: str = "j", project: str = "p", **more: Any) -> None:
        payload = {"entities": list(entities), **more}
        self.upsert.handle(Job(job, "entity_upsert", "t", project, payload, {}, CREATED, "s", "1-0", 0))

    def rows(self, project: str = "p") -> dict[str, EntityRow]:
        rows = self.store._rows["z_novel_entity_profiles"].values()
        return {
            row.entity_id: row for row in rows if isinstance(row, EntityRow) and row.project_id == project
        }


def entity(id_: str, name: str = "Ann", **more: Any) -> dict[str, Any]:
    return {"entity_id": id_, "name": name, **more}


def test_every_field_reaches_its_row_and_the_vector_is_that_of_name_and_description() -> None:
    world = World()
    world.send(
        entity("e1", "安", entity_type="person", description="keeps the light"), entity("e2"), version=4
    )
    first, second = world.rows().values()
    assert (first.id, *first[2:8], first.version) == (
        *(entity_row_id("t", "p", "e1", "profile:"), "t", "p", "e1", "person", "安", "keeps the light"),
        4,
    )
    assert second[4:8] == ("e2", "", "Ann", "")
    expected = DummyEncoder(8).encode(["安\nkeeps the light", "Ann"])
    assert np.array_equal([first.vector, second.vector], expected)


def test_the_same_entity_of_another_project_is_another_row() -> None:
    world = World()
    world.send(entity("e1"))
    world.send(entity("e1", "Bob"), project="q")
    assert (world.rows()["e1"].name, world.rows("q")["e1"].name) == ("Ann", "Bob")


def test_an_older_version_overwrites_nothing_in_any_order() -> None:
    world = World()
    for version in (2, 3, 1, 2):
        world.send(entity("e1", f"v{version}"), job=f"j{version}", version=version)
    world.send(entity("e2", "old"), version=1)
    assert {id_: row.name for id_, row in world.rows().items()} == {"e1": "v3", "e2": "old"}


def test_replace_removes_older_entities_but_not_those_found_in_chapters_or_of_others() -> None:
    world = World()
    found = EntityRow("entity:x", np.ones(8, np.float32), "t", "p", "name-x", version=1)
    world.store.upsert(ENTITIES, [found])
    world.send(entity("e1"), project="q", version=1)
    world.send(entity("e1"), entity("e2"), version=1)
    world.send(entity("e2"), entity("e3"), version=2, replace=True, job="second")
    assert set(world.rows()) == {"name-x", "e2", "e3"}
    world.send(entity("e1"), version=1)
    assert set(world.rows()) == {"name-x", "e2", "e3"}
    assert set(world.rows("q")) == {"e1"}


def test_a_long_description_is_clipped_and_its_vector_covers_all_of_it() -> None:
    world = World()
    text = "夜" * 30_000
    world.send(entity("e1", description=text))
    row = world.rows()["e1"]
    assert len(row.description.encode()) == TEXT_LIMIT_BYTES
    assert np.array_equal(row.vector, DummyEncoder(8).encode(["Ann\n" + text])[0])


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        ({}, "payload lacks entities"),
        ({"entities": {}}, "entities must be a list"),
        ({"entities": ["e1"]}, r"entities\[0\] must be an object"),
        ({"entities": [{"name": "Ann"}]}, r"entities\[0\].entity_id must be a string that matches"),
        (
            {"entities": [entity("e1"), {"entity_id": "e2"}]},
            r"entities\[1\].name must be a string of 1 to 256",
        ),
        ({"entities": [entity("e1", "")]}, "name must be"),
        ({"entities": [entity("e1", "名" * 86)]}, "name must be"),
        ({"entities": [entity("e1", entity_type="x" * 33)]}, "entity_type must be a string of at most 32"),
        ({"entities": [entity("e1", description=7)]}, "description must be a string"),
        ({"entities": [entity("e1")], "version": "1"}, "version must be a 64-bit integer"),
        ({"entities": [entity("e1")], "replace": True}, "replace needs version"),
        ({"entities": [], "replace": True, "version": 1}, "at least one entity"),
        ({"entities": [], "tenant_id": "other"}, "tenant_id of the payload"),
    ],
)
def test_a_payload_that_breaks_a_rule_is_permanent(payload: dict[str, Any], words: str) -> None:
    job = Job("j", "entity_upsert", "t", "p", payload, {}, "", "s", "1-0", 0)
    with pytest.raises(PermanentError, match=words):
        World().upsert.handle(job)


def test_absent_texts_may_be_null_and_no_entities_are_a_success() -> None:
    world = World()
    world.send(entity("e1", entity_type=None, description=None))
    world.send()
    assert world.rows()["e1"][4:8] == ("e1", "", "Ann", "")


def test_two_types_in_one_process_count_together() -> None:
    encoder = DummyEncoder(8)
    handlers = [type_(encoder, MemoryVectors(), MemoryFence()) for type_ in (EmbeddingBatch, EntityUpsert)]
    for handler in handlers:
        handler.setup(HandlerSettings())
        texts = {"ids": ["a"], "texts": ["x"], "entities": [entity("e1")]}
        handler.handle(Job("j", "any", "t", "p", texts, {}, "", "s", "1-0", 0))
    assert handlers[0].counters is handlers[1].counters
    assert handlers[0].counters["embedded_tokens"] > 1
