"""Client of a Milvus server; the only module with pymilvus. Its errors become VectorStoreErrors."""

import logging
import threading
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlsplit

import grpc
from pymilvus import AnnSearchRequest, DataType, Function, FunctionType, MilvusClient, RRFRanker
from pymilvus.exceptions import MilvusException

from .. import schema as schemas
from ..filters import Filter
from ..fusion import RRF_K
from ..ports import SparseKind
from .errors import ERROR_CLASSES, REFUSING_STATUSES, classify
from .server_info import MARK, Server

T = TypeVar("T")

logger = logging.getLogger("jobworker.vectors")
# The library logs a traceback for every failed call; the caller logs one line.
logging.getLogger("pymilvus").setLevel(logging.CRITICAL)

# With gRPC's default backoff, calls failed for up to 7 s after a server was back; with this, less than 1 s.
GRPC_OPTIONS = {
    "grpc.initial_reconnect_backoff_ms": 200,
    "grpc.min_reconnect_backoff_ms": 200,
    "grpc.max_reconnect_backoff_ms": 1000,
}
# A health check should be fast, but a busy server needs a few seconds.
PING_TIMEOUT_S = 3.0
# While Milvus replaces a growing segment by a sealed one, reads miss rows, even with strong consistency.
# Seen on 2.3.5: for up to about 2 s, and up to 19 rows of 20.
READ_LAG_S = 5.0
# Causes of an error that are looked at.
_MAX_CAUSES = 8
# The default depends on the Milvus version; all of them permit 64.
NUM_PARTITIONS = 64
INDEX = {"index_type": "HNSW", "metric_type": "COSINE", "params": {"M": 16, "efConstruction": 200}}
# The server's own analyser: words of Chinese (jieba), lower case, no punctuation.
ANALYSER = {"type": "chinese"}

LITE_NOTE = (
    "16 buckets for the partition key, filters without templates, NaN and VARCHAR limits checked by this "
    "client only, no sync to disk on each write"
)


OLD_NOTE = (
    "this version misplaces upserted rows in collections with a partition key: new collections get none, and "
    "filters alone separate tenants; use Milvus 2.4 or later"
)


def grpc_options(uri: str) -> dict[str, Any]:
    """gRPC's options for a server. One on this machine is never reached through a proxy."""
    host = urlsplit(uri).hostname or ""
    local = host in ("localhost", "::1") or host.startswith("127.")
    return {**GRPC_OPTIONS, "grpc.enable_http_proxy": 0} if local else dict(GRPC_OPTIONS)


class MilvusClientHandle:
    """Milvus client that connects at its first call, in the calling process; thread-safe."""

    def __init__(self, uri: str, token: str | None, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._uri, self._token = uri, token
        self._lock = threading.Lock()
        self._client: Any = None
        self._server = Server("unknown", lite=False)

    def ping(self) -> None:
        """Raise TransientStoreError unless the server answers within a few seconds."""
        timeout_s = min(PING_TIMEOUT_S, self.timeout_s)
        self.call("ping", lambda client: client.list_collections(timeout=timeout_s), timeout_s)

    def call(self, subject: str, action: Callable[[Any], T], connect_s: float | None = None) -> T:
        """Run `action` with the client. Raises VectorStoreError; its message starts with `subject`."""
        try:
            return action(self._connected(connect_s or self.timeout_s))
        except (MilvusException, grpc.RpcError) as error:
            self._raise(subject, error)

    def server(self) -> Server:
        """The kind of server; connects first if necessary. Raises VectorStoreError, as `call` does."""
        self.call("connect", lambda client: None)
        return self._server

    def ordered(self, limit: int) -> dict[str, Any]:
        """Arguments of a query for the first rows in the order of ids; connects and raises like `server`."""
        # A server orders the rows of a limited query; Lite does so only for an iterator.
        return {"limit": limit, **({"iterator": "True"} if self.server().lite else {})}

    def max_read_lag_s(self) -> float:
        """For how many seconds strong reads may miss existing rows; connects and raises like `server`."""
        return 0.0 if self.server().lite else READ_LAG_S

    def filter_arguments(self, where: Filter) -> dict[str, Any]:
        """A filter in the form that the server supports; connects and raises like `server`."""
        return where.arguments(templates=self.server().takes_templates)

    def close(self) -> None:
        """Close the connection; the next call opens a new one."""
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
                    # Otherwise, clients of one address share a connection, and one close ends it for all.
                    dedicated=True,
                    grpc_options=grpc_options(self._uri),
                )
                self._server = detect_server(client, timeout_s)
                self._client = client
            return self._client

    def _raise(self, subject: str, error: Exception) -> NoReturn:
        code, message = code_and_message(error)
        names = [base.__name__ for base in type(error).__mro__]
        verdict = classify(names, code, message, lite=self._server.lite)
        text = f"{subject}: {type(error).__name__} {code}: {schemas.shown(message)}"
        raise ERROR_CLASSES[verdict](text) from error


