"""Fork guard: a forked child that leaves a handler ends, and never becomes a second worker."""

import subprocess
import sys
from pathlib import Path

import pytest

#: Prints one line for each process that gets out of the harness. ``fork`` prints the child's exit code.
PROGRAM = """
import asyncio, os, sys
from jobworker.worker.testing import Harness

def fork(how):
    child = os.fork()
    if child:
        os.write(1, b"exit %d\\n" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    elif how == "raise":
        raise ValueError("in the child")
    elif how.startswith("exit"):
        sys.exit(int(how[4:]) if how[4:] else None)

class Single:
    def handle(self, job): fork(job.payload)

class Batch:
    def handle_batch(self, jobs):
        fork(jobs[0].payload)
        return [None] * len(jobs)

class Async:
    async def handle(self, job):
        await asyncio.sleep(0)
        fork(job.payload)
        await asyncio.sleep(0)

print("a buffered line")
harness = Harness({"a": {"single": Single, "batch": Batch, "async": Async}[sys.argv[1]]})
for n in range(3):
    harness.enqueue("a", sys.argv[2])
harness.run()
os.write(1, b"out %d\\n" % len(harness.completed))
"""


@pytest.mark.parametrize("kind", ["single", "batch", "async"])
@pytest.mark.parametrize(
    ("how", "code"), [("return", 1), ("raise", 1), ("exit", 0), ("exit0", 0), ("exit3", 3)]
)
def test_a_forked_child_ends_when_it_leaves_the_handler(
    tmp_path: Path, kind: str, how: str, code: int
) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    ran = subprocess.run(
        [sys.executable, program, kind, how], capture_output=True, text=True, timeout=60, check=True
    )
    lines = sorted(ran.stdout.splitlines())
    forks = 1 if kind == "batch" else 3
    assert lines == ["a buffered line", *[f"exit {code}"] * forks, "out 3"]
    assert ran.stderr.count("handler.forked_child_ended") == forks
    assert ran.stderr.count("ValueError: in the child") == forks * (how == "raise")
