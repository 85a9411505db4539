"""The server around Milvus Lite answers only clients that give its token."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from jobworker.handlers.vectors.milvus.store import Row, TransientStoreError, open_vectors
from support.milvus import LITE_START_S, TOKEN, LiteServer, lite_server

NAME, TABLE, DIM, ROWS = "story_segments", "z_novel_story_segments", 8, 3
SCOPE: dict[str, Any] = {"tenant_id": "tenant", "project_id": "p"}
WITHIN_S = 20.0
#: One message that a refused caller sends, and how much the server's memory may grow meanwhile.
LARGE_BYTES, GROWTH_KIB = 200 << 20, 64 << 10
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
#: Headers of a caller: none, a guess, a part of the token, the token twice, the token as it is.
STRANGERS: dict[str, list[tuple[str, str]]] = {
    "none": [],
    "guess": [("authorization", "cm9vdDpNaWx2dXM=")],
    "empty": [("authorization", "")],
    "not base64": [("authorization", TOKEN)],
    "two": [("authorization", "cm9vdDpNaWx2dXM="), ("authorization", "cm9vdDpvZi10aGVzZS10ZXN0cy1hbG9uZQ==")],
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiteServer]:
    with lite_server(tmp_path_factory.mktemp("access") / "lite") as running:
        store = open_vectors(running.uri)
        vectors = np.eye(ROWS, DIM, dtype=np.float32)
        store.ensure_collection(NAME, DIM)
        store.upsert(NAME, [Row(f"r{n}", vectors[n], "tenant", "p", text_content="x") for n in range(ROWS)])
        store.close()
        yield running


@pytest.fixture
def channel(server: LiteServer) -> Iterator[grpc.Channel]:
    unlimited = [("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(f"127.0.0.1:{server.port}", options=unlimited) as opened:
        yield opened


def rows_in(server: LiteServer) -> int:
    """Seen by a client with the token."""
    store = open_vectors(server.uri)
    try:
        return store.count(NAME)
    finally:
        store.close()


@pytest.mark.parametrize("headers", STRANGERS.values(), ids=STRANGERS.keys())
def test_a_caller_without_the_token_lists_reads_and_drops_nothing(
    server: LiteServer, channel: grpc.Channel, headers: list[tuple[str, str]]
) -> None:
    from pymilvus.grpc_gen import milvus_pb2, milvus_pb2_grpc  # here: every process collects this file

    stub = milvus_pb2_grpc.MilvusServiceStub(channel)
    calls = {
        "Connect": milvus_pb2.ConnectRequest(),
        "GetVersion": milvus_pb2.GetVersionRequest(),
        "ListDatabases": milvus_pb2.ListDatabasesRequest(),
        "ShowCollections": milvus_pb2.ShowCollectionsRequest(),
        "Query": milvus_pb2.QueryRequest(collection_name=TABLE, expr="id != ''", output_fields=["*"]),
        "Delete": milvus_pb2.DeleteRequest(collection_name=TABLE, expr="id != ''"),
        "DropCollection": milvus_pb2.DropCollectionRequest(collection_name=f"{TABLE}_v1"),
    }
    for name, request in calls.items():
        with pytest.raises(grpc.RpcError) as refused:
            getattr(stub, name)(request, metadata=headers, timeout=WITHIN_S)
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED, name
    assert rows_in(server) == ROWS


def test_streams_reflection_and_unknown_calls_are_refused_too(channel: grpc.Channel) -> None:
    insert = "/milvus.proto.milvus.MilvusService/Insert"
    for path in (insert, REFLECTION, "/grpc.health.v1.Health/Check", "/no/such"):
        with pytest.raises(grpc.RpcError) as refused:
            list(channel.stream_stream(path)(iter([b"x"]), timeout=WITHIN_S))
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED, path


def test_a_large_message_without_the_token_is_not_taken_into_memory(
    server: LiteServer, channel: grpc.Channel
) -> None:
    def peak_kib() -> int:
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))

    before, large = peak_kib(), b"x" * LARGE_BYTES
    with pytest.raises(grpc.RpcError) as refused:
        channel.unary_unary("/milvus.proto.milvus.MilvusService/Insert")(large, timeout=WITHIN_S)
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert peak_kib() - before < GROWTH_KIB


def test_pymilvus_gets_in_by_the_token_in_the_uri_or_beside_it_and_not_without(server: LiteServer) -> None:
    from pymilvus import MilvusClient
    from pymilvus.exceptions import MilvusException

    for client in (MilvusClient(server.uri), MilvusClient(server.open_uri, token=TOKEN)):
        assert f"{TABLE}_v1" in client.list_collections()
        client.close()
    for more in ({}, {"token": "root:Milvus"}, {"token": TOKEN.upper()}):
        with pytest.raises(MilvusException):
            MilvusClient(server.open_uri, timeout=3, **more)
    stranger = open_vectors(server.open_uri, timeout_s=3)
    with pytest.raises(TransientStoreError, match="--milvus-token"):
        stranger.count(NAME)
    stranger.close()


@pytest.mark.parametrize("content", ["", " \n", None], ids=["empty", "blank", "absent"])
def test_it_does_not_start_without_a_token(tmp_path: Path, content: str | None) -> None:
    token_file = tmp_path / "mine"
    if content is not None:
        token_file.write_text(content)
    # The last of two options with one name counts.
    server = LiteServer(tmp_path / "lite", arguments=["--token-file", str(token_file)])
    try:
        assert server.process.wait(LITE_START_S) == 2
    finally:
        server.kill()
    assert str(token_file) in server.stderr
    assert "Traceback" not in server.stderr
    assert not server.port_file.exists()


def test_its_files_are_for_its_user_only(server: LiteServer) -> None:
    made = [server.port_file, *server.data_dir.rglob("*")]
    assert len(made) > 3
    assert [path for path in made if path.stat().st_mode & 0o077] == []
