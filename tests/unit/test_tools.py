"""The programs that tests need are fetched or named as missing, and ``make help`` lists every target."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from support.tools import BY_CONSTRUCTION, untested, use_fetched, why_missing

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ["redis-server", "prometheus", "promtool", "chromium", "initdb", "pg_ctl", "postgres",
            "systemd-analyze", "zstdcat", "jq"]  # fmt: skip
#: What the script itself runs.
SHELL_TOOLS = ["bash", "cat", "cut", "grep", "mkdir", "mv", "realpath", "rm", "tail", "timeout"]


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """The folder of all programs of a machine without any tool, its PATH; PostgreSQL may be there anyway."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in SHELL_TOOLS:
        (folder / name).symlink_to(str(shutil.which(name)))
    return folder


def fetch(machine: Path, venv: Path) -> list[str]:
    """Run the script on this machine; its lines."""
    venv.mkdir(exist_ok=True)
    done = subprocess.run(
        ["bash", ROOT / "scripts/fetch-tools.sh", venv], env={"PATH": str(machine)},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return [line for line in done.stdout.splitlines() if "postgresql" not in line]


def test_nothing_is_fetched_where_all_programs_are_there(machine: Path, tmp_path: Path) -> None:
    for name in PROGRAMS:
        script(machine / name, "exit 0")
    assert fetch(machine, tmp_path / "venv") == []
    assert list((tmp_path / "venv").iterdir()) == []


def test_each_tool_that_cannot_be_had_is_one_line_and_no_error(machine: Path, tmp_path: Path) -> None:
    lines = fetch(machine, tmp_path / "venv")
    assert [line.split(":")[0] for line in lines] == [
        "== no redis-server", "== no prometheus", "== no chromium", "== no systemd", "== no zstd", "== no jq",
    ]  # fmt: skip
    assert "this is no Debian" in lines[0]
    assert not list((tmp_path / "venv/debian/bin").iterdir())


def test_the_reason_of_a_machine_without_network_reaches_the_skipped_tests(
    machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(machine / "dpkg-deb", "exit 1")
    script(machine / "apt-get", "echo \"$*\" >>$(realpath $0).calls; echo 'W: Failed to fetch it'; exit 100")
    fetch(machine, tmp_path / "venv")
    monkeypatch.setattr("support.tools.FETCHED", tmp_path / "venv/debian")
    reason = "cannot fetch package lists: Failed to fetch it"
    assert why_missing("chromium", "no-such-program") == f"chromium: {reason}"
    # One download and one update for all tools: each further one would wait for the network, too.
    assert len((machine / "apt-get.calls").read_text().splitlines()) == 2


def test_a_tool_that_came_later_is_not_called_missing(machine: Path, tmp_path: Path) -> None:
    fetch(machine, tmp_path / "venv")
    script(machine / "jq", "exit 0")
    assert not any("jq" in line for line in fetch(machine, tmp_path / "venv"))
    assert not (tmp_path / "venv/debian/missing/jq").exists()


def test_fetched_programs_come_before_those_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("support.tools.FETCHED", tmp_path)
    monkeypatch.setenv("PATH", os.environ["PATH"])
    (tmp_path / "bin").mkdir()
    script(tmp_path / "bin/jq", "exit 0")
    use_fetched()
    assert shutil.which("jq") == str(tmp_path / "bin/jq")
    assert why_missing("jq", "jq") is None


def test_one_line_names_what_is_not_tested() -> None:
    reasons = [
        "GPU: no device",
        "b: offline",
        "GPU: no device",
        "a: offline",
        f"{BY_CONSTRUCTION}memory",
        "?",
    ]
    assert untested(reasons) == (
        "not tested here: ? (1 test); GPU (2 tests): no device; a (1 test), b (1 test): offline"
    )
    assert untested([f"{BY_CONSTRUCTION}memory"]) == ""


def test_help_lists_every_target() -> None:
    # `make test` runs this inside make, which would announce the folder of a make below it.
    command = ["make", "--no-print-directory", "help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert targets is not None
    listed = [line.split()[1] for line in done.stdout.splitlines()]
    assert sorted(listed) == sorted(targets[1].split())
