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
