"""Typed bases of handlers: a user's code passes mypy --strict, and mistakes in it are found."""

import subprocess
import sys
from pathlib import Path

import pytest

from jobworker.worker import BatchHandler, Job, JobHandler
from jobworker.worker.testing import Harness

ROOT = Path(__file__).resolve().parents[2]

GOOD = """
import asyncio
from collections.abc import Sequence

from jobworker.worker import BatchHandler, Job, JobHandler, PermanentError, Settings


class Shout(JobHandler):
    timeout = 60.0

    def setup(self, settings: Settings) -> None:
        self.folder = settings.data_dir
        self.counters = {"words": 0}

    def healthy(self) -> None:
        if not self.folder:
            raise ConnectionError("no folder")

    def handle(self, job: Job) -> None:
        if not isinstance(job.payload, str):
            raise PermanentError("the payload must be a text")


class Greet(JobHandler):
    async def setup(self, settings: Settings) -> None:
        self.lock = asyncio.Lock()

    async def handle(self, job: Job) -> None:
        async with self.lock:
            await asyncio.sleep(0)


class Count(BatchHandler):
    max_batch = 64
    max_batch_bytes = 1e6
    batch_timeout = 120.0
    alone = True

    def handle_batch(self, jobs: Sequence[Job]) -> list[BaseException | None]:
        return [None for job in jobs]


class Fetch(BatchHandler):
    async def handle_batch(self, jobs: Sequence[Job]) -> list[BaseException | None]:
        await asyncio.sleep(0)
        return [None] * len(jobs)


class Plain:
    def handle(self, job: Job) -> None:
        print(job.id)
"""

GOOD_FUNCTIONS = """
import asyncio
import dataclasses
from collections.abc import Mapping
from typing import Any, TypedDict

import msgspec
import pydantic

from jobworker.worker import Job, Settings, job


class Text(msgspec.Struct):
    text: str


@dataclasses.dataclass
class Data:
    text: str


class Model(pydantic.BaseModel):
    text: str


class Entry(TypedDict):
    text: str


async def connect(settings: Settings) -> None:
    await asyncio.sleep(0)


@job("struct", timeout=60, max_timeout=600.0, alone=True, setup=connect)
def of_struct(payload: Text) -> None: ...


@job("dataclass")
async def of_dataclass(payload: Data, job: Job) -> None: ...


@job("model")
def of_model(payload: Model) -> str:
    return payload.text


@job("typeddict")
def of_typeddict(payload: Entry) -> None: ...


@job("dict")
def of_dict(payload: dict[str, Any]) -> None: ...


@job("union")
def of_union(payload: Text | None) -> None: ...


@job("number")
def of_number(payload: int) -> None: ...


@job("any")
def of_any(payload: Any) -> None: ...


@job("job")
async def of_job(job: Job) -> None: ...


@job("batch", max_batch=32, max_batch_bytes=1e6, batch_timeout=60)
def of_batch(payloads: list[Text]) -> list[BaseException | None]:
    return [None for one in payloads]


@job("batch-of-jobs", max_batch=32)
async def of_batch_of_jobs(payloads: list[Text], jobs: list[Job]) -> list[None]:
    return [None for one in payloads]


@job("default")
def of_default(payload: Text, job: Job | None = None, *, loud: bool = False) -> None: ...


of_struct(Text("a"))
asyncio.run(of_dataclass(Data("a"), Job("1", "dataclass", "", "", None, {}, "", "", "", 0)))
word: str = of_model(Model(text="a"))
"""

BAD_FUNCTIONS = {
    "a payload that is no data": "@job('a')\ndef f{}(payload: threading.Event) -> None: ...",
    "a payload of functions": "@job('a')\ndef f{}(payload: Callable[[], None], job: Job) -> None: ...",
    "a second parameter that is no job": "@job('a')\ndef f{}(payload: Text, job: int) -> None: ...",
    "three parameters": "@job('a')\ndef f{}(payload: Text, job: Job, more: int) -> None: ...",
    "no parameter": "@job('a')\ndef f{}() -> None: ...",
    "a field that the payload lacks": "@job('a')\ndef f{}(payload: Text) -> None:\n    print(payload.name)",
    "a timeout that is text": "@job('a', timeout='60')\ndef f{}(payload: Text) -> None: ...",
    "a type that is no text": "@job(5)\ndef f{}(payload: Text) -> None: ...",
    "an unknown option": "@job('a', retries=3)\ndef f{}(payload: Text) -> None: ...",
    "a call with another payload": "@job('a')\ndef f{}(payload: Text) -> None: ...\nf{}('text')",
}

