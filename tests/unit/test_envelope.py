"""Which entries are jobs and which are refused; what a retry and a dead letter keep."""

import base64
import json
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobworker.worker.admin.identity import read_identity
from jobworker.worker.envelope import (
    MAX_LAST_ERROR_CHARS,
    MAX_NESTING,
    OVERSIZED_KEPT_BYTES,
    DeadJob,
    Job,
    dead_letter,
    fresh_job,
    job_of,
    job_parser,
    nesting_of,
    read_envelope,
    read_header,
    read_headers,
    read_payload,
    with_retry,
    without_last_error,
)
from jobworker.worker.errors import MalformedJob

#: What an object of a job begins with; a case is the rest of it.
BEGUN = b'{"id":"a","type":"t"'

MALFORMED = {
    "empty": b"",
    "white space": b" \n",
    "null": b"null",
    "a number": b"1",
    "a text": b'"job"',
    "a list": b"[]",
    "a list of jobs": b"[" + BEGUN + b"}]",
    "no fields": b"{}",
    "no id": b'{"type":"t"}',
    "no type": b'{"id":"a"}',
    "empty id": b'{"id":"","type":"t"}',
    "empty type": b'{"id":"a","type":""}',
    "null id": b'{"id":null,"type":"t"}',
    "number as id": b'{"id":1,"type":"t"}',
    "list as type": b'{"id":"a","type":["t"]}',
    "names in capitals": b'{"ID":"a","Type":"t"}',
    "cut off": BEGUN,
    "cut off in a text": b'{"id":"a","type":"t',
    "two objects": BEGUN + b"} {}",
    "trailing data": BEGUN + b"}x",
    "trailing NUL": BEGUN + b"}\0",
    "trailing comma": BEGUN + b",}",
    "byte order mark": b"\xef\xbb\xbf" + BEGUN + b"}",
    "UTF-16": (BEGUN + b"}").decode().encode("utf-16"),
    "UTF-32": (BEGUN + b"}").decode().encode("utf-32-le"),
    "pickle": b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00}\x94.",
    "msgpack": msgspec.msgpack.encode({"id": "a", "type": "t"}),
    "single quotes": b"{'id':'a','type':'t'}",
    "comment": BEGUN + b"/* */}",
    "NUL": b'{"id":"a\0","type":"t"}',
    "raw newline in a text": b'{"id":"a\n","type":"t"}',
    "bad UTF-8": b'{"id":"\xff","type":"t"}',
    "overlong UTF-8": b'{"id":"\xc0\xaf","type":"t"}',
    "surrogate in UTF-8": b'{"id":"\xed\xa0\x80","type":"t"}',
    "bad UTF-8 in an unknown field": BEGUN + b',"x":"\xff"}',
    "bad UTF-8 in an unknown name": BEGUN + b',"\xff":1}',
    "surrogate in an unknown field": BEGUN + b',"x":{"y":["\xed\xa0\x80"]}}',
    "unpaired surrogate": BEGUN + b',"payload":"\\ud800"}',
    "unpaired surrogate before text": BEGUN + b',"payload":"\\ud800\\u0041"}',
    "unpaired low surrogate": BEGUN + b',"x":"\\udc00 and more"}',
    "bad escape": BEGUN + b',"x":"\\q"}',
    "NaN": BEGUN + b',"payload":NaN}',
    "NaN in an unknown field": BEGUN + b',"x":NaN}',
    "Infinity": BEGUN + b',"payload":[-Infinity]}',
    "float out of range": BEGUN + b',"payload":1e999}',
    "integer of 5000 digits": BEGUN + b',"payload":' + b"9" * 5000 + b"}",
    "leading zero": BEGUN + b',"payload":01}',
    "nested deeply": BEGUN + b',"payload":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "nested deeply, never closed": BEGUN + b',"payload":' + b'{"a":' * 100_000,
    "nested deeply in an unknown field": BEGUN + b',"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "id twice": BEGUN + b',"id":"b"}',
    "same id twice": BEGUN + b',"id":"a"}',
    "type twice, once escaped": BEGUN + b',"\\u0074ype":"u"}',
    "unknown field twice": BEGUN + b',"x":1,"x":2}',
    "unknown field twice, spaced": b'{ "id": "a", "type": "t", "x": 1, "x": 2 }',
    "id twice, as much shorter as the timeout is longer": BEGUN + b',"id":"b","timeout":1e9}',
    "payload twice": BEGUN + b',"payload":{},"payload":{}}',
    "number as tenant": BEGUN + b',"tenant_id":1}',
    "null tenant": BEGUN + b',"tenant_id":null}',
    "object as project": BEGUN + b',"project_id":{}}',
    "number in metadata": BEGUN + b',"metadata":{"priority":5}}',
    "list as metadata": BEGUN + b',"metadata":[]}',
    "text as metadata": BEGUN + b',"metadata":"x"}',
    "number as created_at": BEGUN + b',"created_at":1767348000}',
    "negative retry_count": BEGUN + b',"retry_count":-1}',
    "text as retry_count": BEGUN + b',"retry_count":"1"}',
    "half a retry_count": BEGUN + b',"retry_count":0.5}',
    "true as retry_count": BEGUN + b',"retry_count":true}',
    "negative deaths": BEGUN + b',"deaths":-1}',
    "no timeout": BEGUN + b',"timeout":0}',
    "negative timeout": BEGUN + b',"timeout":-5}',
    "text as timeout": BEGUN + b',"timeout":"60"}',
    "true as timeout": BEGUN + b',"timeout":true}',
}

