"""Milvus Lite as a server for several processes that loses no acknowledged row.

`python -m jobworker.handlers.vectors.milvus.lite_server --data-dir D --port-file F --token-file T [--port 0]`

The stock `milvus-lite server` loses acknowledged rows under concurrent writers and on a full disk, because
its engine is written for one caller. Here the same engine is served with

* one lock around every call that writes;
* no write for a caller that has died: its job, and newer ones, may have run meanwhile;
* no reads while a flush moves rows from memory to a segment, so that no read misses a row;
* an exit after the first failed write, because only a replay of the log at the next start is safe;
* a rebuild of index files that a kill left incomplete, which otherwise prevent every start.

A kill at any moment loses no acknowledged row. The log is not synced after each write, so a power failure
may lose its end.

Every user of the host can connect to the loopback address, so each call must carry the token of the token
file. A call without it gets UNAUTHENTICATED before its message is read.

Exit codes: 0 stopped by SIGTERM or SIGINT; 2 cannot start, one line on stderr says why; 74 a write failed.
"""

import argparse
import base64
import contextlib
import functools
import hmac
import importlib.metadata
import logging
import os
import re
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any, NoReturn

log = logging.getLogger("jobworker.lite")

#: Longest wait for the line that says why the server exits; a pipe that is not read blocks it.
_LAST_WORDS_S = 0.5

# Private names of this release are patched; another release may have other code paths for writes.
SUPPORTED_VERSION = "3.2.2"
# Rows that are not flushed are searched one by one in Python, about 40 µs a row. With the engine's default of
# 128 MiB, a search of recent rows took two seconds.
MEMTABLE_LIMIT_BYTES = 4 * 1024 * 1024
# As in the stock server: larger than any request that a Milvus server accepts.
MAX_MESSAGE_BYTES = 256 * 1024 * 1024
# Waiting writers occupy a thread each; there must be threads left for readers.
SERVER_THREADS = 32
# pymilvus pings every 10 s when idle; with gRPC's default of 300 s, the server would answer GOAWAY.
MIN_PING_INTERVAL_MS = 5_000
# For running calls; everything acknowledged is in the log already.
STOP_GRACE_S = 2.0
# Closing builds pending indexes, which may take minutes; after this, the next start replays the log.
CLOSE_LIMIT_S = 8.0
EXIT_USAGE = 2
EXIT_WRITE_FAILED = 74  # EX_IOERR of sysexits.h

WRITING_CALLS = (
    "CreateCollection",
    "DropCollection",
    "RenameCollection",
    "TruncateCollection",
    "AlterCollection",
    "Insert",
    "Upsert",
    "Delete",
    "Flush",
    "CreatePartition",
    "DropPartition",
    "CreateIndex",
    "DropIndex",
    "LoadCollection",
    "ReleaseCollection",
    "LoadPartitions",
    "ReleasePartitions",
    "ManualCompaction",
    "CreateAlias",
    "AlterAlias",
    "DropAlias",
    "CreateDatabase",
    "DropDatabase",
    "AlterDatabase",
)
READING_CALLS = ("Query", "Search", "HybridSearch", "GetCollectionStatistics", "GetPartitionStatistics")
# A longer name cannot be a directory: rows would be acknowledged, and every flush would fail.
PARTITION_NAME = re.compile(r"[A-Za-z0-9_]{1,200}")