BAD = {
    "a timeout that is text": "    timeout = '60'\n    def handle(self, job: Job) -> None: ...",
    "a batch size that is text": (
        "    max_batch = 'many'\n    def handle_batch(self, jobs: Sequence[Job]) -> list[None]: return []"
    ),
    "a job of another type": "    def handle(self, job: int) -> None: ...",
    "setup without settings": "    def setup(self) -> None: ...\n    def handle(self, job: Job) -> None: ...",
}


def checked(tmp_path: Path, source: str) -> str:
    """What mypy --strict says of a module of a user; empty where it has nothing to say."""
    # mypy does not follow editable installs: it sees the root folder under its import name by this link.
    (tmp_path / "typing").mkdir(exist_ok=True)
    link = tmp_path / "typing" / "jobworker"
    if not link.exists():
        link.symlink_to(ROOT)
    module = tmp_path / "user_jobs.py"
    module.write_text(source)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mypy", "--strict", "--namespace-packages", "--explicit-package-bases"),
            *("--follow-imports", "silent", "--config-file", "", "--cache-dir", str(tmp_path / "cache")),
            "user_jobs.py",
        ],
        cwd=tmp_path, env={"MYPYPATH": str(tmp_path / "typing"), "PATH": ""}, capture_output=True, text=True,
        timeout=110, check=False,
    )  # fmt: skip
    assert not done.stderr
    return "" if done.returncode == 0 else done.stdout


def test_a_users_handlers_pass_mypy_strict_and_mistakes_are_found(tmp_path: Path) -> None:
    assert checked(tmp_path, GOOD) == ""
    head = (
        "from collections.abc import Sequence\nfrom jobworker.worker import BatchHandler, Job, JobHandler\n"
    )
    wrong = [
        f"class Wrong{number}({'BatchHandler' if 'batch' in name else 'JobHandler'}):\n{body}\n"
        for number, (name, body) in enumerate(BAD.items())
    ]
    said = checked(tmp_path, head + "".join(wrong))
    lines = (head + "".join(wrong)).splitlines()
    starts = [number for number, line in enumerate(lines, 1) if line.startswith("class ")] + [len(lines) + 1]
    errors = [int(line.split(":")[1]) for line in said.splitlines() if ": error:" in line]
    for name, first, last in zip(BAD, starts, starts[1:], strict=False):
        assert any(first <= line < last for line in errors), f"{name} is not found: {said}"


def test_mypy_strict_finds_a_wrong_payload_annotation_of_a_function(tmp_path: Path) -> None:
    assert checked(tmp_path, GOOD_FUNCTIONS) == ""
    source = (
        "import threading\nfrom collections.abc import Callable\nimport msgspec\n"
        "from jobworker.worker import Job, job\nclass Text(msgspec.Struct):\n    text: str\n"
    )
    starts = []
    for number, body in enumerate(BAD_FUNCTIONS.values()):
        starts.append(source.count("\n") + 1)
        source += body.replace("{}", str(number)) + "\n"
    said = checked(tmp_path, source)
    errors = [int(line.split(":")[1]) for line in said.splitlines() if ": error:" in line]
    for name, first, last in zip(BAD_FUNCTIONS, starts, [*starts[1:], 1000], strict=True):
        assert any(first <= line < last for line in errors), f"{name} is not found: {said}"


def test_the_bases_run_like_plain_classes() -> None:
    class One(JobHandler):
        def handle(self, job: Job) -> None:
            assert not hasattr(self, "timeout")

    class Many(BatchHandler):
        def handle_batch(self, jobs: list[Job]) -> list[None]:  # type: ignore[override]
            return [None] * len(jobs)

    with Harness({"one": One, "many": Many}) as harness:
        for kind in ("one", "many", "many"):
            harness.enqueue(kind, 1)
        harness.run()
        assert len(harness.completed) == 3


def test_a_base_without_its_method_cannot_be_made() -> None:
    with pytest.raises(TypeError, match="handle"):
        JobHandler()  # type: ignore[abstract]
