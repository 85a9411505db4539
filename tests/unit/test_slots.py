"""Slots and standbys: why a slot is not ready, and how many warm processes wait."""

from collections.abc import Iterator
from itertools import pairwise

import pytest

from jobworker.worker.ipc.channel import Channel
from jobworker.worker.ipc.control import Standby
from jobworker.worker.settings import Settings
from jobworker.worker.supervision.slots import STANDBYS, Slot, Standbys, state
from support.fake_children import FakeChild

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


def new_child(children: list[FakeChild], now: float = 1000.0) -> FakeChild:
    children.append(FakeChild(now))
    return children[-1]


def standbys_of(children: list[FakeChild]) -> Standbys:
    return Standbys(lambda now: new_child(children, now))


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


def test_standbys_start_one_after_another_only_while_wanted(children: list[FakeChild]) -> None:
    standbys = standbys_of(children)
    standbys.maintain(SETTINGS, 1000.0, wanted=False)
    assert list(standbys) == []
    standbys.maintain(SETTINGS, 1000.0, wanted=True)
    standbys.maintain(SETTINGS, 1000.1, wanted=True)
    assert len(list(standbys)) == 1, "the first is at its imports"
    for step in range(5):
        standbys.maintain(SETTINGS, 1001.0 + step, wanted=True)
    assert len(list(standbys)) == STANDBYS
    first, second = (child.received() for child in children)
    assert isinstance(first[0], Standby)
    assert isinstance(second[0], Standby)
    assert (first[0].number, second[0].number, first[0].instance) == (0, 1, "one")


def test_the_oldest_standby_is_taken_and_replaced(children: list[FakeChild]) -> None:
    standbys = standbys_of(children)
    for now in (1000.0, 1001.0):
        standbys.maintain(SETTINGS, now, wanted=True)
    assert standbys.take() is children[0]
    standbys.maintain(SETTINGS, 1002.0, wanted=True)
    assert standbys.take() is children[1]
    assert standbys.take() is children[2]
    assert standbys.take() is None


def test_standbys_that_exit_are_replaced_after_a_growing_pause(children: list[FakeChild]) -> None:
    standbys = standbys_of(children)
    starts = []
    for tick in range(1000):
        now = 1000.0 + tick * 0.1
        before = len(children)
        standbys.maintain(SETTINGS, now, wanted=True)
        if len(children) > before:
            starts.append(now)
            children[-1].exit("exit 1")
    pauses = [after - before for before, after in pairwise(starts)]
    assert pauses[-1] > 10
    assert all(child.closed for child in children[:-1])
