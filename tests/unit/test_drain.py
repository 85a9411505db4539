"""Drain of a reader whose store does not answer: it ends, unless an outcome waits to be settled."""

from collections.abc import Iterator
from typing import Any

import pytest

from jobworker.worker.errors import StoreUnavailable
from jobworker.worker.ipc.control import Drain, ExitReclaimed
from support.reader_rig import ReaderRig, reader_rig

#: Cycles of one second: a reader that waits for the store tries again.
CYCLES = 20


@pytest.fixture
def rig() -> Iterator[ReaderRig]:
    with reader_rig() as rig:
        yield rig


class Outage:
    """Every call of a rig's store fails until `end`."""

    def __init__(self, rig: ReaderRig) -> None:
        self._store = rig.store
        self._names = [
            name for name in dir(rig.store)
            if not name.startswith("_")
            and name not in ("close", "abandon_reads")
            and callable(getattr(rig.store, name))
        ]  # fmt: skip
        for name in self._names:
            setattr(rig.store, name, self._fail)

    @staticmethod
    def _fail(*_: Any, **__: Any) -> Any:
        raise StoreUnavailable("away")

    def end(self) -> None:
        """Let the store answer again."""
        for name in self._names:
            delattr(self._store, name)


def drain(rig: ReaderRig, *, charge: bool = False) -> None:
    """Request a drain; the worker exits."""
    rig.control.send(Drain())
    rig.exit(rig.workers[0], "exit 0", charge=charge)
    for _ in range(CYCLES):
        rig.advance(1.0)


def test_it_ends_if_nothing_runs(rig: ReaderRig) -> None:
    Outage(rig)
    rig.advance(1.0)
    drain(rig)
    assert rig.reader.drained
    rig.reader.run()
    rig.receive()
    assert ExitReclaimed(0, 1) in rig.messages


def test_jobs_that_were_not_started_stay_pending(rig: ReaderRig) -> None:
    rig.add("1", "2")
    rig.tick()
    rig.workers[0].take()
    outage = Outage(rig)
    rig.advance(1.0)
    drain(rig)
    assert rig.reader.drained
    outage.end()
    assert rig.pending == 2


@pytest.mark.parametrize("charge", [False, True])
def test_an_outcome_waits_for_the_store(rig: ReaderRig, charge: bool) -> None:
    rig.add("1")
    rig.tick()
    rig.workers[0].take()
    rig.workers[0].start("1")
    if not charge:
        rig.workers[0].succeed("1")
    outage = Outage(rig)
    rig.advance(1.0)
    drain(rig, charge=charge)
    assert not rig.reader.drained
    outage.end()
    rig.advance(10.0)
    assert rig.reader.drained
    assert rig.metric("z_novel_jobs_completed_total", "a") == (not charge)