class FlushGate:
    """Readers-writer lock: many readers or one flush; a waiting flush has priority over new readers."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._readers = 0
        self._flushing = False
        self._thread = threading.local()

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._flushing)
            self._readers += 1
        try:
            yield
        finally:
            with self._changed:
                self._readers -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def opening(self) -> Iterator[None]:
        """Let flushes of this thread pass: a collection that is being opened has no readers.

        Readers of other collections may be waiting for this very one.
        """
        before, self._thread.opening = getattr(self._thread, "opening", False), True
        try:
            yield
        finally:
            self._thread.opening = before

    @contextlib.contextmanager
    def flushing(self) -> Iterator[None]:
        if getattr(self._thread, "opening", False):
            yield
            return
        with self._changed:
            self._changed.wait_for(lambda: not self._flushing)
            self._flushing = True
            self._changed.wait_for(lambda: self._readers == 0)
        try:
            yield
        finally:
            with self._changed:
                self._flushing = False
                self._changed.notify_all()


def exit_now(code: int, reason: str) -> NoReturn:
    """Print `reason` in one line on stderr and exit without any clean-up, also where stderr blocks."""
    line = f"lite_server: {' '.join(reason.split())}\n".encode("utf-8", "backslashreplace")
    last_words = threading.Thread(target=os.write, args=(2, line), daemon=True)
    last_words.start()
    last_words.join(_LAST_WORDS_S)
    os._exit(code)


def guard_engine(collection_class: Any, gate: FlushGate) -> None:
    """Patch the engine: no reads during a flush, and an exit after a failed flush or log write."""
    flush, apply = collection_class._trigger_flush, collection_class._apply

    @functools.wraps(flush)
    def guarded_flush(self: Any) -> None:
        try:
            with gate.flushing():
                flush(self)
        except BaseException as error:
            exit_now(EXIT_WRITE_FAILED, f"flush failed ({error!r}); the log is replayed at the next start")

    @functools.wraps(apply)
    def guarded_apply(self: Any, operation: Any) -> None:
        try:
            apply(self, operation)
        except OSError as error:
            # A record after a torn one would be unreadable after a crash.
            exit_now(
                EXIT_WRITE_FAILED, f"log write failed ({error!r}); the log is replayed at the next start"
            )

    collection_class._trigger_flush, collection_class._apply = guarded_flush, guarded_apply


def guard_indexes(segment_class: Any) -> None:
    """Patch the engine: rebuild an unreadable index file from the rows.

    The engine writes index files in place and in the background, so a kill may leave a part of one.
    """
    build_or_load = segment_class.build_or_load_index

    @functools.wraps(build_or_load)
    def build_or_rebuild(self: Any, spec: Any, index_dir: str) -> None:
        try:
            build_or_load(self, spec, index_dir)
        except Exception as error:
            path = Path(self.index_file_path(index_dir, spec.index_type, spec.field_name))
            if not path.exists():
                raise
            # As text, because this process has the standard formatter, which prints no extra fields.
            log.warning("lite.index_rebuilt file=%s error=%s", path, error)
            path.unlink()
            build_or_load(self, spec, index_dir)

    segment_class.build_or_load_index = build_or_rebuild


def guard_calls(servicer: Any, gate: FlushGate) -> None:
    """Patch the servicer: one writing call at a time, no reading call during a flush."""
    write_lock = threading.Lock()

    for name in WRITING_CALLS:
        setattr(servicer, name, serialised(getattr(servicer, name), write_lock))
    for name in READING_CALLS:
        setattr(servicer, name, outside_flushes(getattr(servicer, name), gate))
    servicer.AllocTimestamp = unimplemented
    guard_partition_names(servicer)


def unimplemented(request: Any, context: Any) -> None:
    """Abort a call that the engine lacks, as clients expect; the stock class also logs a traceback."""
    import grpc

    context.abort(grpc.StatusCode.UNIMPLEMENTED, "Milvus Lite does not have this call")


def serialised(call: Callable[[Any, Any], Any], lock: threading.Lock) -> Callable[[Any, Any], Any]:
    """The call under the lock; aborted if the caller died while it waited for the lock."""

    def run(request: Any, context: Any) -> Any:
        import grpc

        with lock:
            if not context.is_active():
                context.abort(grpc.StatusCode.CANCELLED, "the caller is gone")
            return call(request, context)

    return run


def outside_flushes(call: Callable[[Any, Any], Any], gate: FlushGate) -> Callable[[Any, Any], Any]:
    """The call, which never runs during a flush."""

    def run(request: Any, context: Any) -> Any:
        with gate.reading():
            return call(request, context)

    return run


def guard_partition_names(servicer: Any) -> None:
    """Patch the servicer: reject partition names that the engine accepts but can never flush."""
    create = servicer.CreatePartition

    def create_checked(request: Any, context: Any) -> Any:
        import grpc

        if not PARTITION_NAME.fullmatch(request.partition_name):
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "partition name must match [A-Za-z0-9_]{1,200}")
        return create(request, context)

    servicer.CreatePartition = create_checked


class TokenCheck:
    """gRPC server interceptor: rejects every call without the token in the `authorization` header.

    It covers unknown methods too. The comparison takes constant time.
    """

    def __init__(self, token: str) -> None:
        import grpc

        # The encoding of pymilvus and other SDKs for `user:password` or an API key.
        self._expected = base64.b64encode(token.encode())
        # A streaming handler, because for a unary one gRPC reads the whole message first.
        self._reject = grpc.stream_stream_rpc_method_handler(unauthenticated)

    def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
        """The handler of the call, or the one that rejects it."""
        tokens = [value for key, value in details.invocation_metadata if key == "authorization"]
        if len(tokens) == 1 and hmac.compare_digest(as_bytes(tokens[0]), self._expected):
            return continuation(details)
        return self._reject


def as_bytes(value: str | bytes) -> bytes:
    """A metadata value as bytes; gRPC passes str if it can decode the value."""
    return value.encode() if isinstance(value, str) else value


def unauthenticated(requests: Any, context: Any) -> None:
    """Reject a call without reading its messages."""
    import grpc

    context.abort(grpc.StatusCode.UNAUTHENTICATED, "wrong or missing token")


def read_token(path: Path) -> str:
    """The token in `path`. Exits with 2 if there is none: the server never starts without a token."""
    try:
        token = path.read_text("utf-8").strip()
    except (OSError, ValueError) as error:
        exit_now(EXIT_USAGE, f"token file {path} cannot be read: {error}")
    if not token:
        exit_now(EXIT_USAGE, f"token file {path} is empty")
    return token


def guard_open(database: Any, gate: FlushGate) -> None:
    """Patch the database: without the lock, two calls that open a collection at once would share its log."""
    lock = threading.RLock()

    def locked(call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def run(*args: Any, **kwargs: Any) -> Any:
            with lock, gate.opening():
                return call(*args, **kwargs)

        return run

    database.get_collection = locked(database.get_collection)
    database.create_collection = locked(database.create_collection)


def load_all_collections(database: Any) -> None:
    """Open and load every collection; after a restart the engine has released the indexed ones."""
    for database_name in database.list_databases():
        for name in database.list_collections(database_name=database_name):
            database.get_collection(name, database_name=database_name).load()


def check_version() -> None:
    """Exit with 2 if the engine is missing or is not the release whose private names are patched."""
    try:
        version = importlib.metadata.version("milvus-lite")
    except importlib.metadata.PackageNotFoundError:
        exit_now(EXIT_USAGE, f"milvus-lite is not installed: pip install milvus-lite=={SUPPORTED_VERSION}")
    if version != SUPPORTED_VERSION:
        exit_now(
            EXIT_USAGE,
            f"milvus-lite {version} is installed, only {SUPPORTED_VERSION} is known to keep rows here: "
            f"pip install milvus-lite=={SUPPORTED_VERSION}",
        )


def open_database(data_dir: Path) -> Any:
    """Open the engine on `data_dir`. Exits with 2 if another process uses the directory."""
    # The engine reads it once, at import.
    os.environ.setdefault("MILVUS_LITE_MEMTABLE_MEMORY_LIMIT_BYTES", str(MEMTABLE_LIMIT_BYTES))
    from milvus_lite.db import MilvusLite
    from milvus_lite.exceptions import DataDirLockedError

    try:
        return MilvusLite(str(data_dir))
    except DataDirLockedError:
        exit_now(EXIT_USAGE, f"data directory {data_dir} is in use by another process")
    except OSError as error:
        exit_now(EXIT_USAGE, f"data directory {data_dir} cannot be used: {error}")


def build_server(database: Any, gate: FlushGate, token: str) -> Any:
    """The gRPC server with all patches, not yet bound to a port."""
    import grpc
    from milvus_lite.adapter.grpc import server as stock
    from milvus_lite.adapter.grpc.servicer import MilvusServicer

    server = grpc.server(
        futures.ThreadPoolExecutor(max_workers=SERVER_THREADS),
        interceptors=[TokenCheck(token)],
        options=[
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            # With it, two servers with different data could share a port.
            ("grpc.so_reuseport", 0),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", MIN_PING_INTERVAL_MS),
            ("grpc.http2.max_ping_strikes", 0),
        ],
    )
    servicer = MilvusServicer(database)
    guard_calls(servicer, gate)
    stock.milvus_pb2_grpc.add_MilvusServiceServicer_to_server(servicer, server)
    return server


def bind_socket(server: Any, path: str) -> None:
    """Bind to a Unix socket too; exits with 2 if that fails. The umask makes it private."""
    try:
        bound = path == "" or bool(server.add_insecure_port(f"unix:{path}"))
    except RuntimeError:
        bound = False
    if not bound:
        exit_now(EXIT_USAGE, f"socket {path} cannot be used")


def bind(server: Any, port: int) -> int:
    """Bind to the loopback address and return the port. Exits with 2 if the port is in use."""
    try:
        bound = int(server.add_insecure_port(f"127.0.0.1:{port}"))
    except RuntimeError:
        bound = 0
    if bound == 0:
        exit_now(EXIT_USAGE, f"port {port} on 127.0.0.1 is in use")
    return bound


def publish_port(port_file: Path, port: int) -> None:
    """Write the file by an atomic rename, so that no reader sees a part of it."""
    handle, temporary = tempfile.mkstemp(dir=port_file.parent, prefix=f".{port_file.name}.")
    with os.fdopen(handle, "w") as file:
        file.write(f"{port}\n")
    os.replace(temporary, port_file)


def close(server: Any, database: Any) -> None:
    """Stop serving, then close the engine within CLOSE_LIMIT_S; unflushed rows stay in the log."""
    server.stop(grace=STOP_GRACE_S).wait(STOP_GRACE_S + 1)
    closing = threading.Thread(target=database.close, daemon=True)
    closing.start()
    closing.join(CLOSE_LIMIT_S)


def serve(
    data_dir: Path, port_file: Path, port: int, socket: str, token: str, stop: threading.Event
) -> None:  # fmt: skip
    """Serve `data_dir` until `stop` is set; `port_file` exists while calls are answered."""
    database = open_database(data_dir)
    from milvus_lite.engine.collection import Collection
    from milvus_lite.storage.segment import Segment

    gate = FlushGate()
    guard_engine(Collection, gate)
    guard_indexes(Segment)
    guard_open(database, gate)
    server = build_server(database, gate, token)
    bound = bind(server, port)
    bind_socket(server, socket)
    load_all_collections(database)
    server.start()
    publish_port(port_file, bound)
    stop.wait()
    port_file.unlink(missing_ok=True)
    close(server, database)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="lite_server", description="Safe server around Milvus Lite.")
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of the rows")
    parser.add_argument(
        "--port-file", type=Path, required=True, help="gets the port when the server is ready"
    )
    parser.add_argument("--token-file", type=Path, required=True, help="file with the token of the clients")
    parser.add_argument("--port", type=int, default=0, help="port on 127.0.0.1; 0 picks a free one")
    parser.add_argument("--socket", default="", help="path of a Unix socket to listen on too")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> NoReturn:
    """Run the server until SIGTERM or SIGINT; the module docstring lists the exit codes."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    options = parse(argv)
    check_version()
    token = read_token(options.token_file)
    os.umask(0o077)  # the engine's files hold every tenant's rows
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    serve(options.data_dir, options.port_file, options.port, options.socket, token, stop)
    # Threads of the engine may still build an index, which the next start does not need.
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
