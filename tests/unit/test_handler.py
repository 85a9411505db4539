"""Handlers of every documented shape, found by name and set up once."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from jobworker.worker import ConfigurationError, Handler, Job, Settings
from jobworker.worker.handler import BoundHandler, load_handlers

MODULE = """
from jobworker.worker import PermanentError

class Single:
    timeout = 2.5
    def handle(self, job): pass

class Batch:
    max_batch = 7
    counters = {"texts": 0}
    def __init__(self): self.setups = []
    def setup(self, settings): self.setups.append(settings)
    def handle_batch(self, jobs): return [None if job.id == "good" else ValueError(job.id) for job in jobs]
    def healthy(self): raise ConnectionError("away")

class Neither:
    pass

class NeedsArguments:
    def __init__(self, where): pass
    def handle(self, job): pass

class Broken:
    def setup(self, settings): raise OSError("disk full")
    def handle(self, job): pass
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A user's file in the folder where the service was started."""
    name = f"handlers_of_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return name


def load(**handlers: str) -> dict[str, BoundHandler]:
    return load_handlers(Settings(handlers=handlers, job_timeout_s=300.0))


def job(id: str = "good") -> Job:
    return Job(id, "t", "", "", None, {}, "", "s", "1-1", 0)


def test_a_handler_beside_the_start_folder_is_found(module: str) -> None:
    bound = load(shout=f"{module}:Single")["shout"]
    assert (bound.kind, bound.timeout_s, bound.max_batch, bound.handle_batch) == ("shout", 2.5, 1, None)
    assert (bound.healthy, dict(bound.counters)) == (None, {})


def test_what_a_handler_leaves_out_has_a_default(module: str) -> None:
    bound = load(b=f"{module}:Batch")["b"]
    assert (bound.timeout_s, bound.max_batch) == (300.0, 7)
    assert bound.healthy is not None
    with pytest.raises(ConnectionError):
        bound.healthy()


def test_a_handler_with_batches_only_can_run_one_job(module: str) -> None:
    bound = load(b=f"{module}:Batch")["b"]
    bound.handle(job())
    with pytest.raises(ValueError, match="bad"):
        bound.handle(job("bad"))


def test_one_class_for_two_types_is_made_and_set_up_once(module: str) -> None:
    loaded = load(a=f"{module}:Batch", b=f"{module}:Batch", c=f"{module}:Single")
    first, second = (handler_of(loaded[kind]) for kind in "ab")
    assert first is second
    assert len(first.setups) == 1
    assert first.setups[0].handlers.keys() == {"a", "b", "c"}


def handler_of(bound: BoundHandler) -> Any:
    return bound.handle_batch.__self__  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("no_such_module_at_all:Shout", "no_such_module_at_all"),
        ("{module}:Shout", "Shout"),
        ("{module}:Neither", "neither handle"),
    ],
)
def test_what_cannot_be_a_handler_is_a_clear_error(module: str, target: str, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        load(t=target.format(module=module))


def test_what_setup_raises_passes_through(module: str) -> None:
    with pytest.raises(OSError, match="disk full"):
        load(t=f"{module}:Broken")


def test_the_protocol_is_what_the_documentation_shows() -> None:
    class Shout:
        def handle(self, job: Job) -> None:
            """Runs it."""

    class Silent:
        def run(self, jobs: Sequence[Job]) -> None:
            """No handler."""

    assert isinstance(Shout(), Handler)
    assert not isinstance(Silent(), Handler)
