"""The systemd units: the template equals the service, and the sandbox is tight."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from jobworker.supervisor import main
from jobworker.worker.errors import Exit
from support.tools import why_missing

SYSTEMD = Path(__file__).resolve().parents[2] / "systemd"
UNIT = SYSTEMD / "jobworker.service"
NO_SYSTEMD = why_missing("systemd", "systemd-analyze")


def settings(unit: Path) -> list[str]:
    lines = (line.strip() for line in unit.read_text().splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def test_the_template_is_the_service_under_another_name() -> None:
    named = {
        "Description=jobworker:": "Description=jobworker %i:",
        "/etc/jobworker/jobworker.": "/etc/jobworker/%i.",
        "StateDirectory=jobworker": "StateDirectory=jobworker-%i",
    }
    expected = []
    for line in settings(UNIT):
        for ours, theirs in named.items():
            line = line.replace(ours, theirs) if "StateDirectoryMode" not in line else line
        expected.append(line + " --instance %i" if line.startswith("ExecStart=") else line)
    assert settings(SYSTEMD / "jobworker@.service") == expected


def test_a_restart_is_not_tried_where_it_cannot_help() -> None:
    assert f"RestartPreventExitStatus={Exit.USAGE:d}" in settings(UNIT)


def test_the_unit_waits_longer_than_the_service() -> None:
    limits = {name: float(value) for name, value in re.findall(r"(\w+Sec)=(\d+)$", UNIT.read_text(), re.M)}
    drain = next(one.default for one in main.params if one.name == "drain_timeout")
    assert limits["TimeoutStopSec"] > float(drain) + 10
    assert limits["WatchdogSec"] >= 30


def test_the_example_of_an_environment_names_options_that_exist() -> None:
    text = (SYSTEMD / "jobworker.env.example").read_text()
    names = re.findall(r"^#JOBWORKER_(\w+)=", text, re.M)
    assert names
    assert [line for line in text.splitlines() if not line.startswith("#")] == [], "a copy changes nothing"
    assert {name.lower() for name in names} <= {parameter.name for parameter in main.params}


@pytest.mark.skipif(NO_SYSTEMD is not None, reason=str(NO_SYSTEMD))
@pytest.mark.parametrize(("drop_in", "most"), [(False, 10), (True, 13)], ids=["cpu", "gpu"])
def test_little_is_exposed(tmp_path: Path, drop_in: bool, most: int) -> None:
    """As `systemd-analyze security` counts: tenths, of 100."""
    unit = Path(shutil.copy(UNIT, tmp_path))  # by itself: beside it here is the drop-in
    if drop_in:
        extra = (SYSTEMD / "jobworker.service.d/gpu.conf").read_text()
        unit.write_text(unit.read_text().replace("[Install]", extra.replace("[Service]", "") + "[Install]"))
    command = [
        "systemd-analyze",
        "security",
        "--offline=true",
        "--no-pager",
        f"--threshold={most}",
        str(unit),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, [*done.stdout.splitlines()[-1:], done.stderr]
