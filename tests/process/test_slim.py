"""An installation without extras: engine, command line and Producer work without model and Milvus."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.operator import COMMAND
from support.redis_servers import running
from support.service import COMMAND as SERVICE
from support.service import TESTS, handlers, service
from support.slim import SITECUSTOMIZE

pytestmark = pytest.mark.process

#: What a base installation must not need.
HEAVY = ("torch", "pymilvus", "numpy", "sentence_transformers", "httpx2", "tqdm")


@pytest.fixture
def slim(tmp_path: Path) -> dict[str, str]:
    """Environment variables with which every Python process is without extras."""
    folder = tmp_path / "slim"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(TESTS)])}


def run(slim: dict[str, str], *command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env={**os.environ, **slim}, capture_output=True, text=True, timeout=60, check=False
    )


def test_the_imitation_hides_the_heavy_packages(slim: dict[str, str]) -> None:
    code = f"""
for name in {HEAVY!r}:
    try:
        __import__(name)
    except ModuleNotFoundError:
        print(name)
"""
    assert run(slim, sys.executable, "-c", code).stdout.split() == list(HEAVY)


def test_every_module_of_the_engine_can_be_imported(slim: dict[str, str]) -> None:
    code = """
import importlib, pkgutil
import jobworker.handlers, jobworker.handlers.audit.handler, jobworker.supervisor, jobworker.worker
optional = ("worker.web.", "worker.cli.web", "worker.http.server", "worker.telemetry.otel")
for found in pkgutil.walk_packages(jobworker.worker.__path__, "jobworker.worker."):
    if not any(name in found.name for name in optional):
        importlib.import_module(found.name)
"""
    done = run(slim, sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr


def test_a_service_with_handlers_of_ones_own_and_the_audit_archive_runs(
    slim: dict[str, str], tmp_path: Path
) -> None:
    folders = [tmp_path / name for name in ("store", "service")]
    for folder in folders:
        folder.mkdir()
    toys = handlers("Noop") | {"audit": "jobworker.handlers.audit.handler:Archive"}
    with (
        running("valkey", folders[0]) as store,
        service(folders[1], toys, environment=slim, redis_url=store.url) as one,
    ):
        one.enqueue("noop", {})
        one.enqueue("audit", {"who": "me"})
        one.wait_until_drained()
        verbs = (["stats"], ["doctor"], ["explain", "x"], ["url"], ["enqueue", "noop"], ["dlq", "list"])
        for verb in verbs:
            done = run(slim, COMMAND, *verb, "--redis-url", store.url)
            assert "No module named" not in done.stderr + done.stdout
            assert "Traceback" not in done.stderr
        one.wait_until_drained()
        assert one.dead_letters() == []


def test_built_in_types_without_their_extra_exit_2_with_the_way_to_install_it(
    slim: dict[str, str], tmp_path: Path
) -> None:
    done = run(slim, SERVICE, "--data-dir", tmp_path / "data", "--redis-url", "redis://127.0.0.1:1")
    assert done.returncode == 2
    assert "'embedding'" in done.stderr
    assert "--no-builtin-handlers" in done.stderr
    assert "Traceback" not in done.stderr
