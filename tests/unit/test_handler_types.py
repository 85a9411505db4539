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
