"""The tutorial and the README's first steps, run as a reader would: every block, in order, in one shell."""

import os
import re
import shutil
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


def searches() -> str:
    """The two searches of the page on vectors, as one program for the store of the tutorial."""
    (ours, direct) = [text for language, text in blocks("docs/vectors.md") if "search(" in text]
    address = '"http://root:TOKEN@127.0.0.1:19530"'
    assert address in ours
    assert address in direct
    direct = direct.replace("story_time >= 10", "story_time >= 0").replace(
        'chapter_id == "c1"', 'chapter_id == ""'
    )
    program = (ours + direct).replace(address, "sys.argv[1]")
    return f"import sys\n{program}\nassert len(hits[0]) == 3, hits\n"


def jobs_by_shell() -> list[str]:
    """The programs of the page on producers that add a job to the stream."""
    (text,) = [text for language, text in blocks("docs/producers.md") if "END" in text]
    commands = [text, "wait_for grep -c HELLO shouted.txt"]
    if cli := shutil.which("redis-cli") or shutil.which("valkey-cli"):
        (text,) = [text for language, text in blocks("docs/producers.md") if "redis-cli" in text]
        commands.append(text.replace("redis-cli", cli))
    return commands


def test_waiting_for_a_service_that_has_ended_stops_with_its_log(tmp_path: Path) -> None:
    (block,) = [text for language, text in blocks("docs/tutorial.md") if "wait_for() {" in text]
    definition = block[: block.index("\njobworker-supervise")]
    ended = f"{definition}\necho 'no such module' > service.log\nsh -c 'exit 3' & wait_for false"
    done = subprocess.run(
        ["bash", "-c", ended], cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 1
    assert "no such module" in done.stderr


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
    (tmp_path / "searches.py").write_text(searches())
    stop = commands.pop()
    search = 'python -W error searches.py "$(jobworker url milvus)"'
    outputs = run_in_shell([*commands, *jobs_by_shell(), search, SEND_AND_WAIT, stop], tmp_path)
    assert re.search(r'"dead_letters": ?\[\]', outputs[-2])
    assert "The old keeper lit the lamp at dusk." in outputs[-3].splitlines()[0]
    assert len(expected) >= 7
    for number, text in expected.items():
        assert re.fullmatch(pattern(text), outputs[number], re.DOTALL), outputs[number]
