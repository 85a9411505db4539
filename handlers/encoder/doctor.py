"""Loads the model, and looks at the collections it would fill: one JSON object on standard output.

``python -m jobworker.handlers.encoder.doctor MODEL DEVICE PREFIX``: a process of its own, for an operator's
tool that must not hold torch.
The uri of Milvus and its token are two lines on standard input, because other users
of the host can read a command line. Each of these five may be empty.
"""

import json
import os
import sys
import time
from typing import Any

from jobworker.worker import ConfigurationError

#: Collections of the service, less their prefix.
COLLECTIONS = ("story_segments", "entity_profiles")


def check_model(model: str, device: str) -> dict[str, Any]:
    """Load it and embed one text. Keys: model, dim, max_tokens, load_s; or error."""
    from .load import load_encoder

    began_s = time.monotonic()
    try:
        encoder = load_encoder(model, device or "auto")
        made = encoder.encode(["It was a dark night."])
    except ConfigurationError as error:
        return {"error": str(error)}
    took_s = round(time.monotonic() - began_s, 1)
    name, dim = encoder.name, int(made.shape[1])
    return {"model": name, "dim": dim, "max_tokens": encoder.max_tokens, "load_s": took_s}


def check_collections(uri: str, token: str, prefix: str) -> dict[str, Any]:
    """Dimension of each collection by its full name (None: not there yet), and the server; or error."""
    from ..vectors.milvus.client import MilvusClientHandle
    from ..vectors.milvus.server_info import collection_info_of
    from ..vectors.ports import VectorStoreError

    link = MilvusClientHandle(uri, token or None, 10.0)

    def dimension(name: str) -> int | None:
        there = link.attempt(name, lambda client: client.has_collection(name))
        return (
            collection_info_of(link.attempt(name, lambda client: client.describe_collection(name))).dim
            if there
            else None
        )

    try:
        server = link.server()
        dims = {name: dimension(name) for name in (f"{prefix}{one}" for one in COLLECTIONS)}
    except VectorStoreError as error:
        return {"error": str(error)}
    finally:
        link.close()
    return {"version": server.version, "lite": server.lite, "dims": dims}


def main(model: str, device: str, prefix: str) -> None:
    """Print what was found."""
    uri, token = (sys.stdin.readline().strip() for _ in range(2))
    found: dict[str, Any] = {"model": check_model(model, device)}
    if uri:
        found["milvus"] = check_collections(uri, token, prefix)
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:4])
    # Not through the interpreter's shutdown: threads of torch or gRPC may hold that up or crash in it.
    os._exit(0)
