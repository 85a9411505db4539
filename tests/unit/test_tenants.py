"""Tenants with the most waiting jobs."""

from typing import Any

from jobworker.worker.admin import tenants
from jobworker.worker.admin.tenants import waiting_tenants
from jobworker.worker.keys import Source
from jobworker.worker.store.ports import Entry
from support.fake_operator import SOURCE, FakeOperatorStore, job


def store_with(*tenant_ids: str) -> Any:
    store = FakeOperatorStore()
    store.streams[SOURCE.stream] = [
        Entry(f"{number}-0".encode(), job(f"job-{number}", tenant_id=tenant))
        for number, tenant in enumerate(tenant_ids, 1)
    ]
    return store


def test_queued_jobs_are_counted_by_tenant_most_first() -> None:
    store = store_with("a", "b", "b", "a", "b")
    store.read_up_to(b"1-0")
    assert waiting_tenants(store, [SOURCE]) == ([("b", 3), ("a", 1)], 4, True)


def test_a_stream_that_was_never_read_has_only_queued_jobs() -> None:
    assert waiting_tenants(store_with("a"), [SOURCE, Source("other", "g")]).jobs == [("a", 1)]


def test_what_is_no_job_counts_as_without_tenant() -> None:
    store = store_with()
    store.streams[SOURCE.stream] = [Entry(b"1-0", b"not a job"), Entry(b"2-0", None)]
    assert waiting_tenants(store, [SOURCE]).jobs == [("", 2)]


def test_a_long_stream_is_read_in_part() -> None:
    answer = waiting_tenants(store_with(*["a"] * (tenants.MAX_ENTRIES + 1000)), [SOURCE])
    assert not answer.complete
    assert tenants.MAX_ENTRIES <= answer.scanned < tenants.MAX_ENTRIES + 1000
