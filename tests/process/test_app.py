"""`--app` and `--reload` in the running service: functions run, and new code replaces old code."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.service import TESTS, Service, eventually, service

pytestmark = pytest.mark.process

HEAD = """
import asyncio, logging, os, time
from pathlib import Path
import msgspec
from jobworker.worker import Job, job

log = logging.getLogger("app")

class Text(msgspec.Struct):
    text: str
"""
SHOUT = """
@job("shout", timeout=60)
def shout(payload: Text, job: Job) -> None:
    log.info("shouted", extra={"text": payload.text.upper()})
"""
OTHERS = """
@job("whisper")
async def whisper(payload: Text) -> None:
    await asyncio.sleep(0)
    log.info("whispered", extra={"text": payload.text.lower()})

@job("count", max_batch=8)
def count(payloads: list[Text]) -> list[None]:
    log.info("counted", extra={"words": sum(len(one.text.split()) for one in payloads)})
    return [None] * len(payloads)

class Greet:
    job_type = "greet"

    def handle(self, job: Job) -> None:
        log.info("greeted", extra={"text": job.payload})
"""
GATE = """
@job("gate")
def gate(payload: str) -> None:
    log.info("waiting")
    while not Path(payload).exists():
        time.sleep(0.01)
    log.info("opened")
"""


@pytest.fixture
def module(tmp_path: Path) -> Path:
    """The file of the app's module, in a folder of its own."""
    file = tmp_path / "modules" / "my_app.py"
    file.parent.mkdir()
    return file


def run_app(tmp_path: Path, module: Path, **variables: str) -> Iterator[Service]:
    path = os.pathsep.join([str(TESTS), str(module.parent)])
    environment = {"PYTHONPATH": path, "JOBWORKER_APP": "my_app", "PYTHONDONTWRITEBYTECODE": "1", **variables}
    with service(tmp_path, {}, procs=1, environment=environment) as one:
        yield one


@pytest.fixture
def running(tmp_path: Path, module: Path) -> Iterator[Service]:
    module.write_text(HEAD + SHOUT + OTHERS)
    yield from run_app(tmp_path, module)


@pytest.fixture
def reloading(tmp_path: Path, module: Path) -> Iterator[Service]:
    module.write_text(HEAD + SHOUT + GATE)
    yield from run_app(tmp_path, module, JOBWORKER_RELOAD="1")


def test_functions_and_classes_of_an_app_run_and_bad_payloads_are_malformed(running: Service) -> None:
    for kind in ("shout", "whisper", "count"):
        running.enqueue(kind, {"text": "Two words"})
    running.enqueue("greet", "Ada")
    eventually(lambda: running.logged("shouted", text="TWO WORDS"))
    eventually(lambda: running.logged("whispered", text="two words"))
    eventually(lambda: running.logged("counted", words=2))
    eventually(lambda: running.logged("greeted", text="Ada"))
    for kind in ("shout", "whisper", "count"):
        letter = running.dead_letter(running.enqueue(kind, {"text": 5}))
        assert letter["reason"] == "malformed"
        assert letter["error"] == "MalformedPayload: Expected `str`, got `int` - at `$.payload.text`"
        assert letter["task"]["payload"] == {"text": 5}
        labels = {"task_type": kind, "reason": "malformed"}
        eventually(lambda labels=labels: running.metric("z_novel_jobs_dead_total", **labels) == 1)  # type: ignore[misc]
    assert len(running.logged("shouted")) == 1
    (starting,) = running.logged("supervisor.starting")
    assert starting["settings"]["handlers"]["shout"] == "my_app:shout"


def test_a_changed_file_restarts_the_workers_and_the_running_job_finishes(
    reloading: Service, module: Path, tmp_path: Path
) -> None:
    gate = tmp_path / "open"
    reloading.enqueue("gate", str(gate))
    eventually(lambda: reloading.logged("waiting"))
    module.write_text(HEAD + SHOUT.replace("upper()", "upper() + '!'") + GATE.replace('"opened"', '"new"'))
    eventually(lambda: reloading.logged("reload.changed"))
    eventually(lambda: reloading.logged("restart.begun"))
    eventually(lambda: len(reloading.logged("child.ready", child="worker 0")) == 2)
    reloading.enqueue("shout", {"text": "a"})
    gate.touch()
    eventually(lambda: reloading.logged("shouted", text="A!"))
    eventually(lambda: reloading.logged("opened"), saying="the old code finishes its job")
    assert not reloading.logged("new")
    reloading.wait_until_drained()
    assert reloading.dead_letters() == []


def test_a_syntax_error_keeps_the_old_workers_and_another_type_restarts_the_service(
    reloading: Service, module: Path
) -> None:
    supervisor, worker = reloading.roles()["supervisor"], reloading.roles()["worker 0"]
    module.write_text(HEAD + SHOUT + GATE + "def broken(:\n")
    (failed,) = eventually(lambda: reloading.logged("reload.failed"))
    assert "SyntaxError" in failed["error"]
    assert "my_app.py" in json.dumps(failed)
    reloading.enqueue("shout", {"text": "a"})
    eventually(lambda: reloading.logged("shouted", text="A"))
    assert reloading.roles()["worker 0"] == worker
    module.write_text(HEAD + SHOUT + GATE + OTHERS)
    eventually(lambda: reloading.logged("reload.types_changed", types=["count", "greet", "whisper"]))
    eventually(lambda: len(reloading.logged("service.ready")) == 2)
    assert reloading.roles()["supervisor"] == supervisor
    reloading.enqueue("whisper", {"text": "B"})
    eventually(lambda: reloading.logged("whispered", text="b"))
