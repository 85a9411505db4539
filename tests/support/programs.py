"""Runs one of the programs beside this file, in a process of its own, and gives its last line."""

import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
#: A program that forks hundreds of times on a machine that does other things too.
WITHIN_S = 90


def run(program: str, *arguments: str) -> str:
    """``python -m support.PROGRAM ARGUMENTS``; fails with all it said where it fails."""
    command = [sys.executable, "-m", f"support.{program}", *arguments]
    ended = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, timeout=WITHIN_S)
    assert ended.returncode == 0, f"{' '.join(command[1:])}: exit {ended.returncode}\n{ended.stderr[-4000:]}"
    return ended.stdout.strip().rpartition("\n")[2]
