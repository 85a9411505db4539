"""Kills a process at every instruction of chosen files, one process each, and shows what is left."""

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

State = TypeVar("State")

#: More instructions than any action here has: a test that gets this far loops for ever.
MAX_STEPS = 20_000


def every_kill(
    prepare: Callable[[], State], act: Callable[[State], None], files: set[str], *, lines: bool = False
) -> Iterator[tuple[State, bool]]:
    """The state after a kill at the first, second, … instruction (or line) of ``act``, and last unkilled.

    ``prepare`` makes a fresh state in shared memory for each; ``act`` runs in a forked child, where only
    what it does in ``files`` (names without folder) counts. Yields the state, and whether ``act`` ended.
    """
    for step in range(MAX_STEPS):
        state = prepare()
        ended = not dies_at(step, lambda state=state: act(state), files, lines)  # type: ignore[misc]
        yield state, ended
        if ended:
            return
    raise AssertionError(f"not done after {MAX_STEPS} steps")


def dies_at(step: int, act: Callable[[], None], files: set[str], lines: bool) -> bool:
    """Run ``act`` in a child that kills itself at that step; False where it came to its end before."""
    pid = os.fork()
    if pid == 0:
        _in_the_child(step, act, files, lines)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL, f"ended by signal {os.WTERMSIG(status)}"
        return True
    assert os.waitstatus_to_exitcode(status) == 0, f"the action failed before step {step}"
    return False


def _in_the_child(step: int, act: Callable[[], None], files: set[str], lines: bool) -> None:
    status = 1
    try:
        sys.settrace(_killer(step, files, lines))
        act()
        sys.settrace(None)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _killer(step: int, files: set[str], lines: bool) -> Callable[..., Any]:
    left = step
    counted = "line" if lines else "opcode"

    def inside(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal left
        if event == counted:
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
        return inside

    def entered(frame: FrameType, event: str, argument: object) -> Any:
        if Path(frame.f_code.co_filename).name not in files:
            return None
        frame.f_trace_lines, frame.f_trace_opcodes = lines, not lines
        return inside

    return entered
