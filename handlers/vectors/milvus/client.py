"""The connection to Milvus: the only user of pymilvus; whatever it raises comes out as a VectorStoreError."""

import logging
import threading
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import grpc
from pymilvus import DataType, MilvusClient
from pymilvus.exceptions import MilvusException

from .. import schema as scalars
from ..filters import Filter
from .errors import RAISED, classify
from .server_info import MARK, Server

T = TypeVar("T")

logger = logging.getLogger("jobworker.vectors")
# The library logs a traceback for every failed call; the caller logs one line.
logging.getLogger("pymilvus").setLevel(logging.CRITICAL)

# After an outage gRPC's own backoff kept calls failing for up to 7 s once the server was back; with these
# it was under 1 s.
GRPC_OPTIONS = {
    "grpc.initial_reconnect_backoff_ms": 200,
    "grpc.min_reconnect_backoff_ms": 200,
    "grpc.max_reconnect_backoff_ms": 1000,
}
# A health check must answer within a second or so to be of use; a busy server still gets its chance.
PING_TIMEOUT_S = 3.0
# The default differs between Milvus versions; 64 is within the limits of all of them.
NUM_PARTITIONS = 64
INDEX = {"index_type": "HNSW", "metric_type": "COSINE", "params": {"M": 16, "efConstruction": 200}}

LITE_NOTE = (
    "16 buckets for the partition key, filters without templates, NaN and VARCHAR limits checked by this "
    "client only, no sync to disk on each write"
)


OLD_NOTE = (
    "this version misplaces upserted rows in collections with a partition key: new collections get none, and "
    "filters alone separate tenants; use Milvus 2.4 or later"
)


class MilvusClientHandle:
    """One client, made by the first call in the process that calls; usable from several threads."""

    def __init__(self, uri: str, token: str | None, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._uri, self._token = uri, token
        self._lock = threading.Lock()
        self._client: Any = None
        self._server = Server("unknown", lite=False)

    def ping(self) -> None:
        """Raise TransientStoreError unless the server answers within a few seconds."""
        timeout_s = min(PING_TIMEOUT_S, self.timeout_s)
        self.attempt("ping", lambda client: client.list_collections(timeout=timeout_s), timeout_s)

    def attempt(self, what: str, do: Callable[[Any], T], connect_s: float | None = None) -> T:
        """Run one call with the client; raises VectorStoreError with `what` in front."""
        try:
            return do(self._connected(connect_s or self.timeout_s))
        except (MilvusException, grpc.RpcError) as error:
            self._raise(what, error)

    def server(self) -> Server:
        """Return what answers; connects if need be, raises VectorStoreError as `attempt` does."""
        self.attempt("connect", lambda client: None)
        return self._server

    def arguments(self, where: Filter) -> dict[str, Any]:
        """Return a filter as the server takes it; connects if need be, raises as `attempt` does."""
        return where.arguments(templates=self.server().takes_templates)

    def close(self) -> None:
        """Give the connection back; the next call would make a new one."""
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()

    def _connected(self, timeout_s: float) -> Any:
        with self._lock:
            if self._client is None:
                client = MilvusClient(
                    self._uri,
                    token=self._token or "",
                    timeout=timeout_s,
                    # Clients of one address share a connection otherwise, and a close would end it for all.
                    dedicated=True,
                    grpc_options=GRPC_OPTIONS,
                )
                self._server = ask_server(client, timeout_s)
                self._client = client
            return self._client

    def _raise(self, what: str, error: Exception) -> NoReturn:
        code, message = code_and_message(error)
        names = [base.__name__ for base in type(error).__mro__]
        verdict = classify(names, code, message, lite=self._server.lite)
        text = f"{what}: {type(error).__name__} {code}: {scalars.shown(message)}"
        raise RAISED[verdict](text) from error


def code_and_message(error: Any) -> tuple[int | str, str]:
    """Return the server's number or the name of the gRPC status, and the message."""
    if isinstance(error, grpc.RpcError):
        return error.code().name, str(error.details())
    # A client that gave up on a gRPC error puts the status where the number belongs.
    return (int(error.code) if isinstance(error.code, int) else error.code.name), str(error.message)


def ask_server(client: Any, timeout_s: float) -> Server:
    """Return what answers, and say in the log, once a connection, what it does less than a recent Milvus."""
    version = str(client.get_server_version(timeout=timeout_s))
    server = Server(version, lite=version.startswith("milvus_lite"))
    if server.lite:
        logger.info("milvus.lite_limits", extra={"hint": LITE_NOTE})
    elif not server.keeps_partition_keys:
        logger.warning("milvus.old_server", extra={"version": version, "hint": OLD_NOTE})
    return server


def table(of: scalars.Schema, dim: int, *, key: bool, mark: str, lite: bool) -> dict[str, Any]:
    """Return the options that make a collection; `key`: tenants apart by a partition key.

    `mark` is kept as the description, with `lite` as a property; `mark_of` reads it.
    """
    # Dynamic fields carry `version` without a fixed column that other writers would have to fill.
    layout = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=True, description=mark)
    for field in of.fields:
        layout.add_field(field.name, **field_options(field, key=key))
    layout.add_field("vector", datatype=DataType.FLOAT_VECTOR, dim=dim)
    # Milvus Lite keeps no description, and not every server need take a property that it does not know.
    options: dict[str, Any] = {"schema": layout, "consistency_level": "Bounded"}
    if lite:
        options["properties"] = {MARK: mark}
    return options | ({"num_partitions": NUM_PARTITIONS} if key else {})


def field_options(field: scalars.Scalar, *, key: bool) -> dict[str, Any]:
    """Return pymilvus's words for a scalar field."""
    if field.max_bytes is None:
        return {"datatype": DataType.INT64}
    options: dict[str, Any] = {"datatype": DataType.VARCHAR, "max_length": field.max_bytes}
    if field.name == "id":
        options["is_primary"] = True
    if field.name == "tenant_id" and key:
        options["is_partition_key"] = True
    return options


def index() -> Any:
    """Return the options of the vector index."""
    params = MilvusClient.prepare_index_params()
    params.add_index("vector", index_name="vector", **INDEX)
    return params
