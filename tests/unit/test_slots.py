"""Slots: why a slot is not ready."""

from collections.abc import Iterator

import pytest

from jobworker.worker.ipc.channel import Channel
from jobworker.worker.settings import Settings
from jobworker.worker.supervision.slots import Slot, state
from support.fake_children import FakeChild, FakeServer

SETTINGS = Settings(instance="one")


@pytest.fixture
def children() -> Iterator[list[FakeChild]]:
    """Every child that the test made; closed afterwards."""
    made: list[FakeChild] = []
    yield made
    for child in made:
        if not child.closed:
            child.close()
        child.peer.close()


def new_child(children: list[FakeChild]) -> FakeChild:
    children.append(FakeChild(FakeServer(), "worker", 0, 1, SETTINGS, 1000.0))
    return children[-1]


def test_a_slot_gives_the_reason_why_it_is_not_ready(children: list[FakeChild]) -> None:
    reader, worker = Slot("reader"), Slot("worker", 3)
    assert reader.reasons() == ["no reader"]
    assert worker.reasons() == ["worker 3 is starting"]
    reader.child = new_child(children)
    assert reader.reasons() == ["no reader"]
    reader.child.ready, reader.child.name = True, "reader"
    assert reader.reasons() == []
    reader.child.trouble = "Redis does not answer"
    assert reader.reasons() == ["reader: Redis does not answer"]


def test_a_worker_that_starts_needs_an_operator_only_if_it_fails_again_and_again(
    children: list[FakeChild],
) -> None:
    slot = Slot("worker", 3)
    assert slot.is_restarting()
    slot.backoff.record_exit(10.0, was_ready=True, lived_s=1.0)
    assert slot.is_restarting()
    slot.backoff.record_exit(10.0, was_ready=False, lived_s=1.0)
    assert not slot.is_restarting()
    slot.child = new_child(children)
    slot.child.ready = True
    assert not slot.is_restarting()
    assert not Slot("reader").is_restarting()


def test_a_worker_is_starting_then_idle_busy_or_stopping(children: list[FakeChild]) -> None:
    assert state(None) == "starting"
    child = new_child(children)
    child.channel = Channel.create(1024)
    assert state(child) == "starting"
    child.become_ready()
    child.ready = True
    assert state(child) == "idle"
    child.channel.set_running(1.0, 2.0)
    assert state(child) == "busy"
    child.leave()
    assert state(child) == "stopping"
    child.channel.close()
