"""The server around Milvus Lite keeps every acknowledged row, however it ends."""

import contextlib
import random
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobworker.handlers.vectors.milvus.client import MilvusClientHandle
from jobworker.handlers.vectors.milvus.lite_server import FlushGate, serialised
from jobworker.handlers.vectors.milvus.store import (
    MilvusVectors,
    Row,
    TransientStoreError,
    VectorStore,
    VectorStoreError,
    open_vectors,
)
from support import milvus_writer
from support.milvus import LITE_START_S, LiteServer, lite_server, wait_until

NAME = "story_segments"
DIM = 32
# A flush each few hundred rows: faults show around flushes.
SMALL_MEMTABLE = {"MILVUS_LITE_MEMTABLE_MEMORY_LIMIT_BYTES": "200000"}
WAIT_S = 60.0


class Writer:
    """A process that writes; `acknowledged` is how many rows it was told are in."""

    def __init__(self, uri: str, name: str, batches: int, size: int) -> None:
        self.name = name
        command = [sys.executable, milvus_writer.__file__, uri, name, str(batches), str(size), str(DIM)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.acknowledged = 0
        self.progress = threading.Condition()
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self.progress:
                self.acknowledged = int(line)
                self.progress.notify_all()

    def wait_for(self, rows: int) -> None:
        with self.progress:
            assert self.progress.wait_for(lambda: self.acknowledged >= rows, WAIT_S), self.acknowledged

    def finish(self, *, kill: bool = False) -> None:
        """Let it end, or kill it; then `acknowledged` is final."""
        if kill:
            self.process.kill()
        self.process.wait(WAIT_S)
        self.reader.join(WAIT_S)
        assert self.process.stdout is not None
        self.process.stdout.close()


def missing(store: VectorStore, name: str, rows: int) -> set[str]:
    """Ids of the first `rows` rows of a writer that are not there."""
    ids = [f"{name}-{number}" for number in range(rows)]
    return set(ids) - {row.id for row in store.get(NAME, ids, tenant_id="tenant", project_id=name)}


def rows_of(first: int, count: int) -> list[Row]:
    vectors = np.random.default_rng(first).normal(size=(count, DIM)).astype(np.float32)
    return [Row(f"w-{first + i}", vectors[i], "tenant", "w", text_content="夜" * 200) for i in range(count)]


def write_rows(uri: str, name: str) -> None:
    """Write 1,000 rows over a connection of its own."""
    store = open_vectors(uri)
    store.ensure_collection(NAME, DIM)
    for batch in range(40):
        rows = enumerate(rows_of(batch, 25), start=batch * 25)
        store.upsert(NAME, [row._replace(id=f"{name}-{n}", project_id=name) for n, row in rows])
    store.close()


def test_four_writers_and_a_kill_lose_no_acknowledged_row(tmp_path: Path) -> None:
    # All rows stay in the log until the kill: a record that two writers tore hides all that come after it.
    env = {"MILVUS_LITE_MEMTABLE_MEMORY_LIMIT_BYTES": str(2**27)}
    with lite_server(tmp_path / "data", env=env) as server:
        names, uri = [f"w{i}" for i in range(4)], server.uri
        with ThreadPoolExecutor(len(names)) as threads:
            for done in [threads.submit(write_rows, uri, name) for name in names]:
                done.result(WAIT_S)
        server.kill()
    with lite_server(tmp_path / "data") as server:
        store = open_vectors(server.uri)
        lost = {name: len(missing(store, name, 1000)) for name in names}
        assert not any(lost.values()), lost
        assert store.count(NAME) == 4000
        store.close()


def test_kills_while_rows_come_in_lose_no_acknowledged_row(tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    moment = random.Random(seed)
    acknowledged = {}
    for round_number in range(2):
        with lite_server(tmp_path / "data", env=SMALL_MEMTABLE) as server:
            writer = Writer(server.uri, f"k{round_number}", 1000, 20)
            writer.wait_for(moment.randrange(60, 500))
            server.kill()
            writer.finish(kill=True)
            acknowledged[writer.name] = writer.acknowledged
    with lite_server(tmp_path / "data") as server:
        store = open_vectors(server.uri)
        lost = {name: missing(store, name, rows) for name, rows in acknowledged.items()}
        store.close()
    assert not any(lost.values()), f"seed {seed}: {lost}"


def test_an_index_file_that_a_kill_left_half_written_is_rebuilt(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    with lite_server(data_dir, env=SMALL_MEMTABLE) as server:
        store = open_vectors(server.uri)
        store.ensure_collection(NAME, DIM)
        store.upsert(NAME, rows_of(0, 400))
        store.upsert(NAME, rows_of(400, 400))
        wait_until(lambda: any(data_dir.rglob("*.idx")), WAIT_S, "an index on the disk")
        store.close()
    torn = list(data_dir.rglob("*.idx"))
    for path in torn:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with lite_server(data_dir) as server:
        assert server.stderr.count("lite.index_rebuilt") == len(torn) > 0
        store = open_vectors(server.uri)
        assert not missing(store, "w", 800)
        found = store.search(NAME, rows_of(0, 1)[0].vector, limit=1, tenant_id="tenant", project_id="w")
        assert [hit.id for hit in found] == ["w-0"]
        store.close()


FULL_DISK = """
    import sys, builtins
    from jobworker.handlers.vectors.milvus import lite_server
    from milvus_lite.engine import collection
    from milvus_lite.storage import wal

    fail_at, where = int(sys.argv.pop()), sys.argv.pop()
    seen = 0

    def full(original):
        def call(*args, **kwargs):
            global seen
            seen += 1
            if seen >= fail_at:
                raise OSError(28, "No space left on device")
            return original(*args, **kwargs)
        return call

    if where == "flush":
        collection.execute_flush = full(collection.execute_flush)
    else:
        wal.WAL.write_insert = full(wal.WAL.write_insert)
    lite_server.main()
"""


class FullDiskServer(LiteServer):
    """A server whose disk is full from the given flush or log write on."""

    def __init__(self, data_dir: Path, where: str, fail_at: int) -> None:
        super().__init__(
            data_dir,
            env=SMALL_MEMTABLE,
            program=["-c", textwrap.dedent(FULL_DISK)],
            arguments=[where, str(fail_at)],
        )


@pytest.mark.parametrize(("where", "fail_at"), [("flush", 2), ("log", 7)])
def test_a_full_disk_ends_the_server_and_loses_no_acknowledged_row(
    tmp_path: Path, where: str, fail_at: int
) -> None:
    server = FullDiskServer(tmp_path / "data", where, fail_at)
    acknowledged = 0
    try:
        store = open_vectors(server.wait_ready().uri)
        store.ensure_collection(NAME, DIM)
        with contextlib.suppress(TransientStoreError):
            while acknowledged < 5000:
                store.upsert(NAME, rows_of(acknowledged, 50))
                acknowledged += 50
        store.close()
        assert server.process.wait(WAIT_S) == 74
    finally:
        server.kill()
    assert "No space left" in server.stderr
    assert 0 < acknowledged < 5000
    with lite_server(tmp_path / "data") as again:
        store = open_vectors(again.uri)
        assert not missing(store, "w", acknowledged)
        store.close()


SLOW_FLUSH = """
    import time
    from jobworker.handlers.vectors.milvus import lite_server
    from milvus_lite.engine import collection

    class SlowLog(collection.WAL):
        # Made in the middle of a flush: the rows are gone from memory and not yet in a segment.
        def __init__(self, *args, **kwargs):
            time.sleep(0.05)
            super().__init__(*args, **kwargs)

    collection.WAL = SlowLog
    lite_server.main()
"""


def test_no_reader_misses_a_row_during_a_flush(tmp_path: Path) -> None:
    program, env = ["-c", textwrap.dedent(SLOW_FLUSH)], {"MILVUS_LITE_MEMTABLE_MEMORY_LIMIT_BYTES": "20000"}
    server = LiteServer(tmp_path / "data", program=program, env=env)
    try:
        store = open_vectors(server.wait_ready().uri)
        store.ensure_collection(NAME, DIM)
        store.upsert(NAME, rows_of(0, 20))
        writer = Writer(server.uri, "busy", 15, 20)
        with ThreadPoolExecutor(3) as threads:
            readers = [threads.submit(read_while, store, writer) for _ in range(3)]
            while writer.process.poll() is None:
                store.upsert(NAME, rows_of(0, 20))
            counts = {count for reader in readers for count in reader.result(WAIT_S)}
        writer.finish()
        store.close()
    finally:
        server.kill()
    assert counts == {20}


def read_while(store: VectorStore, writer: Writer) -> list[int]:
    """How many of the twenty rows each read found, until the writer has ended."""
    ids, counts = [f"w-{number}" for number in range(20)], []
    while writer.process.poll() is None:
        counts.append(len(store.get(NAME, ids, tenant_id="tenant", project_id="w")))
    return counts


def test_a_signal_stops_it_cleanly(tmp_path: Path) -> None:
    for count, number in enumerate((signal.SIGTERM, signal.SIGINT), start=1):
        with lite_server(tmp_path / "data") as server:
            store = open_vectors(server.uri)
            store.ensure_collection(NAME, DIM)
            store.upsert(NAME, rows_of(count * 10, 5))
            store.close()
            server.process.send_signal(number)
            assert server.process.wait(WAIT_S) == 0
            assert not server.port_file.exists()
            assert "Traceback" not in server.stderr
    with lite_server(tmp_path / "data") as server:
        store = open_vectors(server.uri)
        # Loaded although no client asked for it.
        found = store.search(NAME, rows_of(0, 1)[0].vector, tenant_id="tenant", project_id="w", limit=20)
        assert len(found) == 10
        store.close()


def one_line_and_code(server: LiteServer) -> tuple[int, str]:
    code = server.process.wait(LITE_START_S)
    lines = [line for line in server.stderr.splitlines() if line.startswith("lite_server:")]
    assert len(lines) == 1, server.stderr
    assert "Traceback" not in server.stderr
    return code, lines[0]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiteServer]:
    with lite_server(tmp_path_factory.mktemp("shared") / "data") as shared:
        yield shared


def test_a_data_directory_serves_one(server: LiteServer, tmp_path: Path) -> None:
    second = LiteServer(server.data_dir, files=tmp_path / "second")
    code, line = one_line_and_code(second)
    assert code == 2
    assert "in use by another process" in line
    assert str(server.data_dir) in line


def test_a_port_serves_one(server: LiteServer, tmp_path: Path) -> None:
    second = LiteServer(tmp_path / "other", port=server.port)
    code, line = one_line_and_code(second)
    assert code == 2
    assert f"port {server.port}" in line


def test_another_release_of_the_engine_is_rejected(tmp_path: Path) -> None:
    program = """
        import importlib.metadata
        from jobworker.handlers.vectors.milvus import lite_server
        importlib.metadata.version = lambda name: "3.3.0"
        lite_server.main()
    """
    server = LiteServer(tmp_path / "data", program=["-c", textwrap.dedent(program)])
    code, line = one_line_and_code(server)
    assert code == 2
    assert "3.3.0" in line
    assert "3.2.2" in line


class Caller:
    """As much of a gRPC context as the guard looks at; `gone` when it is asked."""

    def __init__(self, *, gone: bool = False) -> None:
        self.gone = gone

    def is_active(self) -> bool:
        return not self.gone

    def abort(self, code: Any, details: str) -> None:
        raise RuntimeError(details)


def test_a_queued_write_of_a_dead_caller_is_not_applied() -> None:
    done: list[str] = []
    lock, caller = threading.Lock(), Caller()
    call = serialised(lambda request, context: done.append(request), lock)
    call("first", caller)
    with ThreadPoolExecutor(1) as thread, lock:
        late = thread.submit(call, "late", caller)
        caller.gone = True
    with pytest.raises(RuntimeError, match="gone"):
        late.result(WAIT_S)
    assert done == ["first"]


def make_partition(milvus: MilvusClientHandle, name: str) -> None:
    milvus.call("make", lambda client: client.create_partition(f"z_novel_{NAME}", name, timeout=5))


def test_a_partition_name_that_cannot_be_a_folder_is_rejected(server: LiteServer) -> None:
    store = open_vectors(server.uri, partitions="named")
    store.ensure_collection(NAME, DIM)
    assert isinstance(store, MilvusVectors)
    for name in ("x" * 300, "../x", ""):
        with pytest.raises(VectorStoreError):
            make_partition(store._milvus, name)
    store.upsert(NAME, rows_of(0, 5))
    assert store.count(NAME) == 5
    store.close()


def test_a_flush_waits_for_readers_and_goes_before_new_ones() -> None:
    gate, order = FlushGate(), []
    started, release = threading.Event(), threading.Event()

    def read(name: str, hold: threading.Event | None = None) -> None:
        with gate.reading():
            started.set()
            if hold:
                hold.wait(WAIT_S)
            order.append(name)

    def flush() -> None:
        with gate.flushing():
            order.append("flush")

    first = threading.Thread(target=read, args=("first", release))
    first.start()
    assert started.wait(WAIT_S)
    flusher = threading.Thread(target=flush)
    flusher.start()
    wait_until(lambda: gate._flushing, WAIT_S, "the flush to wait")
    late = threading.Thread(target=read, args=("late",))
    late.start()
    release.set()
    for thread in (first, flusher, late):
        thread.join(WAIT_S)
    assert order == ["first", "flush", "late"]


def test_a_reader_that_opens_a_collection_may_flush_it() -> None:
    gate = FlushGate()
    with gate.reading(), gate.opening(), gate.flushing():
        pass
