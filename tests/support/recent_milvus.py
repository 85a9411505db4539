"""Stub of a Milvus server of a given version; records requests and has no rows."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
from pymilvus.grpc_gen import common_pb2, milvus_pb2, milvus_pb2_grpc, schema_pb2

DIM = 8


class RecentMilvus(milvus_pb2_grpc.MilvusServiceServicer):
    """Answers like an empty collection."""

    def __init__(self, version: str) -> None:
        self.version = version
        #: All requests with a filter: search, query, delete; those of a hybrid search one by one.
        self.requests: list[Any] = []
        #: Parameters by which hybrid searches fuse ranks.
        self.rank_params: list[dict[str, str]] = []
        #: Whether collections have BM25 vectors.
        self.bm25 = False

    def Connect(self, request: Any, context: Any) -> Any:
        info = common_pb2.ServerInfo(build_tags=self.version)
        return milvus_pb2.ConnectResponse(status=common_pb2.Status(), server_info=info, identifier=1)

    def GetVersion(self, request: Any, context: Any) -> Any:
        return milvus_pb2.GetVersionResponse(version=self.version)

    def DescribeCollection(self, request: Any, context: Any) -> Any:
        vector = schema_pb2.FieldSchema(
            fieldID=101, name="vector", data_type=schema_pb2.DataType.FloatVector,
            type_params=[common_pb2.KeyValuePair(key="dim", value=str(DIM))],
        )  # fmt: skip
        key = schema_pb2.FieldSchema(
            fieldID=100, name="id", data_type=schema_pb2.DataType.VarChar, is_primary_key=True
        )
        words = schema_pb2.FieldSchema(
            fieldID=102, name="sparse", data_type=schema_pb2.DataType.SparseFloatVector,
            is_function_output=True,
        )  # fmt: skip
        fields = [key, vector, *([words] if self.bm25 else [])]
        schema = schema_pb2.CollectionSchema(
            name=request.collection_name, fields=fields, enable_dynamic_field=True
        )
        return milvus_pb2.DescribeCollectionResponse(schema=schema, collection_name=request.collection_name)

    def Query(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        none = schema_pb2.ScalarField(string_data=schema_pb2.StringArray())
        ids = schema_pb2.FieldData(type=schema_pb2.DataType.VarChar, field_name="id", scalars=none)
        return milvus_pb2.QueryResults(fields_data=[ids])

    def Search(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        return milvus_pb2.SearchResults(results=schema_pb2.SearchResultData(num_queries=1, topks=[0]))

    def HybridSearch(self, request: Any, context: Any) -> Any:
        self.requests.extend(request.requests)
        self.rank_params.append({pair.key: pair.value for pair in request.rank_params})
        return milvus_pb2.SearchResults(results=schema_pb2.SearchResultData(num_queries=1, topks=[0]))

    def Delete(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        return milvus_pb2.MutationResult()


@contextmanager
def recent_milvus(version: str) -> Iterator[tuple[str, RecentMilvus]]:
    """Run the stub; yields its address and the stub."""
    servicer = RecentMilvus(version)
    server = grpc.server(ThreadPoolExecutor(4))
    milvus_pb2_grpc.add_MilvusServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"http://127.0.0.1:{port}", servicer
    finally:
        server.stop(None).wait(10)
