"""Which entries reach a worker, and why the others do not."""

import json

import pytest

from jobworker.worker.outcome import Reason
from jobworker.worker.reader.admission import (
    ALONE_AFTER_DELIVERIES,
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
def triage() -> Admission:
    return Admission({"other": 0, "known": 1}, MAX_PAYLOAD, MAX_DEATHS)


def sized(length: int) -> bytes:
    """A valid job of `size` bytes."""
    return b'{"id":"a","type":"known","payload":"%s"}' % (b"x" * (length - 38))


def refused(verdict: AdmittedJob | RejectedEntry) -> RejectedEntry:
    assert isinstance(verdict, RejectedEntry)
    return verdict


def test_a_job_of_a_known_type_arrives(triage: Admission) -> None:
    entry = Entry(b"1-1", KNOWN)
    assert triage(2, entry) == AdmittedJob(2, 1, entry, alone=False)


def test_an_entry_without_data_is_malformed(triage: Admission) -> None:
    verdict = refused(triage(0, Entry(b"1-1", None)))
    assert verdict.reason == Reason.MALFORMED
    assert "data" in verdict.error


def test_what_is_no_job_is_malformed_and_says_why(triage: Admission) -> None:
    verdict = refused(triage(0, Entry(b"1-1", b'{"type":"known"}')))
    assert (verdict.reason, verdict.envelope) == (Reason.MALFORMED, None)
    assert "`id`" in verdict.error


@pytest.mark.parametrize(("length", "fits"), [(MAX_PAYLOAD, True), (MAX_PAYLOAD + 1, False)])
def test_the_limit_itself_still_fits(triage: Admission, length: int, fits: bool) -> None:
    data = sized(length)
    assert len(data) == length
    verdict = triage(0, Entry(b"1-1", data))
    assert isinstance(verdict, AdmittedJob) if fits else refused(verdict).reason == Reason.OVERSIZED


def test_size_is_looked_at_before_anything_is_parsed(triage: Admission) -> None:
    """A huge entry that would be costly to parse is refused for its size alone."""
    verdict = refused(triage(0, Entry(b"1-1", b"[" * 10_000_000)))
    assert verdict.reason == Reason.OVERSIZED
    assert "10000000 bytes" in verdict.error


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
def test_what_is_repeated_in_logs_is_bounded(field: str, longest: object, longer: object) -> None:
    triage = Admission({"known": 0}, 8 << 20, MAX_DEATHS)
    data = [json.dumps({"id": "a", "type": "known", field: one}).encode() for one in (longest, longer)]
    assert isinstance(triage(0, Entry(b"1-1", data[0])), AdmittedJob)
    verdict = refused(triage(0, Entry(b"1-1", data[1])))
    assert (verdict.reason, verdict.envelope) == (Reason.MALFORMED, None)
    assert field in verdict.error
    assert len(verdict.error) < 200


def test_an_unknown_type_names_those_that_are_known(triage: Admission) -> None:
    verdict = refused(triage(0, Entry(b"1-1", b'{"id":"a","type":"Known"}')))
    assert verdict.reason == Reason.UNKNOWN_TYPE
    assert "'Known'" in verdict.error
    assert "other, known" in verdict.error
    assert verdict.envelope is not None
    assert verdict.envelope.id == "a"


@pytest.mark.parametrize(
    ("of_this_entry", "of_earlier_tries", "becomes"),
    [(0, 0, "run"), (1, 0, "alone"), (0, 1, "alone"), (1, 1, "alone"), (2, 0, "alone"), (3, 0, "poison"),
     (2, 1, "poison"), (0, 3, "poison"), (5, 5, "poison")],
)  # fmt: skip
def test_deaths_of_all_tries_count(
    triage: Admission, of_this_entry: int, of_earlier_tries: int, becomes: str
) -> None:
    data = b'{"id":"a","type":"known","deaths":%d}' % of_earlier_tries
    verdict = triage(0, Entry(b"1-1", data, deaths=of_this_entry))
    if isinstance(verdict, RejectedEntry):
        assert (verdict.reason, becomes) == (Reason.POISON, "poison")
    else:
        assert verdict.alone == (becomes == "alone")


@pytest.mark.parametrize(
    ("deliveries", "becomes"),
    [(1, "run"), (ALONE_AFTER_DELIVERIES - 1, "run"), (ALONE_AFTER_DELIVERIES, "alone"),
     (MAX_DELIVERIES, "alone"), (MAX_DELIVERIES + 1, "poison")],
)  # fmt: skip
def test_what_no_host_survives_is_given_up(triage: Admission, deliveries: int, becomes: str) -> None:
    verdict = triage(0, Entry(b"1-1", KNOWN, deliveries=deliveries))
    if isinstance(verdict, RejectedEntry):
        assert (verdict.reason, becomes) == (Reason.POISON, "poison")
    else:
        assert verdict.alone == (becomes == "alone")


def test_what_is_sifted_keeps_its_order_and_gets_the_same_verdicts(triage: Admission) -> None:
    bodies = [KNOWN, None, sized(MAX_PAYLOAD), b"{", b'{"id":"a","type":"known", "id":"b"}', KNOWN]
    entries = [Entry(b"%d-0" % number, data) for number, data in enumerate(bodies)]
    arrivals, refusals = triage.sift(1, entries)
    verdicts = [triage(1, entry) for entry in entries]
    assert arrivals == [verdict for verdict in verdicts if isinstance(verdict, AdmittedJob)]
    assert refusals == [verdict for verdict in verdicts if isinstance(verdict, RejectedEntry)]
    assert [arrival.entry.id for arrival in arrivals] == [b"0-0", b"2-0", b"5-0"]
