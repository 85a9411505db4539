"""An entry that ends the reader, in a real service with a planted fault: only that entry is dead-lettered."""

import base64
import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.service import STREAM, TESTS, Service, ending, eventually, handlers

pytestmark = pytest.mark.process

#: Python runs a module of this name at each start, of the forkserver too. Only the reader reads routes.
FAULT = """
import os, signal
if "_JOBWORKER_FORKSERVER" in os.environ:
    from jobworker.worker import envelope
    real = envelope._decode_route
    def decode_route(data):
        if b"SIGSEGV" in data or b"SIGKILL" in data:
            os.kill(os.getpid(), signal.SIGSEGV if b"SIGSEGV" in data else signal.SIGKILL)
        while b"spin" in data:
            pass
        if b"raise" in data:
            raise RuntimeError("planted")
        return real(data)
    envelope._decode_route = decode_route
"""


@contextlib.contextmanager
def deadly(tmp_path: Path) -> Iterator[Service]:
    """A ready service with the fault."""
    (tmp_path / "fault").mkdir()
    (tmp_path / "fault" / "sitecustomize.py").write_text(FAULT)
    python_path = os.pathsep.join([str(tmp_path / "fault"), str(TESTS), os.environ.get("PYTHONPATH", "")])
    one = Service(tmp_path, handlers("Noop"), environment={"PYTHONPATH": python_path})
    with ending(one):
        yield one.start()


def reader_ends(one: Service) -> list[str]:
    """The log lines of readers that ended unasked."""
    return [
        line for line in one.log_text.splitlines() if '"msg":"child.exited"' in line and '"reader"' in line
    ]


@pytest.mark.parametrize(("how", "most_deaths"), [("SIGSEGV", 2), ("raise", 2), ("SIGKILL", 6)])
def test_an_entry_that_ends_the_reader_is_given_up_and_the_others_are_run(
    tmp_path: Path, how: str, most_deaths: int
) -> None:
    with deadly(tmp_path) as one:
        jobs = [{"type": "noop", "id": f"job-{number}"} for number in range(40)]
        killer = {"type": "noop", "id": "killer", "payload": how}
        ids = one.enqueue_many([*jobs[:20], killer, *jobs[20:]])
        one.wait_until_drained(60)
        assert {event.id for event in one.events("end")} == set(ids) - {"killer"}
        (letter,) = one.dead_letters()
        assert (letter["reason"], letter["task"]) == ("poison", None)
        assert json.loads(base64.b64decode(letter["raw"]))["id"] == "killer"
        assert 1 <= len(reader_ends(one)) <= most_deaths
        one.enqueue("noop", id="after")
        one.wait_for_end("after")
        assert one.terminate() == 0


def test_an_entry_that_keeps_the_reader_busy_for_ever_does_so_once(tmp_path: Path) -> None:
    with deadly(tmp_path) as one:
        one.enqueue("noop", "spin", id="killer")
        letter = one.dead_letter(str(one.client.xrange(STREAM)[0][0], "ascii"), within_s=60)
        assert letter["reason"] == "poison"
        one.enqueue("noop", id="after")
        one.wait_for_end("after")
        eventually(lambda: len(reader_ends(one)) == 1)
        assert "stuck" in reader_ends(one)[0]