ACCEPTED: dict[str, tuple[bytes, Callable[[Any], bool]]] = {
    "least": (
        BEGUN + b"}",
        lambda e: (e.payload, e.metadata, e.retry_count, e.timeout) == (None, None, 0, None),
    ),
    "spaced": (b' {"id" : "a" ,\r\n\t"type":"t"}\n', lambda e: e.id == "a"),
    "metadata null": (BEGUN + b',"metadata":null}', lambda e: e.metadata is None),
    "payload a text": (BEGUN + b',"payload":"x"}', lambda e: e.payload == "x"),
    "payload null": (BEGUN + b',"payload":null}', lambda e: e.payload is None),
    "payload false": (BEGUN + b',"payload":false}', lambda e: e.payload is False),
    "keys repeated below the top": (BEGUN + b',"payload":{"a":1,"a":2}}', lambda e: e.payload == {"a": 2}),
    "key of the top again below": (BEGUN + b',"payload":{"id":1,"type":2}}', lambda e: e.id == "a"),
    "escaped NUL": (b'{"id":"a\\u0000","type":"t"}', lambda e: e.id == "a\0"),
    "pair of surrogates": (BEGUN + b',"payload":"\\ud83d\\udc09"}', lambda e: e.payload == "🐉"),
    "unknown fields": (BEGUN + b',"x":{"y":[1,{}]},"schema":"v2"}', lambda e: e.id == "a"),
    "whole timeout": (BEGUN + b',"timeout":120}', lambda e: e.timeout == 120.0),
    "part of a second": (BEGUN + b',"timeout":0.25}', lambda e: e.timeout == 0.25),
    "timeout null": (BEGUN + b',"timeout":null}', lambda e: e.timeout is None),
    "beyond 64 bits": (BEGUN + b',"payload":%d}' % 10**30, lambda e: e.payload == 10**30),
    "nested 500 deep": (BEGUN + b',"payload":' + b"[" * 500 + b"]" * 500 + b"}", lambda e: e.payload != []),
    "created_at no time": (BEGUN + b',"created_at":"yesterday"}', lambda e: e.created_at == "yesterday"),
    "8 MiB of text": (BEGUN + b',"payload":"' + b"x" * 2**23 + b'"}', lambda e: len(e.payload) == 2**23),
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed(data: bytes) -> None:
    with pytest.raises(MalformedJob) as caught:
        read_envelope(data)
    assert str(caught.value)


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_worker_refuses_all_that_is_malformed(data: bytes) -> None:
    """The reader may have read no more of it than its route."""
    with pytest.raises((MalformedJob, ValueError, RecursionError)):
        job_parser(frozenset())([BEGUN + b"}", data])


@pytest.mark.parametrize(("data", "as_expected"), ACCEPTED.values(), ids=ACCEPTED.keys())
def test_a_worker_parses_what_is_valid(data: bytes, as_expected: Callable[[Any], bool]) -> None:
    first, second = job_parser(frozenset())([BEGUN + b"}", data])
    assert first.id == "a"
    assert as_expected(second)


def test_of_many_headers_those_that_are_not_compact_are_read_too() -> None:
    jobs = [b'{ "id": "a", "type": "t" }', BEGUN + b',"timeout":1e9}', BEGUN + b"}"]
    assert read_headers(jobs) == [read_header(data) for data in jobs]
    assert read_headers([*jobs, BEGUN + b',"id":"b","timeout":1e9}']) is None
    assert read_headers([*jobs, b"{"]) is None


@pytest.mark.parametrize(("data", "as_expected"), ACCEPTED.values(), ids=ACCEPTED.keys())
def test_the_header_shows_all_but_the_payload(data: bytes, as_expected: Callable[[Any], bool]) -> None:
    header, envelope = msgspec.structs.asdict(read_header(data)), msgspec.structs.asdict(read_envelope(data))
    assert envelope | header | {"payload": None} == envelope | {"payload": None}


@pytest.mark.parametrize("payload", [b'"\xff"', b"1e999"])
@pytest.mark.parametrize("reason", ["poison", "unknown_type"])
def test_a_dead_letter_of_a_job_whose_payload_was_never_read_is_json(payload: bytes, reason: str) -> None:
    data = BEGUN + b',"payload":' + payload + b"}"
    job = DeadJob(data, b"17-1", reason, "no", read_header(data))
    found = json.loads(dead_letter(job, stream="s", worker="w", failed_at="t").decode())
    assert found["task"] is None
    assert base64.b64decode(found["raw"]) == data


@pytest.mark.parametrize(("data", "as_expected"), ACCEPTED.values(), ids=ACCEPTED.keys())
def test_accepted(data: bytes, as_expected: Callable[[Any], bool]) -> None:
    assert as_expected(read_envelope(data))


@given(
    st.one_of(st.binary(max_size=300), st.binary(max_size=100).map(lambda b: BEGUN + b',"x":"' + b + b'"}'))
)
def test_arbitrary_bytes_raise_nothing_but_malformed(data: bytes) -> None:
    try:
        read_envelope(data)
    except MalformedJob:
        return
    retried = with_retry(data, 1, 0)
    assert read_envelope(retried).retry_count == 1
    json.loads(retried.decode())


@given(st.data())
def test_a_damaged_job_raises_nothing_but_malformed(data: st.DataObject) -> None:
    whole = bytearray(
        b'{"id":"j","type":"t","payload":{"a":[1,2.5,"\xe4\xb8\xad"]},"metadata":{"k":"v"},"x":[null]}'
    )
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(whole) - 1))
        whole[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=3))
        if not whole:
            return
    try:
        read_envelope(bytes(whole))
    except MalformedJob:
        return
    json.loads(bytes(whole).decode())  # what is accepted is JSON to others too


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
NUMBERS = st.one_of(st.integers(-(2**63), 2**64 - 1), st.floats(allow_nan=False, allow_infinity=False))
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXT, inner, max_size=4)),
    max_leaves=10,
)
KNOWN = {
    "id": TEXT.filter(bool),
    "type": TEXT.filter(bool),
    "tenant_id": TEXT,
    "project_id": TEXT,
    "payload": VALUES,
    "metadata": st.one_of(st.none(), st.dictionaries(TEXT, TEXT, max_size=3)),
    "created_at": TEXT,
    "retry_count": st.integers(0, 1000),
    "timeout": st.one_of(st.integers(1, 10**6), st.floats(0.001, 1e6)),
    "deaths": st.integers(0, 10),
}
JOBS = st.builds(
    lambda required, optional, unknown: {**unknown, **optional, **required},
    st.fixed_dictionaries({name: KNOWN[name] for name in ("id", "type")}),
    st.fixed_dictionaries({}, optional={k: v for k, v in KNOWN.items() if k not in ("id", "type")}),
    st.dictionaries(TEXT.filter(lambda name: name not in KNOWN), VALUES, max_size=3),
)


