"""Program behind `jobworker doctor --model`: loads the model and checks its collections in Milvus.

``python -m jobworker.handlers.encoder.doctor MODEL DEVICE PREFIX``: a separate process, because
the operator's tool must not load torch. Standard input has two lines, the URI of Milvus and its token: other
users of the host can read a command line. Each of the five values may be empty. Prints one JSON object.
"""

import os
import sys
import time
from typing import Any

from jobworker.worker import ConfigurationError
from jobworker.worker.safe_text import safe_json

#: Collections of the service, without their prefix.
COLLECTIONS = ("story_segments", "entity_profiles")


def check_model(model: str, device: str) -> dict[str, Any]:
    """Load the model and embed one text. Keys of the result: model, dim, max_tokens, load_s; or error."""
    from .load import load_encoder

    started_s = time.monotonic()
    try:
        encoder = load_encoder(model, device or "auto")
        vectors = encoder.encode(["It was a dark night."])
    except ConfigurationError as error:
        return {"error": str(error)}
    took_s = round(time.monotonic() - started_s, 1)
    name, dim = encoder.name, int(vectors.shape[1])
    return {"model": name, "dim": dim, "max_tokens": encoder.max_tokens, "load_s": took_s}


def check_collections(uri: str, token: str, prefix: str) -> dict[str, Any]:
    """The server's version, and the dimension by full name of a collection (None: not created); or error."""
    from ..vectors.milvus.client import MilvusClientHandle
    from ..vectors.milvus.server_info import CollectionInfo
    from ..vectors.ports import VectorStoreError

    milvus = MilvusClientHandle(uri, token or None, 10.0)

    def dimension(name: str) -> int | None:
        if not milvus.call(name, lambda client: client.has_collection(name)):
            return None
        description = milvus.call(name, lambda client: client.describe_collection(name))
        return CollectionInfo.of(description).dim

    try:
        server = milvus.server()
        dims = {name: dimension(name) for name in (f"{prefix}{one}" for one in COLLECTIONS)}
    except VectorStoreError as error:
        return {"error": str(error)}
    finally:
        milvus.close()
    return {"version": server.version, "lite": server.lite, "dims": dims}


def main(model: str, device: str, prefix: str) -> None:
    """Print the results as JSON."""
    uri, token = (sys.stdin.readline().strip() for _ in range(2))
    report: dict[str, Any] = {"model": check_model(model, device)}
    if uri:
        report["milvus"] = check_collections(uri, token, prefix)
    # As bytes: the reader expects UTF-8 in every locale.
    sys.stdout.buffer.write(safe_json(report).encode())
    sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:4])
    # Skips the interpreter's shutdown, in which threads of torch or gRPC may hang or crash.
    os._exit(0)
