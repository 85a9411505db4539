"""Stamps the hand-overs of a job inside the service: for ``bench/latency.py --trace``.

Python imports this file at its start where the folder is on PYTHONPATH. It waits until the forkserver has
imported the roles, and then wraps the functions that end a step. Each call appends ``<step> <monotonic ns>``
to one file, so the program itself has no code for it.
"""

import functools
import importlib.abc
import importlib.machinery
import os
import sys
import time
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

_LAST_IMPORTED = "jobworker.worker.preload"


def _stamp(step: str) -> None:
    # One short write to a file in append mode is whole, whichever processes share the file.
    os.write(_fd, b"%s %d\n" % (step.encode(), time.monotonic_ns()))


def _wrap(owner: Any, name: str, before: str = "", after: str = "") -> None:
    original: Callable[..., Any] = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if before:
            _stamp(before)
        result = original(*args, **kwargs)
        if after:
            _stamp(after)
        return result

    setattr(owner, name, wrapped)


def _wrap_steps() -> None:
    from jobworker.worker.ipc.channel import Channel
    from jobworker.worker.reader.dispatch import WorkerHandle
    from jobworker.worker.reader.intake import Intake
    from jobworker.worker.reader.settlement_sender import SettlementSender
    from jobworker.worker.runner import Runner

    _wrap(Intake, "on_read_ready", before="reader_woke")
    _wrap(Intake, "_finish_read", after="reader_parsed")
    _wrap(Intake, "_admit", after="reader_admitted")
    _wrap(WorkerHandle, "dispatch", after="reader_pushed")
    _wrap(Channel, "wait_for_jobs", after="worker_woke")
    _wrap(Runner, "_run_next", before="worker_decoded", after="worker_finished")
    _wrap(SettlementSender, "_settle", before="reader_collected", after="reader_settled")


class _AfterImport(importlib.abc.MetaPathFinder):
    """Wraps the steps after the last module is imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _LAST_IMPORTED:
            return None
        sys.meta_path.remove(self)
        import importlib.util

        spec = importlib.util.find_spec(name)
        if spec and spec.loader:
            loader: Any = spec.loader
            run = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                # Before it: the module ends by freezing what is imported.
                _wrap_steps()
                run(module)

            loader.exec_module = exec_module
        return spec


if _path := os.environ.get("BENCH_HANDOVERS", ""):
    _fd = os.open(_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    sys.meta_path.insert(0, _AfterImport())