@given(JOBS, st.sampled_from([None, 1]), st.booleans(), st.integers(0, 99), st.integers(0, 5))
def test_round_trip(
    job: dict[str, Any], indent: int | None, ascii_only: bool, retry_count: int, deaths: int
) -> None:
    """Any job that can be written as JSON is read with the same values, and keeps them over a retry."""
    separators = (",", ":") if indent is None else None
    data = json.dumps(job, indent=indent, ensure_ascii=ascii_only, separators=separators).encode()
    envelope = read_envelope(data)
    for name in job.keys() & KNOWN.keys():
        assert getattr(envelope, name) == job[name], name
    again = with_retry(data, retry_count, deaths)
    expected = {**job, "retry_count": retry_count, **({"deaths": deaths} if deaths else {})}
    assert json.loads(again) == expected
    assert list(json.loads(again)) == list(expected), "the order changed"
    assert read_envelope(again).retry_count == retry_count
    assert job_of(envelope, "s", "1-1").metadata == (job.get("metadata") or {})


def test_unknown_fields_keep_every_byte_on_retry() -> None:
    odd = b'{"x":1.50,"id":"a","z":{ "b" :[ 1e2,"\\u00e9\\/"]},"type":"t","retry_count":0,"n":%d}' % 10**22
    assert with_retry(odd, 3, 0) == odd.replace(b'"retry_count":0', b'"retry_count":3')


