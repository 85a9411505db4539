"""Programs that scripts/fetch-tools.sh fetches for tests: where they are, and why one is missing."""

import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

FETCHED = Path(sys.prefix) / "debian"

#: Skip reasons that start with this text are correct on every machine; the others name something missing.
BY_CONSTRUCTION = "by construction: "

#: What a test's parameter says where it needs the real server.
REAL_MILVUS = "milvus-2.3.5"


def use_fetched() -> None:
    """Let this process and its children find the fetched programs, before the machine's own."""
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    if str(FETCHED / "bin") not in folders:
        os.environ["PATH"] = os.pathsep.join([str(FETCHED / "bin"), *folders])
    if (node := FETCHED / "bin/playwright-node").exists():
        os.environ.setdefault("PLAYWRIGHT_NODEJS_PATH", str(node))


def why_missing(tool: str, *programs: str) -> str | None:
    """The skip reason for tests that run these programs of a tool; None if all of them are in PATH."""
    if all(map(shutil.which, programs)):
        return None
    try:
        reason = (FETCHED / "missing" / tool).read_text().strip()
    except FileNotFoundError:
        reason = "run scripts/fetch-tools.sh .venv"
    return f"{tool}: {reason}"


def untested(reasons: Iterable[str]) -> str:
    """One line about skipped tests, from a skip reason per test; empty if all were skipped by construction.

    A reason names what is missing before a colon, as in "GPU: no CUDA device".
    """
    missing = Counter(reason for reason in reasons if not reason.startswith(BY_CONSTRUCTION))
    by_cause: dict[str, list[str]] = {}
    for reason, count in sorted(missing.items()):
        what, _, cause = reason.partition(": ")
        by_cause.setdefault(cause, []).append(f"{what} ({count} test{'s' if count > 1 else ''})")
    named = [f"{', '.join(what)}: {cause}" if cause else ", ".join(what) for cause, what in by_cause.items()]
    return f"not tested here: {'; '.join(named)}" if named else ""
