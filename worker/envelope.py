"""The wire format of a job: parse, validate, write retries and dead letters."""

import base64
import decimal
import hashlib

# orjson does not show a key that occurs twice.
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence, Set
from itertools import accumulate
from operator import attrgetter
from typing import Annotated, Any, NamedTuple

import msgspec
import orjson
from msgspec.structs import force_setattr

from .errors import MalformedJob

#: Raw bytes kept in the dead letter of an oversized entry: enough to recognise it by.
OVERSIZED_KEPT_BYTES = 64 * 1024


#: Longest `id`, `type`, `tenant_id`, `project_id` and `created_at`, in characters. They are repeated in log
#: lines, metrics and dead letters. The builtin types take ids of 64; eight times that fits any URL-like id.
MAX_NAME_CHARS = 512
#: Longest key of `metadata`: a name, too.
MAX_METADATA_KEY_CHARS = 512
#: Longest value of `metadata`. W3C Baggage has to be passed on up to 8,192 bytes and is the longest header
#: that tracing puts there (`traceparent` has 55, `tracestate` 512); twice that leaves room for what is added.
MAX_METADATA_VALUE_CHARS = 16 * 1024
#: Most entries of `metadata`: as many as HTTP servers take headers, and a few more.
MAX_METADATA_ENTRIES = 128
#: Longest error text in a dead letter: a whole error of a handler (`outcome.MAX_ERROR_CHARS`), escaped.
MAX_LETTER_ERROR_CHARS = 32 * 1024

#: Most levels of lists and objects in a job that every service reads. The parser's own limit is the depth
#: that Python's stack has left: nearly 1,000, less in a deep stack.
MAX_NESTING = 800

#: Member of a retried job: the error of its last try. The prefix keeps it apart from fields of producers.
LAST_ERROR_FIELD = "jobworker_last_error"
#: Longest such error, in characters. The payload limit counts it, so it must be short.
MAX_LAST_ERROR_CHARS = 500

#: Member of a job with start conditions that was moved: the id of its first entry.
FIRST_ID_FIELD = "jobworker_first_id"
#: Member of a job with start conditions that an operator has requeued.
REQUEUED_FIELD = "jobworker_requeued"

#: Members that the service adds to a job for its retries.
OWN_FIELDS = ("retry_count", "deaths", LAST_ERROR_FIELD, FIRST_ID_FIELD, REQUEUED_FIELD)
#: Allowance for all but the error beyond the payload limit. The counters take 39 bytes with seven digits
#: each, the others at most 92.
OWN_FIELDS_BYTES = 144

#: Least and largest timeout that a job can set. Each timeout costs a worker, and its successor may need long
#: to start; and a job that hangs must not occupy a worker for ever.
MIN_TIMEOUT_S, MAX_TIMEOUT_S = 0.1, 86_400.0
#: Metadata field that names the batch in which a job is counted.
BATCH_FIELD = "batch_id"
_BATCH_ID = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
#: No job is tried so often; a count beyond is a mistake or an attack on arithmetic.
_MOST_TRIES = 1_000_000


_NULL = msgspec.Raw(b"null")

_Name = Annotated[str, msgspec.Meta(max_length=MAX_NAME_CHARS)]
_FirstId = Annotated[str, msgspec.Meta(pattern=r"\A([0-9]{1,20}-[0-9]{1,20})?\Z")]
_RequiredName = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_NAME_CHARS)]
_Metadata = Annotated[
    dict[
        Annotated[str, msgspec.Meta(max_length=MAX_METADATA_KEY_CHARS)],
        Annotated[str, msgspec.Meta(max_length=MAX_METADATA_VALUE_CHARS)],
    ],
    msgspec.Meta(max_length=MAX_METADATA_ENTRIES),
]