def test_the_last_error_is_added_bounded_replaced_and_removed() -> None:
    job = BEGUN + b',"payload":"jobworker_last_error"}'
    assert without_last_error(job) is job
    first = with_retry(job, 1, 0, "E: one", 1000)
    assert read_identity(first).last_error == "E: one"
    second = with_retry(first, 2, 0, "E: " + "x" * 10_000, 1000)
    assert read_identity(second).last_error == "E: " + "x" * (MAX_LAST_ERROR_CHARS - 3)
    assert (
        without_last_error(second) == with_retry(job, 2, 0) == fresh_job(second)[:-1] + b',"retry_count":2}'
    )
    assert read_envelope(second).retry_count == 2


def test_the_last_error_is_left_out_of_a_job_that_it_would_make_too_large() -> None:
    plain = with_retry(BEGUN + b"}", 1, 0)
    assert with_retry(BEGUN + b"}", 1, 0, "E: one", len(plain) + 10) == plain


# -- dead letters


def letter(
    data: bytes | None,
    reason: str,
    *,
    read: bool = True,
    deaths: int = 0,
    details: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The dead letter of a job. ``read``: its bytes were parsed."""
    envelope = read_envelope(data) if read and data is not None else None
    job = DeadJob(data, b"17-1", reason, "ValueError: no", envelope, deaths, details)
    encoded = dead_letter(
        job, stream="stream:story:gen", worker="host/instance/3", failed_at="2026-01-02T10:00:00.123Z"
    )
    decoded = json.loads(encoded.decode())
    assert isinstance(decoded, dict)
    return decoded


def test_the_dead_letters_shape() -> None:
    assert letter(BEGUN + b',"retry_count":3,"deaths":1}', "exhausted", deaths=1) == {
        "task": {"id": "a", "type": "t", "retry_count": 3, "deaths": 1},
        "error": "ValueError: no",
        "failed_at": "2026-01-02T10:00:00.123Z",
        "reason": "exhausted",
        "original_stream": "stream:story:gen",
        "original_id": "17-1",
        "worker": "host/instance/3",
        "retry_count": 3,
        "deaths": 2,
    }


def test_counts_stand_there_even_when_nothing_was_counted() -> None:
    found = letter(BEGUN + b"}", "unknown_type")
    assert (found["retry_count"], found["deaths"], "raw" in found) == (0, 0, False)


def test_details_are_kept() -> None:
    assert letter(BEGUN + b"}", "poison", details={"stack": "…"})["details"] == {"stack": "…"}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_entry_keeps_its_raw_bytes(data: bytes) -> None:
    found = letter(data, "malformed", read=False)
    assert found["task"] is None
    assert base64.b64decode(found["raw"], validate=True) == data


def test_an_oversized_entry_keeps_its_beginning() -> None:
    data = bytes(range(256)) * 1024
    assert base64.b64decode(letter(data, "oversized", read=False)["raw"]) == data[:OVERSIZED_KEPT_BYTES]
    assert OVERSIZED_KEPT_BYTES == 64 * 1024


def test_a_job_that_must_not_be_parsed_keeps_its_raw_bytes() -> None:
    parsed_later = letter(BEGUN + b"}", "poison", read=False, deaths=2)
    assert (parsed_later["task"], parsed_later["deaths"], parsed_later["retry_count"]) == (None, 2, 0)
    assert base64.b64decode(parsed_later["raw"]) == BEGUN + b"}"


def test_an_entry_without_data_has_nothing_to_keep() -> None:
    found = letter(None, "malformed")
    assert (found["task"], "raw" in found) == (None, False)


@pytest.mark.parametrize(
    ("data", "number"),
    [
        (b'{"id":"a","type":"exact","payload":1234567890123456789.50}', Decimal("1234567890123456789.50")),
        (b'{"payload":1.50,"pad":"%s","id":"a","type":"exact"}' % (b"x" * 600), Decimal("1.50")),
        (b'{"id":"a","type":"ex\\u0061ct","payload":1.50}', Decimal("1.50")),
        (b'{"id":"exact","type":"t","payload":1.50}', 1.5),
        (b'{"id":"a","type":"t","payload":1.50}', 1.5),
    ],
)
def test_only_types_that_ask_for_exact_numbers_get_them(data: bytes, number: Any) -> None:
    found = job_parser(frozenset({"exact", "other"}))([data])[0].payload
    assert (type(found), str(found)) == (type(number), str(number))


@pytest.mark.parametrize("payload", [b"NaN", b"1e999", b'"\xff"', b'"\\ud800"'])
@pytest.mark.parametrize("exact", [frozenset(), frozenset({"t"}), frozenset({"u"})])
def test_every_parser_refuses_a_malformed_payload(exact: frozenset[str], payload: bytes) -> None:
    with pytest.raises((MalformedJob, ValueError)):
        job_parser(exact)([b'{"id":"a","type":"t","payload":%s}' % payload])


def test_a_jobs_key_names_it_alone_and_is_safe_in_a_path() -> None:
    def key(*, id: str = "a", type: str = "t", tenant: str = "", project: str = "", tries: int = 0) -> str:
        return Job(id, type, tenant, project, None, {}, "", "s", "1-1", tries).key

    others = [
        key(id="b"), key(type="u"), key(tenant="a"), key(project="a"), key(id="../a"), key(id="A"),
        key(id="1:a"), key(tenant="t", id="ta"), key(tenant="tt", id="a"), key(id="\ud800"),
    ]  # fmt: skip
    assert key() == key(tries=3)
    assert len({key(), *others}) == 1 + len(others)
    assert all(re.fullmatch("[0-9a-f]{64}", one) for one in others)


def test_the_promised_levels_are_read_on_a_stack_of_a_hundred_frames() -> None:
    data = BEGUN + b',"payload":' + b"[" * (MAX_NESTING - 1) + b"]" * (MAX_NESTING - 1) + b"}"

    def read(frames: int) -> None:
        if frames:
            read(frames - 1)
        else:
            read_envelope(data)

    read(100)


JSON = st.recursive(
    st.none() | st.integers() | st.text('[]{}\\",x\u00e9\n'),
    lambda inner: st.lists(inner) | st.dictionaries(st.text('[]{}\\",x'), inner),
)


def levels_of(value: object) -> int:
    if isinstance(value, dict):
        value = list(value.values())
    return 1 + max(map(levels_of, value), default=0) if isinstance(value, list) else 0


@given(JSON, st.booleans())
def test_levels_are_counted_outside_of_texts(value: object, ascii_only: bool) -> None:
    assert nesting_of(json.dumps(value, ensure_ascii=ascii_only).encode()) == levels_of(value)


SPACES = st.sampled_from([b"", b"", b"", b" ", b"\n\t"])
KEYS = [
    "id",
    "type",
    "payload",
    "timeout",
    "retry_count",
    "deaths",
    "metadata",
    "created_at",
    "other",
    "\u00e9",
]
NUMBERS = st.integers(0, 400).map(lambda exponent: b"1e%d" % exponent) | st.sampled_from(
    [
        b"1e0",
        b"1E+9",
        b"10e-1",
        b"0.1e11",
        b"100000000000000000000",
        b"5",
        b"5.0",
        b"0.50",
        b"0",
        b"-0",
        b"1.0",
    ]
)
TEXTS = st.sampled_from(
    [b'"a"', b'"\\u0061"', b'"\\/"', b'"\x7f"', b'""', '"\u00e9\u2028"'.encode(), b'"\\u00e9"']
)
VALUES = NUMBERS | TEXTS | st.sampled_from([b"null", b"{}", b'{"a":"b","a":"c"}', b"[1, 2]", b"true"])


@st.composite
def objects(draw: st.DrawFn) -> bytes:
    """JSON that may be a job: keys that may stand twice or be escaped, numbers in any form, spaces."""
    members = []
    for key in ["id", "type", *draw(st.lists(st.sampled_from(KEYS), max_size=5))]:
        escaped = json.dumps(key) if draw(st.booleans()) else f'"\\u{ord(key[0]):04x}{key[1:]}"'
        written = escaped.encode() if draw(st.booleans()) else f'"{key}"'.encode()
        kind = {"id": TEXTS, "type": TEXTS, "timeout": NUMBERS, "created_at": TEXTS}.get(key, VALUES)
        members.append(draw(SPACES) + written + draw(SPACES) + b":" + draw(SPACES) + draw(kind))
    return b"{" + b",".join(draw(st.permutations(members))) + draw(SPACES) + b"}"


@given(objects())
def test_a_field_that_stands_twice_is_found_however_it_is_written(data: bytes) -> None:
    keys: list[str] = []
    json.loads(data, object_pairs_hook=lambda pairs: keys.__setitem__(slice(None), [key for key, _ in pairs]))
    try:
        read_header(data)
    except MalformedJob as error:
        if str(error) != "a field occurs twice":
            return
        twice = True
    else:
        twice = False
    assert twice == (len(set(keys)) < len(keys))


@pytest.mark.parametrize("payload", [b'{"a":[1,]}', b'{"a":1e400}', b'{"a":"\\ud800"}'])
def test_a_worker_says_where_in_the_job_a_payload_is_malformed(payload: bytes) -> None:
    data = BEGUN + b',"payload":%s}' % payload
    with pytest.raises(MalformedJob) as in_job:
        read_payload(data)
    with pytest.raises(MalformedJob) as in_worker:
        job_parser(frozenset())([data])
    assert str(in_worker.value) == str(in_job.value)