def code_and_message(error: Any) -> tuple[int | str, str]:
    """The server's error code or the name of the gRPC status, and the message."""
    if refusal := _refusal(error):
        return refusal.code().name, str(refusal.details())
    if isinstance(error, grpc.RpcError):
        return error.code().name, str(error.details())
    # After its retries of a gRPC error, pymilvus has the status in the field for the number.
    return (int(error.code) if isinstance(error.code, int) else error.code.name), str(error.message)


def _refusal(error: BaseException) -> Any:
    """The gRPC error that refuses the credentials, if any: pymilvus hides it behind "Fail connecting"."""
    cause: BaseException | None = error
    for _ in range(_MAX_CAUSES):
        if cause is None:
            return None
        if isinstance(cause, grpc.Call) and cause.code().name in REFUSING_STATUSES:
            return cause
        cause = cause.__cause__ or cause.__context__
    return None


def detect_server(client: Any, timeout_s: float) -> Server:
    """The kind of server. Logs, once a connection, its limits compared with a recent Milvus."""
    version = str(client.get_server_version(timeout=timeout_s))
    server = Server(version, lite=version.startswith("milvus_lite"))
    if server.lite:
        logger.info("milvus.lite_limits", extra={"hint": LITE_NOTE})
    elif not server.keeps_partition_keys:
        logger.warning("milvus.old_server", extra={"version": version, "hint": OLD_NOTE})
    return server


def collection_options(
    schema: schemas.Schema,
    dim: int,
    *,
    partition_key: bool,
    mark: str,
    lite: bool,
    sparse: SparseKind = "none",
) -> dict[str, Any]:
    """Options of `create_collection`; `partition_key` makes the tenant the partition key.

    `mark` becomes the description, on Milvus Lite a property; `mark_of` reads it.
    """
    # `version` is a dynamic field: other writers would have to fill a fixed column.
    layout = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=True, description=mark)
    for field in schema.fields:
        is_analysed = sparse == "bm25" and field.name == schema.named_in
        analysed = {"enable_analyzer": True, "analyzer_params": ANALYSER} if is_analysed else {}
        layout.add_field(field.name, **field_options(field, partition_key=partition_key), **analysed)
    layout.add_field("vector", datatype=DataType.FLOAT_VECTOR, dim=dim)
    if sparse != "none":
        layout.add_field("sparse", datatype=DataType.SPARSE_FLOAT_VECTOR)
    if sparse == "bm25":
        layout.add_function(Function("bm25", FunctionType.BM25, [schema.named_in], ["sparse"]))
    # Milvus Lite does not store descriptions; a Milvus server may refuse an unknown property.
    options: dict[str, Any] = {"schema": layout, "consistency_level": "Bounded"}
    if lite:
        options["properties"] = {MARK: mark}
    return options | ({"num_partitions": NUM_PARTITIONS} if partition_key else {})


def field_options(field: schemas.Scalar, *, partition_key: bool) -> dict[str, Any]:
    """Options of `add_field` for a scalar field."""
    if field.max_bytes is None:
        return {"datatype": DataType.INT64}
    options: dict[str, Any] = {"datatype": DataType.VARCHAR, "max_length": field.max_bytes}
    if field.name == "id":
        options["is_primary"] = True
    if field.name == "tenant_id" and partition_key:
        options["is_partition_key"] = True
    return options


def index_options() -> Any:
    """Parameters of the vector index."""
    params = MilvusClient.prepare_index_params()
    params.add_index("vector", index_name="vector", **INDEX)
    return params


def sparse_index_options(sparse: SparseKind) -> Any:
    """Parameters of the index of sparse vectors."""
    params = MilvusClient.prepare_index_params()
    metric = "BM25" if sparse == "bm25" else "IP"
    params.add_index("sparse", index_name="sparse", index_type="SPARSE_INVERTED_INDEX", metric_type=metric)
    return params


def hybrid_arguments(
    dense: list[float], lexical: dict[int, float] | str, ef: int, candidates: int, filter_: dict[str, Any]
) -> dict[str, Any]:
    """Arguments of `hybrid_search`; `filter_` has those of a filter."""
    metric = "BM25" if isinstance(lexical, str) else "IP"
    where = {"expr": filter_["filter"], "expr_params": filter_.get("filter_params")}
    by_vector = AnnSearchRequest(
        [dense], "vector", {"metric_type": "COSINE", "params": {"ef": ef}}, candidates, **where
    )
    by_words = AnnSearchRequest([lexical], "sparse", {"metric_type": metric}, candidates, **where)
    return {"reqs": [by_vector, by_words], "ranker": RRFRanker(RRF_K)}
