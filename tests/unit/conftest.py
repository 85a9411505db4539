"""Fixtures of the unit tests."""

from collections.abc import Iterator
from typing import Any

import pytest

from support.runner_rig import Make, RunnerRig


@pytest.fixture
def make_rig() -> Iterator[Make]:
    """Makes workers in this process, and closes them after the test."""
    made: list[RunnerRig] = []

    def make(linger_s: float = 0.0, **handlers: Any) -> RunnerRig:
        made.append(RunnerRig(linger_s, **handlers))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rebuild reads and writes in small steps, so that a few rows take many."""
    from jobworker.handlers.rebuild import rebuild  # here: most unit tests do without it

    monkeypatch.setattr(rebuild, "PAGE_ROWS", 20)
    monkeypatch.setattr(rebuild, "MIN_PAGE_ROWS", 20)
    monkeypatch.setattr(rebuild, "CHANGED_ROWS", 7)
    monkeypatch.setattr(rebuild, "REMAINING_ROWS", 3)
