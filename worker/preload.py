"""Modules that the forkserver imports once: every child shares their pages and starts in milliseconds.

Outside a forkserver the import has no other effect. In one, `FORKSERVER_VARIABLE` holds the process id of the
supervisor and the title, and the import also prepares the process. No module here starts a thread, opens a
connection, or loads a library that does not survive fork (torch, tokenizers, gRPC).
"""

import codecs
import gc
import os
import secrets
import signal

import setproctitle

from .. import worker
from . import boot, reaper, runner
from .devices import device_for_slot, visible_gpus
from .host.process_env import open_standard_streams
from .reader import reader
from .settings import settings_class
from .store.redis import reader as reader_store
from .store.redis import reaper as reaper_store
from .supervision import guard
from .supervision.forkserver import FORKSERVER_VARIABLE, GROUP_SIGNALS, SAFE_PATH, SAFE_PATH_VARIABLE
from .supervision.pdeathsig import tie_to_parent
from .telemetry.log import configure

#: The public names: handlers use them.
_PUBLIC = [getattr(worker, name) for name in worker.__all__]
#: What the roles and the store's client import when they first use it.
_LAZY = (codecs.lookup("idna"), secrets)

__all__ = ["boot", "guard", "reader", "reader_store", "reaper", "reaper_store", "runner"]


def _prepare(parent_pid: int, log_level: str, title: str) -> None:
    """Make this process the forkserver of the supervisor ``parent_pid``."""
    tie_to_parent(parent_pid)
    setproctitle.setproctitle(title)
    open_standard_streams()
    if os.environ.get(SAFE_PATH_VARIABLE) == SAFE_PATH:
        del os.environ[SAFE_PATH_VARIABLE]
    # A terminal or service manager signals every process; only the supervisor decides what that means.
    for number in GROUP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, GROUP_SIGNALS)
    # What every child does once is done here, so that it finds the modules imported and the caches filled.
    settings = settings_class()(log_level=log_level)
    settings.from_json(settings.to_json())
    device_for_slot(settings.device, 0, visible_gpus())
    configure("forkserver", settings, os.environ)
    # The roles make many short-lived objects and no cycles: looking for cycles this rarely costs nothing.
    gc.set_threshold(50_000, 20, 50)
    # The collector of a child would write to the shared pages. A run of it here would leave holes, which the
    # children fill.
    gc.freeze()


if _parent := os.environ.pop(FORKSERVER_VARIABLE, ""):
    _pid, _level, _title = _parent.split(" ", 2)
    _prepare(int(_pid), _level, _title)
