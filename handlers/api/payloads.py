"""Bodies of requests and answers: OpenAI's embeddings, text-embeddings-inference's embed, and search."""

import base64
import re
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import msgspec
import numpy as np

from ..encoder.base import Purpose, Vectors
from .errors import ApiError

#: Texts of one request, as OpenAI's own limit.
MAX_TEXTS = 2048
#: Rows of one answer: with the longest texts 13 MiB.
MAX_HITS = 200

T = TypeVar("T")
_members = msgspec.json.Decoder(dict[str, msgspec.Raw])
_PATH = re.compile(r" - at `\$\.([A-Za-z_]+)|(?:missing required|contains unknown) field `([^`]*)`\Z")


class EmbeddingsRequest(msgspec.Struct):
    """``POST /v1/embeddings``."""

    input: Any
    model: str = ""
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    input_type: Literal["query", "document"] | None = None


class EmbedRequestBody(msgspec.Struct):
    """``POST /embed`` of text-embeddings-inference."""

    inputs: Any
    normalize: bool = True
    truncate: bool | None = False
    prompt_name: str | None = None
    dimensions: int | None = None


class SearchRequest(msgspec.Struct, forbid_unknown_fields=True):
    """``POST /v1/search``. Lists are alternatives; the bounds of the story time belong to the range.

    A misspelt filter would filter nothing, so other fields are refused. The other two requests may have
    fields that this service does not know.
    """

    tenant_id: str
    project_id: str
    query: str = ""
    vector: list[float] | None = None
    collection: str = "story_segments"
    limit: int = 10
    chapter_ids: list[str] = []
    segment_types: list[str] = []
    story_time_from: int | None = None
    story_time_to: int | None = None
    min_score: float | None = None
    mode: Literal["auto", "dense", "hybrid"] = "auto"


def parse(body: bytes, kind: type[T]) -> T:
    """The body of a request; `null` for an optional field counts as absent.

    Raises ApiError 400, with the field at fault.
    """
    try:
        return msgspec.json.decode(_without_nulls(body, kind) if b"null" in body else body, type=kind)
    except msgspec.ValidationError as error:
        found = _PATH.search(str(error))
        raise ApiError(400, f"{error}", param=found[1] or found[2] if found else None) from None
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from None


def _without_nulls(body: bytes, kind: type[Any]) -> bytes:
    """The body without the optional fields that are `null`: clients in typed languages send these."""
    members = _members.decode(body)
    optional = {one.name for one in msgspec.structs.fields(kind) if not one.required}
    nulls = {name for name in optional & members.keys() if bytes(members[name]) == b"null"}
    return msgspec.json.encode({name: value for name, value in members.items() if name not in nulls})


def texts_of(value: Any, field: str) -> list[str]:
    """The texts of a string or a list of strings. Raises ApiError."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise ApiError(400, f"{field} must be a string or a list of strings", param=field)
    if not value:
        raise ApiError(400, f"{field} is empty: give at least one text", param=field)
    if len(value) > MAX_TEXTS:
        raise ApiError(413, f"{field} has {len(value)} texts, the limit is {MAX_TEXTS}", param=field)
    if any(isinstance(one, int) and not isinstance(one, bool) for one in value) or any(
        isinstance(one, list) for one in value
    ):
        raise ApiError(
            400,
            f"{field} holds token ids, which are not supported: they belong to the tokenizer of another "
            "model. Send texts (for example check_embedding_ctx_length=False in LangChain)",
            code="token_ids_not_supported",
            param=field,
        )
    for at, one in enumerate(value):
        if not isinstance(one, str):
            raise ApiError(400, f"{field}[{at}] is not a string", param=field)
    return value


def purpose_of_prompt(name: str | None) -> Purpose:
    """The purpose that a prompt name of text-embeddings-inference means. Raises ApiError."""
    match name:
        case None | "" | "document" | "passage":
            return "document"
        case "query":
            return "query"
    raise ApiError(400, "prompt_name must be query or document", param="prompt_name")


def check_dimensions(dimensions: int | None, full: int, allowed: Sequence[int]) -> None:
    """Raises ApiError unless it is the ``full`` length or one for which the model was trained."""
    if dimensions is None or dimensions == full or dimensions in allowed:
        return
    can = f"one of {', '.join(map(str, [*allowed, full]))}" if allowed else f"{full}, or leave it out"
    raise ApiError(
        400, f"dimensions {dimensions}: this model's vectors cannot be shortened to that; say {can}",
        code="dimensions_not_supported", param="dimensions",
    )  # fmt: skip


def shortened(vectors: Vectors, dimensions: int | None, *, normalise: bool = True) -> Vectors:
    """The first ``dimensions`` of each vector; with ``normalise`` of length 1 again."""
    if dimensions is None or dimensions == vectors.shape[1]:
        return vectors
    cut = np.ascontiguousarray(vectors[:, :dimensions])
    return unit_length(cut) if normalise else cut


def unit_length(vectors: Vectors) -> Vectors:
    """Vectors of length 1; a zero vector stays as it is."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, np.finfo(np.float32).tiny), np.float32)


def embeddings_body(vectors: Vectors, encoding: str, model: str, tokens: int) -> dict[str, Any]:
    """The answer of ``/v1/embeddings``; base64 holds little-endian float32 numbers."""
    rows: Sequence[Any] = list(vectors)
    if encoding == "base64":
        rows = [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in vectors]
    data = [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": model, "usage": usage}
