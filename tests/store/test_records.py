"""Versioned records, in memory and on real servers: a newer version stays, tenants stay apart."""

import threading
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobworker.handlers.jobstore.memory_records import MemoryRecords
from jobworker.handlers.jobstore.open import open_records
from jobworker.handlers.jobstore.records import RecordKey, Records
from jobworker.worker import StoreUnavailable
from support.redis_servers import RedisServer
from support.tools import BY_CONSTRUCTION

AT = "2026-01-02T00:00:00.000Z"


@pytest.fixture
def records(any_server: RedisServer | None) -> Iterator[Records]:
    if any_server is not None:
        any_server.client.flushall()
    opened = open_records(any_server.url) if any_server else MemoryRecords()
    yield opened
    opened.close()


def chapter(id: str = "c1", tenant: str = "t1", project: str = "p1") -> RecordKey:
    return RecordKey("summary", tenant, project, id)


def summary(records: Records, key: RecordKey) -> tuple[int, str] | None:
    found = records.get(key)
    return None if found is None else (found.version, found.fields["summary"])


def test_the_newest_version_stays_in_whatever_order_they_come(records: Records) -> None:
    verdicts = [
        records.put(chapter(), version, {"summary": f"v{version}"}, AT).verdict for version in (3, 1, 7, 7, 5)
    ]
    assert verdicts == ["stored", "older", "stored", "same", "older"]
    assert summary(records, chapter()) == (7, "v7")


def test_a_put_returns_the_stored_record(records: Records) -> None:
    records.put(chapter(), 2, {"summary": "newer"}, AT)
    put = records.put(chapter(), 1, {"summary": "older"}, AT)
    assert put.record == records.get(chapter())
    assert put.record is not None
    assert put.record.fields == {"summary": "newer"}


def test_the_same_version_again_replaces(records: Records) -> None:
    assert [records.put(chapter(), 0, {"summary": text}, AT).verdict for text in ("a", "b", "b")] == [
        "stored",
        "stored",
        "same",
    ]
    assert summary(records, chapter()) == (0, "b")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(versions=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=6))
def test_versions_of_64_bits_are_told_apart(records: Records, versions: list[int]) -> None:
    key = chapter(f"c{hash(tuple(versions)) & 0xFFFFFF}")
    for version in [*versions, versions[0] - 1 if versions[0] > -(2**63) else versions[0]]:
        records.put(key, version, {"summary": str(version)}, AT)
    assert summary(records, key) == (max(versions), str(max(versions)))


@pytest.mark.parametrize(("low", "high"), [(2**53, 2**53 + 1), (-(2**63), -(2**63) + 1), (-1, 0), (9, 10)])
def test_neighbours_are_told_apart(records: Records, low: int, high: int) -> None:
    records.put(chapter(), high, {"summary": "high"}, AT)
    assert records.put(chapter(), low, {"summary": "low"}, AT).verdict == "older"


def test_tenants_and_projects_are_separate(records: Records) -> None:
    for tenant, project in (("t1", "p1"), ("t1", "p2"), ("t2", "p1")):
        records.put(chapter("c", tenant, project), 1, {"summary": tenant + project}, AT)
    assert summary(records, chapter("c", "t1", "p2")) == (1, "t1p2")
    assert summary(records, chapter("c", "t2", "p2")) is None


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("c:d", "a", "b"), ("d", "a", "b:c")),
        (("d", "a", "b:c"), ("c:d", "a", "b")),
        (("d", "a:b", "c"), ("d", "a", "b:c")),
    ],
)
def test_the_second_owner_of_an_ambiguous_key_is_refused(
    records: Records, first: tuple[str, str, str], second: tuple[str, str, str]
) -> None:
    records.put(chapter(*first), 1, {"summary": "mine"}, AT)
    assert records.put(chapter(*second), 9, {"summary": "theirs"}, AT) == ("foreign", None)
    assert records.get(chapter(*second)) is None
    assert summary(records, chapter(*first)) == (1, "mine")


def test_versions_of_different_chapters_are_not_compared(records: Records) -> None:
    key = RecordKey("entity", "t1", "p1", "e1")
    for chapter_id, version, verdict in (("c1", 20, "stored"), ("c2", 1, "stored"), ("c2", 0, "older")):
        fields = {"chapter_id": chapter_id, "name": "阿Q", "description": f"{chapter_id} {version}"}
        assert records.put(key, version, fields, AT).verdict == verdict
    found = records.get(key)
    assert found is not None
    assert found.fields["description"] == "c2 1"


def test_entities_of_a_chapter_are_remembered(records: Records) -> None:
    records.mention(chapter(), ["e2", "e1"])
    records.mention(chapter(), ["e1", "e3"])
    records.mention(chapter("c2"), [])
    assert records.mentioned(chapter()) == ["e1", "e2", "e3"]
    assert records.mentioned(chapter("c2")) == records.mentioned(chapter("c1", "t2")) == []


def test_concurrent_writers_leave_the_newest_version(
    records: Records, any_server: RedisServer | None
) -> None:
    def write(number: int) -> None:
        mine = records if any_server is None else open_records(any_server.url)
        for step in range(50):
            version = (step * 7 + number * 13) % 50
            mine.put(chapter(), version, {"summary": f"v{version}"}, AT)
        if mine is not records:
            mine.close()

    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert summary(records, chapter()) == (49, "v49")


def test_the_hash_has_the_documented_fields(any_server: RedisServer | None) -> None:
    if any_server is None:
        pytest.skip(f"{BY_CONSTRUCTION}the memory store has no other clients")
    any_server.client.flushall()
    records = open_records(any_server.url)
    records.put(chapter("c1"), 3, {"summary": "风雪夜归人"}, AT)
    records.put(chapter("c1", "t:1"), 3, {"summary": "x"}, AT)
    assert any_server.client.hgetall("summary:t1:p1:c1") == {
        b"summary": "风雪夜归人".encode(), b"chapter_version": b"3", b"updated_at": AT.encode(),
    }  # fmt: skip
    assert any_server.client.hget("summary:t:1:p1:c1", "owner") == b"t:1/p1"
    records.close()


def test_a_hash_without_a_version_counts_as_the_oldest(any_server: RedisServer | None) -> None:
    if any_server is None:
        pytest.skip(f"{BY_CONSTRUCTION}the memory store has no other clients")
    any_server.client.flushall()
    any_server.client.hset("summary:t1:p1:c1", mapping={"summary": "by hand", "chapter_version": "latest"})
    records = open_records(any_server.url)
    assert summary(records, chapter()) == (0, "by hand")
    assert records.put(chapter(), 1, {"summary": "ours"}, AT).verdict == "stored"
    assert summary(records, chapter()) == (1, "ours")
    records.close()


def test_a_store_that_is_down_raises_unavailable() -> None:
    records = open_records("redis://127.0.0.1:1/0")
    with pytest.raises(StoreUnavailable):
        records.get(chapter())
    records.close()
