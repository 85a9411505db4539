"""Admission: which entries reach a worker, and why the others become dead letters."""

import json

import pytest

from jobworker.worker.envelope import DeadJob, with_retry
from jobworker.worker.outcome import Reason
from jobworker.worker.reader.admission import (
    ISOLATED_FROM_DELIVERIES,
    MAX_DELIVERIES,
    Admission,
    AdmittedJob,
    RejectedEntry,
)
from jobworker.worker.store.ports import Entry

MAX_PAYLOAD = 1000
MAX_DEATHS = 3
KNOWN = b'{"id":"a","type":"known"}'


@pytest.fixture
def admission() -> Admission:
    return Admission({"other": 0, "known": 1}, MAX_PAYLOAD, MAX_DEATHS)


def sized(length: int) -> bytes:
    """A valid job of ``length`` bytes."""
    return b'{"id":"a","type":"known","payload":"%s"}' % (b"x" * (length - 38))


def rejected(result: AdmittedJob | RejectedEntry) -> DeadJob:
    assert isinstance(result, RejectedEntry)
    return result.job


def test_a_job_of_a_known_type_is_admitted(admission: Admission) -> None:
    entry = Entry(b"1-1", KNOWN)
    assert admission.check(2, entry) == AdmittedJob(2, 1, entry, isolated=False)


def test_an_entry_without_data_is_malformed(admission: Admission) -> None:
    result = rejected(admission.check(0, Entry(b"1-1", None)))
    assert result.reason == Reason.MALFORMED
    assert "data" in result.error


def test_what_is_no_job_is_malformed_and_says_why(admission: Admission) -> None:
    result = rejected(admission.check(0, Entry(b"1-1", b'{"type":"known"}')))
    assert (result.reason, result.envelope) == (Reason.MALFORMED, None)
    assert "`id`" in result.error


@pytest.mark.parametrize(("length", "fits"), [(MAX_PAYLOAD, True), (MAX_PAYLOAD + 1, False)])
def test_a_job_of_exactly_the_limit_is_admitted(admission: Admission, length: int, fits: bool) -> None:
    data = sized(length)
    assert len(data) == length
    result = admission.check(0, Entry(b"1-1", data))
    assert isinstance(result, AdmittedJob) if fits else rejected(result).reason == Reason.OVERSIZED


def test_a_job_of_exactly_the_limit_is_admitted_in_each_try(admission: Admission) -> None:
    """The service's own fields do not count: they would make the first retry too large."""
    data = sized(MAX_PAYLOAD)
    for tries in (1, 2, 1_000_000):
        data = with_retry(data, tries, 1, "ValueError: boom", MAX_PAYLOAD)
        assert isinstance(admission.check(0, Entry(b"1-1", data)), AdmittedJob)


def test_the_fields_of_a_retry_admit_nothing_larger(admission: Admission) -> None:
    retry = with_retry(sized(MAX_PAYLOAD + 1), 1, 0)
    assert rejected(admission.check(0, Entry(b"1-1", retry))).reason == Reason.OVERSIZED


def test_the_size_is_checked_before_anything_is_parsed(admission: Admission) -> None:
    """A huge entry that would be costly to parse is rejected for its size alone."""
    result = rejected(admission.check(0, Entry(b"1-1", b"[" * 10_000_000)))
    assert result.reason == Reason.OVERSIZED
    assert "10000000 bytes" in result.error


@pytest.mark.parametrize(
    ("field", "longest", "longer"),
    [
        ("id", "i" * 512, "i" * 513),
        ("type", "known", "t" * 513),
        ("tenant_id", "t" * 512, "t" * 513),
        ("project_id", "p" * 512, "p" * 513),
        ("created_at", "c" * 512, "c" * 513),
        ("metadata", {"k" * 512: "v" * 16384}, {"k" * 513: ""}),
        ("metadata", {"baggage": "章" * 16384}, {"baggage": "v" * 16385}),
        ("metadata", {str(n): "" for n in range(128)}, {str(n): "" for n in range(129)}),
    ],
)
def test_fields_that_are_repeated_in_logs_are_bounded(field: str, longest: object, longer: object) -> None:
    admission = Admission({"known": 0}, 8 << 20, MAX_DEATHS)
    data = [json.dumps({"id": "a", "type": "known", field: one}).encode() for one in (longest, longer)]
    assert isinstance(admission.check(0, Entry(b"1-1", data[0])), AdmittedJob)
    result = rejected(admission.check(0, Entry(b"1-1", data[1])))
    assert (result.reason, result.envelope) == (Reason.MALFORMED, None)
    assert field in result.error
    assert len(result.error) < 200


def test_an_unknown_type_names_those_that_are_known(admission: Admission) -> None:
    result = rejected(admission.check(0, Entry(b"1-1", b'{"id":"a","type":"Known"}')))
    assert result.reason == Reason.UNKNOWN_TYPE
    assert "'Known'" in result.error
    assert "other, known" in result.error
    assert result.envelope is not None
    assert result.envelope.id == "a"


