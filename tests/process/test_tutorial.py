"""The tutorial and the README's first steps, run as a reader would: every block, in order, in one shell."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.process, pytest.mark.model, pytest.mark.timeout(400)]

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
#: Printed between the outputs of two blocks.
MARK = "-- end of block --"
WITHIN_S = 300
SEND_AND_WAIT = r"""python -W error readme.py
while jobworker stats --json | grep -q '"\(queued\|pending\|retrying\)": [1-9]'; do sleep 1; done
jobworker dlq list --json"""


def blocks(page: str) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = BLOCK.findall((ROOT / page).read_text("utf-8"))
    return found


def run_in_shell(commands: list[str], folder: Path) -> list[str]:
    """Run the commands in one shell and return what each printed. Whatever they started ends with it."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("JOBWORKER_")}
    environment |= {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]]),
        "JOBWORKER_METRICS_ADDR": "127.0.0.1:0",  # other services of the suite may have the default port
    }
    script = "set -m -e\ntrap 'jobs -p | xargs -r kill || true; wait' EXIT\n"
    script += "".join(f"{command}\necho '{MARK}'\n" for command in commands)
    command = ["timeout", "--foreground", str(WITHIN_S), "bash", "-c", script]
    with open(folder / "stderr.txt", "w") as errors:
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            check=False,
        )
    log = folder / "service.log"
    told = (folder / "stderr.txt").read_text() + (log.read_text()[-3000:] if log.exists() else "")
    assert done.returncode == 0, done.stdout + told
    return done.stdout.split(f"{MARK}\n")[:-1]


def pattern(expected: str) -> str:
    """A regular expression for an output in which … stands for anything."""
    return ".*".join(re.escape(part) for part in expected.split("…"))


def test_every_block_of_the_tutorial_and_the_first_job_of_the_readme_run(tmp_path: Path) -> None:
    commands: list[str] = []
    expected: dict[int, str] = {}
    for language, text in blocks("docs/tutorial.md"):
        if language == "python":
            (tmp_path / text.splitlines()[0].removeprefix("# ")).write_text(text)
        elif language == "sh":
            commands.append(text)
        else:
            assert language == "text"
            expected[len(commands) - 1] = text
    (send,) = [text for language, text in blocks("README.md") if language == "python" and "Producer(" in text]
    (tmp_path / "readme.py").write_text(send)
    stop = commands.pop()
    outputs = run_in_shell([*commands, SEND_AND_WAIT, stop], tmp_path)
    assert '"dead_letters":[]' in outputs[-2]
    assert len(expected) >= 7
    for number, text in expected.items():
        assert re.fullmatch(pattern(text), outputs[number], re.DOTALL), outputs[number]
