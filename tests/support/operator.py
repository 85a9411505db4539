"""The command ``jobworker`` in tests: run in this process or in a pseudo-terminal."""

import fcntl
import json
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from jobworker.worker.cli import main
from support.redis_servers import RedisServer
from support.service import Service

COMMAND = Path(sys.executable).parent / "jobworker"
#: Timeout of a command, on a busy machine.
COMMAND_S = 50.0


def url_of(store: RedisServer | Service) -> str:
    """The url of the store, or of the store of a service."""
    return store.url if isinstance(store, RedisServer) else store.redis_url


def run(store: RedisServer | Service, *arguments: str, code: int = 0, stdin: str = "") -> Result:
    """Run a verb and check its exit code."""
    result = CliRunner().invoke(main, [*arguments], input=stdin, env={"JOBWORKER_REDIS_URL": url_of(store)})
    assert result.exit_code == code, (result.output, result.exception)
    return result


def run_json(store: RedisServer | Service, *arguments: str, code: int = 0, stdin: str = "") -> Any:
    """Run a verb with ``--json``; its answer."""
    return json.loads(run(store, *arguments, "--json", code=code, stdin=stdin).stdout)


def findings(store: RedisServer | Service, *arguments: str, code: int) -> dict[str, list[str]]:
    """The findings of ``doctor`` by level. Every wrong one must name a remedy."""
    report = run_json(store, "doctor", *arguments, code=code)
    assert report["ok"] == (code == 0)
    by_level: dict[str, list[str]] = {"ok": [], "note": [], "wrong": []}
    for one in report["findings"]:
        by_level[one["level"]].append(f"{one['subject']}: {one['says']}")
        assert one["do"] or one["level"] != "wrong", one
    return by_level


class Terminal:
    """A command in a terminal of 80 x 24: sends keys and waits for text."""

    def __init__(self, command: list[str], store: RedisServer | Service, **environment: str) -> None:
        addresses = {"JOBWORKER_REDIS_URL": url_of(store)}
        if isinstance(store, Service):
            addresses["JOBWORKER_METRICS_URL"] = store.url
        self._command = command
        self._environment = {**os.environ, **addresses, "TERM": "xterm", "LANG": "C.UTF-8", **environment}
        self._drawn = b""

    def __enter__(self) -> "Terminal":
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self._popen = subprocess.Popen(
            self._command, stdin=theirs, stdout=theirs, stderr=theirs, env=self._environment
        )
        os.close(theirs)
        return self

    def __exit__(self, *_: object) -> None:
        self._popen.kill()
        self._popen.wait(COMMAND_S)
        os.close(self._ours)

    def press(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def wait_for(self, *texts: str) -> None:
        """Wait until all texts were drawn since the last call."""
        give_up_at = time.monotonic() + COMMAND_S
        while not all(text.encode() in self._drawn for text in texts):
            left_s = give_up_at - time.monotonic()
            assert select.select([self._ours], [], [], max(0, left_s))[0], (texts, self._drawn[-3000:])
            self._drawn += os.read(self._ours, 65536)
        self._drawn = b""

    def wait(self) -> int:
        """Wait for the end; the exit code. Output is read meanwhile: a full terminal would block it."""
        give_up_at = time.monotonic() + COMMAND_S
        while self._popen.poll() is None and time.monotonic() < give_up_at:
            if select.select([self._ours], [], [], 0.05)[0]:
                try:
                    os.read(self._ours, 65536)
                except OSError:  # the command has closed the terminal
                    break
        return self._popen.wait(COMMAND_S)
