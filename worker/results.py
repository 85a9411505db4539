"""Results: what a handler returned for a job that asked to keep it, and what a cancellation did.

The record is the JSON of `JobResult` with the time of its end, under `keys.result_key`. Programs in other
languages read it with GET.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

import msgspec
import orjson

#: Metadata of a job whose result is kept.
KEEP_RESULT = "keep_result"
#: Largest value that is kept, as JSON.
MAX_RESULT_BYTES = 256 * 1024

#: States of a result.
SUCCEEDED, DEAD, CANCELLED = "succeeded", "dead", "cancelled"
#: States of a job that was not run, because of another one (see `Drop` in `outcome`).
DUPLICATE, SUPERSEDED = "duplicate", "superseded"

#: msgspec writes these: with Z for UTC, and with the private fields of dataclasses.
_OPTIONS = orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_DATETIME | orjson.OPT_NON_STR_KEYS


class CancelOutcome(StrEnum):
    """What a cancellation did to a job."""

    #: It waited and was removed: it will not run.
    CANCELLED = "cancelled"
    #: A service has it and was asked to end it. If the job ends before, it has simply ended.
    REQUESTED = "requested"
    #: It had ended before.
    ENDED = "ended"
    #: No such job was found: it was never sent, or it has ended and its entry was trimmed.
    UNKNOWN = "unknown"


class JobResult(msgspec.Struct, frozen=True, omit_defaults=False):
    """How a job ended.

    ``state`` is succeeded, dead (given up for ``reason``), cancelled, or the reason why another job ran
    instead: duplicate or superseded; ``error`` names that one's entry. ``value`` is what the handler
    returned; if it succeeded and ``error`` is not empty, the value could not be kept for that reason.
    """

    state: str
    value: Any = None
    error: str = ""
    reason: str = ""


class Returned:
    """Outcome of one job in ``handle_batch``: it succeeded, and ``value`` is its result."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


#: How one job of a batch ended.
Outcome = BaseException | Returned | None

_results = msgspec.json.Decoder(JobResult)


def is_kept(metadata: Mapping[str, str] | None) -> bool:
    """Whether a job with this metadata asks that its result be kept."""
    return metadata is not None and metadata.get(KEEP_RESULT) == "true"


def encode_value(value: Any) -> bytes:
    """A value as JSON. Raises ValueError if it has no JSON form, or is too large."""
    try:
        data = orjson.dumps(value, _fragment, _OPTIONS)
    except (TypeError, ValueError, OverflowError, RecursionError):
        try:
            data = msgspec.json.encode(value)  # it takes integers beyond 64 bits
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise ValueError(f"the result has no JSON form: {error}") from None
    if len(data) > MAX_RESULT_BYTES:
        raise ValueError(f"the result has {len(data)} bytes of JSON, more than {MAX_RESULT_BYTES}")
    return data


def _fragment(value: Any) -> orjson.Fragment:
    return orjson.Fragment(msgspec.json.encode(value))


def encode_result(
    state: str, finished_at: str, *, value: bytes = b"null", error: str = "", reason: str = ""
) -> bytes:
    """The record of a result. ``value`` is JSON, ``finished_at`` a time in RFC 3339."""
    record = {
        "state": state, "value": orjson.Fragment(value), "error": error, "reason": reason,
        "finished_at": finished_at,
    }  # fmt: skip
    return orjson.dumps(record)


def decode_result(data: bytes) -> JobResult:
    """The inverse. Raises ValueError for a record that another program has damaged."""
    return _results.decode(data)
