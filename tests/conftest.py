"""Set-up of every run: order of tests, no network for models, Hypothesis profile, no child left behind."""

import contextlib
import gc
import os
import signal
import time
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

from support.tools import REAL_MILVUS, untested, use_fetched

#: How long a child that was told to end may take to be gone from the process table.
CHILD_GRACE_S = 20.0

#: Python's own helpers of multiprocessing live as long as the interpreter that started them.
HELPERS = (b"multiprocessing.resource_tracker", b"multiprocessing.forkserver")

#: Descriptors that one file of tests may leave open, say those of a library that it is the first to load.
MOST_LEFT_OPEN = 40

# Children inherit it: a test that reached for a model hub would depend on another server.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# Before any test module is imported: some look for their programs at import.
use_fetched()

# Collection makes many objects that stay: the collector would go through them again and again.
gc.disable()

# A shell that puts the suite into the background has it ignore interrupts, and so would every child.
signal.signal(signal.SIGINT, signal.default_int_handler)

# No deadline an example and no example database: a slow machine is no bug, and tests leave nothing behind.
settings.register_profile("jobworker", deadline=None, database=None, print_blob=True)
settings.load_profile("jobworker")


#: Files whose tests import torch: one process pays the 5 s of CPU for it.
TORCH = ("test_model_zoo", "test_openvino", "test_encoder", "test_sparse", "test_devices", "test_packed_bert",
         "test_unknown_tokens", "test_cuda")  # fmt: skip
TORCH_FILES = frozenset(f"tests/unit/{name}.py" for name in TORCH)

#: Folders and files with the longest tests, the longest first: what starts last must be short.
LONG_FIRST = ("tests/chaos/", "tests/process/", "tests/unit/test_bench.py", "tests/store/", "tests/unit/")


def file_of(nodeid: str) -> str:
    """The file of a test."""
    return nodeid.partition("::")[0]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of a real Milvus first, then those with torch, then long files before short ones."""

    def rank(item: pytest.Item) -> int:
        if REAL_MILVUS in item.nodeid:
            return -2
        if file_of(item.nodeid) in TORCH_FILES:
            return -1
        return next(
            (at for at, path in enumerate(LONG_FIRST) if item.nodeid.startswith(path)), len(LONG_FIRST)
        )

    items.sort(key=rank)


def pytest_collection_finish() -> None:
    """From here on, the collector looks only at what tests make."""
    gc.freeze()
    gc.enable()


class ByFile(LoadFileScheduling):
    """Side by side (`-n 4`), the tests of a file share its servers, and those of a real Milvus that one."""

    def _split_scope(self, nodeid: str) -> str:
        # Its etcd listens on a fixed port: a second one would not start beside it.
        if REAL_MILVUS in nodeid:
            return REAL_MILVUS
        return "torch" if file_of(nodeid) in TORCH_FILES else super()._split_scope(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByFile:
    """The hook of pytest-xdist that says which tests go together."""
    return ByFile(config, log)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Generator[None, None, None]:
    """Ends the output, after pytest's own lists, with what this machine could not test."""
    yield
    skipped = [report.longrepr for report in terminalreporter.stats.get("skipped", ())]
    reasons = [where[2].removeprefix("Skipped: ") for where in skipped if isinstance(where, tuple | list)]
    if line := untested(reasons):
        terminalreporter.write_line(line, yellow=True)


def living_children() -> dict[int, str]:
    """Children of this process that still run, by process id, less Python's own helpers."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            after_name = (entry / "stat").read_text().rpartition(")")[2].split()
            command = (entry / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue  # ended while we looked
        runs = int(after_name[1]) == os.getpid() and after_name[0] not in "ZX"
        if runs and not any(helper in command for helper in HELPERS):
            found[int(entry.name)] = command.replace(b"\0", b" ").decode(errors="replace").strip()
    return found


#: What was open when the tests of the present file began.
_OPEN_BEFORE = pytest.StashKey[Counter[str]]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(
    item: pytest.Item, nextitem: pytest.Item | None
) -> Generator[None, object, object]:
    """Note what is open before the first test of a file."""
    if _OPEN_BEFORE not in item.config.stash:
        item.config.stash[_OPEN_BEFORE] = descriptors()
    return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, None, None]:
    """Fail after a file whose tests leave many descriptors open: select() takes none above 1023."""
    yield
    if nextitem is not None and nextitem.path == item.path:
        return
    before = item.config.stash[_OPEN_BEFORE]
    del item.config.stash[_OPEN_BEFORE]
    if (descriptors() - before).total() > MOST_LEFT_OPEN:
        gc.collect()
        left = descriptors() - before
        assert left.total() <= MOST_LEFT_OPEN, f"{item.path.name} leaves open: {left.most_common(9)}"


def descriptors() -> Counter[str]:
    """What this process has open, by file or kind."""
    found = Counter[str]()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            found[os.readlink(entry)] += 1
    return found


@pytest.fixture(scope="session", autouse=True)
def no_child_left_behind() -> Iterator[None]:
    """The suite fails at its end if a process that a test started still runs."""
    before = living_children()
    yield
    deadline = time.monotonic() + CHILD_GRACE_S
    while (left := living_children().keys() - before.keys()) and time.monotonic() < deadline:
        time.sleep(0.05)  # the process table has no event to wait on for children of others' Popen objects
    assert not left, f"still running: {living_children()}"