@pytest.mark.parametrize(
    ("of_this_entry", "of_earlier_tries", "expected"),
    [(0, 0, "run"), (1, 0, "isolated"), (0, 1, "isolated"), (1, 1, "isolated"), (2, 0, "isolated"),
     (3, 0, "poison"), (2, 1, "poison"), (0, 3, "poison"), (5, 5, "poison")],
)  # fmt: skip
def test_deaths_of_all_tries_count(
    admission: Admission, of_this_entry: int, of_earlier_tries: int, expected: str
) -> None:
    data = b'{"id":"a","type":"known","deaths":%d}' % of_earlier_tries
    result = admission.check(0, Entry(b"1-1", data, deaths=of_this_entry))
    if isinstance(result, RejectedEntry):
        assert (result.job.reason, expected) == (Reason.POISON, "poison")
    else:
        assert result.isolated == (expected == "isolated")


@pytest.mark.parametrize(
    ("deliveries", "expected"),
    [(1, "run"), (ISOLATED_FROM_DELIVERIES - 1, "run"), (ISOLATED_FROM_DELIVERIES, "isolated"),
     (MAX_DELIVERIES, "isolated"), (MAX_DELIVERIES + 1, "poison")],
)  # fmt: skip
def test_an_entry_that_no_host_survives_is_poison(
    admission: Admission, deliveries: int, expected: str
) -> None:
    result = admission.check(0, Entry(b"1-1", KNOWN, deliveries=deliveries))
    if isinstance(result, RejectedEntry):
        assert (result.job.reason, expected) == (Reason.POISON, "poison")
    else:
        assert result.isolated == (expected == "isolated")


def test_many_entries_checked_at_once_keep_their_order_and_get_the_same_results(admission: Admission) -> None:
    bodies = [KNOWN, None, sized(MAX_PAYLOAD), b"{", b'{"id":"a","type":"known", "id":"b"}', KNOWN]
    entries = [Entry(b"%d-0" % number, data) for number, data in enumerate(bodies)]
    admitted, rejections = admission.check_all(1, entries)
    results = [admission.check(1, entry) for entry in entries]
    assert admitted == [result for result in results if isinstance(result, AdmittedJob)]
    assert rejections == [result for result in results if isinstance(result, RejectedEntry)]
    assert [job.entry.id for job in admitted] == [b"0-0", b"2-0", b"5-0"]


def by_route(admission: Admission, *data: bytes) -> list[AdmittedJob | RejectedEntry]:
    entries = [Entry(b"1-%d" % number, one) for number, one in enumerate(data)]
    admitted, rejections = admission.check_all(0, entries, by_route=True)
    return [*admitted, *rejections]


UNUSUAL = {
    "unknown type": b'{"id":"a","type":"new"}',
    "no type": b'{"id":"a"}',
    "no JSON": b"{",
    "deaths": b'{"id":"a","type":"known","deaths":1}',
    "poison": b'{"id":"a","type":"known","deaths":3}',
    "first entry": b'{"id":"a","type":"known","metadata":{"idempotency_key":"k"},"jobworker_first_id":"1-0"}',
    "delayed": b'{"id":"a","type":"known","metadata":{"not_before":"2100-01-01T00:00:00Z"}}',
    "expired": b'{"id":"a","type":"known","metadata":{"expires_at":"2000-01-01T00:00:00Z"}}',
    "no time": b'{"id":"a","type":"known","metadata":{"not_before":""}}',
    "series": b'{"id":"a","type":"known","metadata":{"supersede_key":"s"}}',
    "wrong kind in the route": b'{"id":"a","type":"known","metadata":{"batch_id":1}}',
}


@pytest.mark.parametrize("data", [KNOWN, *UNUSUAL.values()], ids=["usual", *UNUSUAL.keys()])
def test_the_route_decides_as_the_whole_header_does(admission: Admission, data: bytes) -> None:
    assert by_route(admission, data) == [admission.check(0, Entry(b"1-0", data))]


KEYED = b'{"id":"a","type":"known","metadata":{"priority":"9","idempotency_key":"k"}}'


@pytest.mark.parametrize("order", [1, -1])
def test_a_job_that_claims_a_key_is_checked_whole(admission: Admission, order: int) -> None:
    """Also among others: other jobs would be dropped as duplicates of a malformed one."""
    malformed = KEYED.replace(b'"id":"a"', b'"id":5')
    found = by_route(admission, *[KNOWN, malformed, KEYED][::order])
    assert [type(one) for one in found] == [AdmittedJob, AdmittedJob, RejectedEntry]
    assert {one.unique for one in found if isinstance(one, AdmittedJob)} > {""}


def test_where_keys_do_not_count_the_route_decides() -> None:
    admission = Admission({"known": 0}, MAX_PAYLOAD, MAX_DEATHS, unique=False)
    (found,) = by_route(admission, KEYED.replace(b'"id":"a"', b'"id":5'))
    assert isinstance(found, AdmittedJob)
    assert found.unique == ""


def test_the_batch_of_a_job_is_noted_by_its_route(admission: Admission) -> None:
    by_route(admission, KNOWN, b'{"id":"a","type":"known","metadata":{"batch_id":"b"}}')
    assert admission.take_batches() == {b"1-1": "b"}


def test_what_the_route_does_not_show_is_left_to_the_worker(admission: Admission) -> None:
    """`job_parser` refuses it, before a handler sees it."""
    (found,) = by_route(admission, b'{"type":"known","project_id":5}')
    assert isinstance(found, AdmittedJob)


def test_an_oversized_entry_is_rejected_among_others(admission: Admission) -> None:
    found = by_route(admission, KNOWN, sized(MAX_PAYLOAD + 1), KNOWN)
    assert [isinstance(one, AdmittedJob) for one in found] == [True, True, False]