class Header(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """A job as the reader sees it: the payload is its bytes, and what is in it is not checked."""

    id: _RequiredName
    type: _RequiredName
    tenant_id: _Name = ""
    project_id: _Name = ""
    payload: msgspec.Raw = _NULL
    metadata: _Metadata | None = None
    created_at: _Name = ""
    retry_count: Annotated[int, msgspec.Meta(ge=0, le=_MOST_TRIES)] = 0
    timeout: Annotated[float, msgspec.Meta(gt=0)] | None = None
    deaths: Annotated[int, msgspec.Meta(ge=0, le=_MOST_TRIES)] = 0
    first_id: _FirstId = msgspec.field(default="", name=FIRST_ID_FIELD)
    requeued: bool = msgspec.field(default=False, name=REQUEUED_FIELD)


class RouteMetadata(msgspec.Struct, frozen=True, gc=False):
    """The metadata on which the reader acts before a job starts."""

    idempotency_key: str | None = None
    supersede_key: str | None = None
    not_before: str | None = None
    expires_at: str | None = None
    batch_id: str | None = None


class Route(msgspec.Struct, frozen=True, gc=False):
    """The fields by which the reader hands a job to a worker. All others are not looked at."""

    type: str
    tenant_id: str = ""
    metadata: RouteMetadata | None = None
    deaths: int = 0
    first_id: str = msgspec.field(default="", name=FIRST_ID_FIELD)


class Envelope(Header, frozen=True, gc=False, omit_defaults=True):
    """A job on the wire with its payload. Fields that are not named here survive a retry untouched."""

    payload: Any = None


class Cancellation:
    """How a process learns that jobs which it runs were cancelled; both None outside a worker."""

    __slots__ = ("of_all", "of_job")

    def __init__(self) -> None:
        #: Whether a job was cancelled.
        self.of_job: Callable[[Job], bool] | None = None
        #: Whether all running jobs were cancelled.
        self.of_all: Callable[[], bool] | None = None


cancellation = Cancellation()


class Job(msgspec.Struct, frozen=True, gc=False):
    """What a handler is given."""

    id: str
    type: str
    tenant_id: str
    project_id: str
    payload: Any
    metadata: dict[str, str]
    created_at: str
    stream: str
    entry_id: str
    retry_count: int

    @property
    def cancelled(self) -> bool:
        """Whether an operator or the producer cancelled the job while it ran.

        A handler that sees it raises `JobCancelled`, or returns if the work is done all the same.
        """
        return cancellation.of_job is not None and cancellation.of_job(self)

    @property
    def key(self) -> str:
        """Name of the job's effects, 64 hexadecimal digits: safe in paths, URLs and headers, as `id` is not.

        It is the same in each try, and in each job with this type, tenant, project and id.
        """
        names = (self.type, self.tenant_id, self.project_id, self.id)
        joined = "".join(f"{len(name)}:{name}" for name in names)
        return hashlib.sha256(joined.encode("utf-8", "surrogatepass")).hexdigest()


def exact_number(text: str) -> decimal.Decimal | float:
    """A number of JSON with a fraction or an exponent, with every digit. Raises ValueError beyond a float."""
    rounded = float(text)
    if math.isinf(rounded):
        raise ValueError("Number out of range")
    try:
        return decimal.Decimal(text)
    except decimal.InvalidOperation:  # an exponent of more than 18 digits: as a float it is 0
        return rounded


_LEVELS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
_NO_BRACKETS = bytes(set(range(256)) - {*_LEVELS, ord('"')})
_STRING = re.compile(rb'"[^"]*"')

#: Most bytes of jobs whose headers are checked together: the check copies them.
_TOGETHER_BYTES = 1024 * 1024

_header = msgspec.json.Decoder(Header)
_decode_header = _header.decode
_decode_route = msgspec.json.Decoder(Route).decode
_envelope = msgspec.json.Decoder(Envelope)
_exact_envelope = msgspec.json.Decoder(Envelope, float_hook=exact_number)
_payload = msgspec.json.Decoder()
_exact_payload = msgspec.json.Decoder(float_hook=exact_number)
#: Members as bytes, to be written as they are: `orjson.Fragment` would need a copy of each.
_members = msgspec.json.Decoder(dict[str, msgspec.Raw])
_encoder = msgspec.json.Encoder()
_encode, _encode_lines = _encoder.encode, _encoder.encode_lines
_timeout_of = attrgetter("timeout")


def read_header(data: bytes) -> Header:
    """Check one job, except for the inside of its payload. `read_payload` checks that, in the worker.

    Passing over a payload takes a quarter of the time of parsing it.

    Raises `MalformedJob` for anything but a JSON object with ``id`` and ``type``, every known field of its
    right kind and length, and no field twice.
    """
    try:
        header = _decode_header(data)
        repeated = _repeats_a_field(header, data)
    except (ValueError, RecursionError) as error:  # both parsers' errors and bad UTF-8 are ValueErrors
        raise MalformedJob(why_malformed(error)) from None
    if repeated:
        raise MalformedJob("a field occurs twice")
    return header


def read_routes(jobs: Sequence[bytes]) -> list[Route] | None:
    """The routes of jobs, in less than half of the time of `read_headers`; None if one of them has none.

    What they do not show may be malformed: the worker looks at all of a job before a handler sees it.
    """
    try:
        return [_decode_route(data) for data in jobs]
    except (ValueError, RecursionError):
        return None


def read_headers(jobs: Sequence[bytes]) -> list[Header] | None:
    """`read_header` of each of many jobs, in less time; None if it would refuse one of them."""
    try:
        headers = [_decode_header(data) for data in jobs]
        size_bytes = sum(map(len, jobs))
        together = size_bytes <= _TOGETHER_BYTES and not any(map(_timeout_of, headers))
        if together and len(_encode_lines(headers)) == size_bytes + len(jobs):
            return headers  # as in `_repeats_a_field`: none is longer than its members
        if any(map(_repeats_a_field, headers, jobs)):
            return None
    except (ValueError, RecursionError):
        return None
    return headers


def _repeats_a_field(header: Header, data: bytes) -> bool:
    # Parsing keeps one of each key, so what is as long as its own members holds nothing twice. That spares
    # compact JSON, which every producer but a person writes, the slow look. A timeout is the one member that
    # may be written longer than it was: 1e9 becomes 1000000000.0.
    as_long = header.timeout is None and len(_encode(header)) == len(data)
    return not as_long and _repeats_a_key(data)


def read_payload(data: bytes, exact_types: Set[str] = frozenset()) -> Envelope:
    """Parse a job that `read_header` has accepted.

    In payloads of ``exact_types``, numbers with a fraction or an exponent are `decimal.Decimal`. Raises
    `MalformedJob` for a payload that is not JSON in UTF-8: also for NaN, unpaired surrogates and nesting past
    the parser's depth.
    """
    try:
        envelope = _envelope.decode(data)
        return _exact_envelope.decode(data) if envelope.type in exact_types else envelope
    except (ValueError, RecursionError) as error:
        raise MalformedJob(why_malformed(error)) from None


def job_parser(
    exact_types: Set[str], raw_types: Set[str] = frozenset()
) -> Callable[[Sequence[bytes]], list[Header]]:
    """A function that parses many jobs with every check, in less time than `read_envelope` for each.

    It raises `MalformedJob`, ValueError or RecursionError if one of them is malformed. ``exact_types`` are
    those of `read_payload`. Payloads of ``raw_types`` stay bytes: their handlers parse them into a type of
    their own.
    """
    decode, decode_exact = _payload.decode, _exact_payload.decode

    def parse(jobs: Sequence[bytes]) -> list[Header]:
        headers = read_headers(jobs) or [read_header(data) for data in jobs]
        try:
            for header in headers:
                if header.type not in raw_types:
                    exact = header.type in exact_types
                    force_setattr(header, "payload", (decode_exact if exact else decode)(header.payload))
        except (ValueError, RecursionError):
            for data in jobs:
                read_payload(data, exact_types)  # its error says where in the job, not where in the payload
            raise
        return headers

    return parse


def read_envelope(data: bytes) -> Envelope:
    """Parse one job with every check. Raises `MalformedJob`, as `read_header` and `read_payload` do."""
    read_header(data)
    return read_payload(data)


def nesting_of(data: bytes) -> int:
    """Levels of lists and objects in valid JSON. The time is linear."""
    bare = data.replace(b"\\\\", b"").replace(b'\\"', b"")  # the quotes that are left begin or end a string
    brackets = _STRING.sub(b"", bare.translate(None, _NO_BRACKETS))
    return max(accumulate(map(_LEVELS.__getitem__, brackets)), default=0)


def _is_valid(data: bytes) -> bool:
    """Whether a job whose header is valid can be part of other JSON."""
    try:
        read_payload(data)
    except MalformedJob:
        return False
    return True


def why_malformed(error: Exception) -> str:
    """What an error of a parser says about the job."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return str(error)


def _repeats_a_key(data: bytes) -> bool:
    """Whether a key occurs twice at the top level: JSON readers disagree on which copy counts."""
    data.decode()  # the parser passes over the strings of fields that it does not know
    members = _members.decode(data)
    punctuation = 4 * len(members) + 1  # two quotes, a colon and a comma or brace each, and the first brace
    if sum(map(len, members)) + sum(map(len, members.values())) + punctuation == len(data):
        return False
    return _repeats_a_key_by_parsing(data)


def _repeats_a_key_by_parsing(data: bytes) -> bool:
    outermost: list[tuple[str, Any]] = []

    def remember(pairs: list[tuple[str, Any]]) -> None:
        outermost[:] = pairs  # objects are finished from the inside out

    json.loads(data, object_pairs_hook=remember)
    keys = [key for key, _ in outermost]
    return len(set(keys)) < len(keys)


def job_of(envelope: Header, stream: str, entry_id: str) -> Job:
    """The handler's view of a job."""
    return Job(
        envelope.id,
        envelope.type,
        envelope.tenant_id,
        envelope.project_id,
        envelope.payload,
        envelope.metadata or {},
        envelope.created_at,
        stream,
        entry_id,
        envelope.retry_count,
    )


def with_retry(
    data: bytes, retry_count: int, deaths: int, error: str = "", max_bytes: int = 0, first_id: str = ""
) -> bytes:
    """The same job with a new retry count; every other member keeps its bytes and its place.

    ``error`` is added for people who ask why the job waits, unless the job would exceed ``max_bytes``. A job
    with start conditions needs its ``first_id``.
    """
    members = _members.decode(data)
    members.pop(LAST_ERROR_FIELD, None)
    if first_id:
        members[FIRST_ID_FIELD] = msgspec.Raw(b'"%s"' % first_id.encode())
    members["retry_count"] = msgspec.Raw(b"%d" % retry_count)
    if deaths:
        members["deaths"] = msgspec.Raw(b"%d" % deaths)
    retry = msgspec.json.encode(members)
    if not error:
        return retry
    members[LAST_ERROR_FIELD] = msgspec.Raw(orjson.dumps(error[:MAX_LAST_ERROR_CHARS]))
    explained = msgspec.json.encode(members)
    return explained if len(explained) <= max_bytes else retry


def with_first_id(data: bytes, first_id: str) -> bytes:
    """The same job with the id of its first entry."""
    members = _members.decode(data)
    members[FIRST_ID_FIELD] = msgspec.Raw(b'"%s"' % first_id.encode())
    return msgspec.json.encode(members)


def requeued_job(data: bytes, original_id: str) -> bytes:
    """A dead letter's job with start conditions, to be run again. ``original_id`` is the letter's entry.

    The id of its first entry is kept, because a newer job may have replaced it since.
    """
    members = _members.decode(data)
    first_id = members.get(FIRST_ID_FIELD, msgspec.Raw(b'"%s"' % original_id.encode()))
    for name in OWN_FIELDS:
        members.pop(name, None)
    members[FIRST_ID_FIELD] = first_id
    members[REQUEUED_FIELD] = msgspec.Raw(b"true")
    return msgspec.json.encode(members)


def without_last_error(data: bytes) -> bytes:
    """The job as its producer sent it, with its counters; the same object if it holds no last error."""
    if LAST_ERROR_FIELD.encode() not in data:
        return data
    members = _members.decode(data)
    if members.pop(LAST_ERROR_FIELD, None) is None:
        return data  # a text in the payload
    return msgspec.json.encode(members)


def fresh_job(data: bytes) -> bytes:
    """The job without `OWN_FIELDS`; the same object if it has none. All other members keep their bytes."""
    members = _members.decode(data)
    own = [name for name in OWN_FIELDS if name in members]
    if not own:
        return data
    for name in own:
        del members[name]
    return msgspec.json.encode(members)


class _Member(msgspec.Struct):
    metadata: dict[str, str] | None = None


_member = msgspec.json.Decoder(_Member)


def batch_of(data: bytes) -> str:
    """The batch of a job that was not checked; empty if it has none, or the bytes are no job."""
    if BATCH_FIELD.encode() not in data:
        return ""
    try:
        return batch_in(_member.decode(data).metadata)
    except (ValueError, RecursionError):
        return ""


def batch_in(metadata: Mapping[str, str] | None) -> str:
    """The batch that metadata name; empty if there is none, or it cannot be the id of a batch."""
    id = metadata.get(BATCH_FIELD, "") if metadata else ""
    return id if is_batch_id(id) else ""


def is_batch_id(text: str) -> bool:
    """Whether a text may be the id of a batch: it is part of keys and URLs."""
    return _BATCH_ID.fullmatch(text) is not None


def is_oversized(data: bytes, max_payload: int) -> bool:
    """Whether a job exceeds the limit without what the service adds to it for a retry.

    A job far beyond the limit is not parsed.
    """
    if len(data) <= max_payload:
        return False
    if len(data) > max_payload + OWN_FIELDS_BYTES:
        return True
    try:
        return len(fresh_job(data)) > max_payload
    except (ValueError, RecursionError):
        return True


class DeadJob(NamedTuple):
    """A job that is given up, and what its dead letter states.

    ``envelope`` is None if the bytes could not be parsed, or must not be parsed: the letter keeps them as
    base64, as it does those of a job whose payload is malformed. ``deaths`` counts the workers that died
    under this entry; the envelope counts those of earlier tries.
    """

    data: bytes | None
    entry_id: bytes
    reason: str
    error: str
    envelope: Header | None = None
    deaths: int = 0
    details: dict[str, Any] | None = None


def dead_letter(job: DeadJob, *, stream: str, worker: str, failed_at: str) -> bytes:
    """The JSON of an entry of ``dlq:<stream>``. ``raw`` is base64, only where the task could not be read."""
    data, envelope = job.data, job.envelope
    task, raw = b"null", None
    if data is not None and envelope is not None and _is_valid(data):
        task = without_last_error(data)
    elif data is not None:
        raw = base64.b64encode(data[:OVERSIZED_KEPT_BYTES] if job.reason == "oversized" else data).decode()
    letter: dict[str, Any] = {
        "task": orjson.Fragment(task),
        "error": job.error[:MAX_LETTER_ERROR_CHARS],
        "failed_at": failed_at,
        "reason": job.reason,
        "original_stream": stream,
        "original_id": job.entry_id.decode(),
        "worker": worker,
        "retry_count": envelope.retry_count if envelope else 0,
        "deaths": job.deaths + (envelope.deaths if envelope else 0),
    }
    if raw is not None:
        letter["raw"] = raw
    if job.details is not None:
        letter["details"] = job.details
    return orjson.dumps(letter)
