"""Deletions in the job store: tombstones, admission meanwhile, records; in memory and on real servers."""

import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from jobworker.handlers.embedding.handler import EmbeddingBatch, EntityUpsert
from jobworker.handlers.encoder.base import DummyEncoder
from jobworker.handlers.erasure.handler import VectorsDelete
from jobworker.handlers.jobstore.erasures import Published, Scope, Tombstones
from jobworker.handlers.jobstore.fence import WriteIntent
from jobworker.handlers.jobstore.memory_records import MemoryRecords
from jobworker.handlers.jobstore.open import open_erasures, open_records
from jobworker.handlers.jobstore.records import RecordKey, Records
from jobworker.handlers.settings import HandlerSettings
from jobworker.handlers.vectors.milvus.store import open_vectors
from jobworker.worker import ConfigurationError, Job
from support.redis_servers import RedisServer, running
from support.tools import BY_CONSTRUCTION

NAME, HOUR_MS = "z_a", 3_600_000
AT = "2026-01-02T00:00:00.000Z"
#: Far enough in the future that no tombstone ages.
OLD, CUTOFF, NEW = 2**52, 2**52 + 10, 2**52 + 20


def intent(token: str, *ids: str, created_us: int = OLD, owner: str = "", **more: Any) -> WriteIntent:
    given = {"tenant_id": "t", "project_id": "p", "created_us": created_us, **more}
    return WriteIntent(NAME, token, owner or token, ids, **given)


def verdict(fence: Any, one: WriteIntent) -> str:
    return str(fence.admit([one])[0].verdict)


def record(fence: Any, *scope: Any, owner: str = "e", exclusive: bool = True, ttl_ms: int = HOUR_MS) -> Any:
    names = Scope("t", *scope).names
    return fence.record(Tombstones(NAME, owner, names, CUTOFF), ttl_ms=ttl_ms, exclusive=exclusive)


def test_deletions_without_a_job_store_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="empty"):
        open_erasures("")


@pytest.mark.parametrize(
    ("scope", "names"),
    [
        ((), {"t/t"}),
        (("p",), {"p/t/p"}),
        (("p", ("c1", "c9")), {"c/t/p/c1"}),
        (("p", (), ("a", "b")), {"i/t/p/a"}),
    ],
)
def test_older_work_is_told_which_of_its_scopes_are_gone(fence: Any, scope: Any, names: set[str]) -> None:
    assert record(fence, *scope) == {}
    fence.finish(NAME, "e")
    older, same, newer = (
        fence.admit([intent(f"w{us}", "a", "x", created_us=us, chapters=("t/p/c1", "t/p/c2"))])[0]
        for us in (OLD, CUTOFF, NEW)
    )
    assert older.erased == same.erased == names
    assert newer.erased == frozenset()
    for other in ({"tenant_id": "u"}, {"project_id": "q"} if scope else {"tenant_id": "tt"}):
        assert fence.admit([intent("other", "a", **other)])[0].erased == frozenset()


def test_a_deletion_learns_of_the_writes_that_were_admitted_before(fence: Any) -> None:
    first, second, done = intent("w1", "a"), intent("w2", "a", created_us=NEW), intent("w3", "a")
    fence.admit([first, second, done])
    fence.release([done])
    assert record(fence, "p") == {"w1": OLD, "w2": NEW}
    assert fence.writing(NAME) == {"w1", "w2"}
    assert fence.release([first, second]) == [True, True]
    assert fence.writing(NAME) == frozenset()
    assert fence.release([first]) == [False]


def test_the_next_attempt_of_a_job_ends_the_write_of_the_one_that_died(fence: Any) -> None:
    fence.admit([intent("died", "a", delivery="1-0"), intent("abandoned", "a", delivery="2-0")])
    fence.abandon([intent("abandoned", "a", delivery="2-0")])
    writes = record(fence, "p")
    assert writes == {"died": OLD, "abandoned": 0}
    assert verdict(fence, intent("again", "a", delivery="1-0")) == "held"
    assert verdict(fence, intent("again too", "a", delivery="2-0")) == "held"
    assert fence.writing(NAME) == {"abandoned"}, "its request may still run"


def test_other_jobs_of_one_name_end_no_write(fence: Any) -> None:
    fence.admit(
        [intent("one", "a", owner="job", delivery="1-0"), intent("two", "b", owner="job", delivery="2-0")]
    )
    fence.admit([intent("three", "c", owner="job")])
    assert fence.writing(NAME) == {"one", "two", "three"}


def test_newer_work_waits_and_then_holds_its_ids(fence: Any) -> None:
    inside, newer = intent("in", "a", created_us=NEW), intent("new", "a", created_us=NEW)
    fence.admit([inside])
    record(fence, "p", ("c",))
    assert verdict(fence, newer) == "in", "of another chapter"
    fence.release([newer])
    in_chapter = newer._replace(chapters=("t/p/c",))
    assert verdict(fence, in_chapter) == "held"
    assert verdict(fence, inside._replace(chapters=("t/p/c",))) == "in", "it was admitted before"
    record(fence, "p", ("c",), exclusive=False)
    assert verdict(fence, in_chapter) == "hold"
    records_only = in_chapter._replace(token="records", ids=())
    assert verdict(fence, records_only) == "in", "it has nothing to hold"
    fence.release([records_only])
    assert verdict(fence, in_chapter._replace(held=("i/a",))) == "in"
    sweep = WriteIntent(NAME, "sweep", "e", ("a",), ("i/a",))
    assert verdict(fence, sweep) == "held"
    fence.release([in_chapter._replace(held=("i/a",))])
    assert verdict(fence, sweep) == "in"
    assert verdict(fence, in_chapter._replace(held=("i/a",))) == "held"
    fence.finish(NAME, "e")
    assert verdict(fence, in_chapter._replace(held=("i/a",))) == "in"


def test_one_scope_is_deleted_by_one_job_at_a_time(fence: Any) -> None:
    assert record(fence, "p", owner="one") == {}
    assert record(fence, "p", owner="two") is None
    assert record(fence, "q", owner="two") == {}
    assert record(fence, "p", owner="one") == {}
    fence.finish(NAME, "two")
    assert record(fence, "p", owner="two") is None
    fence.finish(NAME, "one")
    assert record(fence, "p", owner="two") == {}


def test_minimum_versions_of_the_scope_are_forgotten(fence: Any) -> None:
    names = ("t/p/c1", "t/p/c2", "t/q/c1", "t2/p/c1")
    write = intent("w", chapters=names)
    fence.record_removal(write, [], dict.fromkeys(names, 5))

    def left() -> set[str]:
        (answer,) = fence.admit([write])
        return set(answer.min_versions)

    fence.forget(NAME, Scope("t", "p", ids=("c1",)), OLD)
    assert left() == set(names)
    fence.forget(NAME, Scope("t", "p", ("c1",)), OLD)
    assert left() == set(names[1:])
    fence.forget(NAME, Scope("t", "p"), OLD)
    assert left() == set(names[2:])
    fence.forget(NAME, Scope("t"), OLD)
    assert left() == {"t2/p/c1"}


def test_the_minimum_version_of_newer_work_survives_a_deletion(fence: Any) -> None:
    """A deletion runs again after a kill; until then newer work of the chapter may have been stored."""
    names = ("t/p/c1", "t/p/c2", "t/p/c3")
    older, newer = (intent("w", chapters=names)._replace(created_us=created_us) for created_us in (5, 15))
    fence.record_removal(newer, [], {"t/p/c1": 8})
    fence.record_removal(older, [], {"t/p/c1": 8, "t/p/c2": 3})
    fence.record_removal(newer, [], {"t/p/c3": 2})
    fence.record_removal(older, [], {"t/p/c3": 4})  # it must not refuse version 3 of newer work
    for scope in (Scope("t", "p", ("c1", "c2", "c3")), Scope("t")):
        fence.forget(NAME, scope, 10)
        (answer,) = fence.admit([newer._replace(tenant_id="")])
        assert answer.min_versions == {"t/p/c1": 8}
    fence.forget(NAME, Scope("t"), 15)
    (answer,) = fence.admit([newer._replace(tenant_id="")])
    assert answer.min_versions == {}


def test_a_collection_that_is_adopted_has_the_tombstones_of_earlier_deletions(fence: Any) -> None:
    for number in range(120):
        fence.publish(Published((f"p/t/p{number}",), CUTOFF, ("z_*",)), HOUR_MS)
    fence.publish(Published(("p/t/p",), CUTOFF, ("z_other", "z_other*")), HOUR_MS)
    fence.publish(Published(("t/u",), CUTOFF, (NAME, "z_other")), HOUR_MS)
    fence.adopt(NAME)
    fence.adopt(NAME)
    assert fence.adopted() == [NAME]
    assert fence.admit([intent("a")])[0].erased == frozenset()
    assert fence.admit([intent("b", project_id="p119")])[0].erased == {"p/t/p119"}
    assert fence.admit([intent("c", tenant_id="u")])[0].erased == {"t/u"}


def test_what_is_published_is_read_from_where_a_reader_stopped(fence: Any) -> None:
    assert fence.published("") == []
    names = tuple(f"i/t/p/{number}" for number in range(2500))
    fence.publish(Published(names, 7, ("*",)), HOUR_MS)
    first = fence.published("")
    assert [name for one in first for name in one.names] == list(names)
    fence.publish(Published(("t/t",), 8, ("z_a",)), HOUR_MS)
    (last,) = fence.published(first[-1].id)
    assert last[:3] == (("t/t",), 8, ("z_a",))
    assert fence.published(last.id) == []


def test_tombstones_age(fence: Any, any_server: RedisServer | None) -> None:
    if any_server is None:
        pytest.skip(f"{BY_CONSTRUCTION}tombstones in memory do not age")
    old = Tombstones(NAME, "e", ("p/t/p",), 1000)
    fence.record(old, ttl_ms=HOUR_MS, exclusive=False)
    assert any_server.client.zcard("writes:{z_a}:erased") == 0
    record(fence, "p")
    assert 0 < any_server.client.pttl("writes:{z_a}:erased") <= HOUR_MS
    assert 0 < any_server.client.pttl("writes:{z_a}:erasing") <= 30_000


def test_a_deletion_sees_which_rows_a_rebuild_has_in_its_hands(fence: Any) -> None:
    assert fence.copying(NAME) == ""
    epoch = fence.begin(NAME, "one", 60_000).epoch
    fence.save(NAME, epoch, {"reading": "1"}, lease_ms=60_000)
    reading = fence.copying(NAME)
    assert reading
    fence.save(NAME, epoch, {"reading": "2"}, lease_ms=60_000)
    assert fence.copying(NAME) not in ("", reading)
    again = fence.begin(NAME, "one", 60_000).epoch
    assert fence.copying(NAME) != reading, "another process has taken over"
    fence.save(NAME, again, {"reading": ""}, lease_ms=60_000)
    assert fence.copying(NAME) == ""
    fence.save(NAME, again, {"reading": "3"}, lease_ms=0)
    assert fence.copying(NAME) == "", "its process is gone"


@pytest.fixture
def records(any_server: RedisServer | None) -> Iterator[Records]:
    if any_server is not None:
        any_server.client.flushall()
    opened = open_records(any_server.url) if any_server else MemoryRecords()
    yield opened
    opened.close()


def fill(records: Records, tenant: str, project: str, *chapters: str) -> list[RecordKey]:
    made = []
    for chapter in chapters:
        key = RecordKey("summary", tenant, project, chapter)
        entity = RecordKey("entity", tenant, project, f"e-{chapter}")
        records.put(key, 1, {"summary": "s"}, AT, OLD)
        records.mention(key, [entity.id, "e-shared"])
        records.put(entity, 1, {"name": "n", "chapter_id": chapter}, AT, OLD)
        made += [key, entity]
    return made


def test_records_are_found_by_tenant_project_and_chapter(records: Records) -> None:
    mine = fill(records, "t", "p", "c1", "c:2")
    also = fill(records, "t", "q", "c1")
    fill(records, "t2", "p", "c1")

    def found(*scope: Any) -> tuple[set[RecordKey], set[RecordKey]]:
        all_ = records.find(Scope(*scope))
        return {*all_.summaries, *all_.entities}, set(all_.mentioning)

    assert found("t", "p") == (set(mine), {mine[0], mine[2]})
    assert found("t") == ({*mine, *also}, {mine[0], mine[2], also[0]})
    assert found("t", "p", ("c1", "absent")) == (set(mine[:2]), {mine[0]})
    assert found("x") == (set(), set())


def test_colons_in_names_mix_up_no_tenants(records: Records) -> None:
    ours = fill(records, "a", "b:c", "x")
    theirs = fill(records, "a:b", "c", "y")
    fill(records, "a", "b", "z")
    for scope, expected in ((("a", "b:c"), ours), (("a:b", "c"), theirs), (("a:b",), theirs)):
        found = records.find(Scope(*scope))
        assert {*found.summaries, *found.entities} == set(expected), scope
    plain = records.find(Scope("a", "b"))
    assert [key.id for key in plain.summaries] == ["z"]


def test_a_record_of_newer_work_is_kept(records: Records) -> None:
    key, entity = fill(records, "t", "p", "c")
    assert not records.discard(key, OLD - 1)
    assert records.put(key, 1, {"summary": "s"}, AT, NEW).verdict == "same"
    assert not records.discard(key, CUTOFF)
    assert records.get(key) is not None
    assert records.discard(entity, CUTOFF)
    assert records.discard(entity, CUTOFF)
    assert records.get(entity) is None
    records.discard_mentions(key)
    assert records.mentioned(key) == []


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running("redis7", tmp_path_factory.mktemp("redis"), appendfsync="always") as server:
        yield server.url


@pytest.mark.parametrize("server", ["lite", "milvus-2.3.5"])
def test_rows_are_deleted_from_a_server_and_late_retries_store_nothing(
    milvus: Callable[[str], str], server: str, redis_url: str
) -> None:
    settings = HandlerSettings(
        redis_url=redis_url, milvus_uri=milvus(server), milvus_prefix=f"d{uuid.uuid4().hex[:8]}_"
    )
    embed, upsert, delete = EmbeddingBatch(DummyEncoder(8)), EntityUpsert(DummyEncoder(8)), VectorsDelete()
    for handler in (embed, upsert, delete):
        handler.setup(settings)
    store = open_vectors(settings.milvus_uri, prefix=settings.milvus_prefix)

    def run(handler: Any, payload: dict[str, Any], created_us: int) -> None:
        handler.handle(Job("j", "any", "t", "p", payload, {}, "", "s", f"{created_us // 1000}-0", 0))

    def write(created_us: int) -> None:
        ids = [f"{server}:{number}" for number in range(1200)]
        chapters = [f"c{number % 2}" for number in range(1200)]
        run(embed, {"ids": ids, "texts": ids, "chapter_ids": chapters}, created_us)
        run(embed, {"ids": [f"n:{server}"], "texts": ["x"], "collection": "notes"}, created_us)
        run(upsert, {"entities": [{"entity_id": "e", "name": "Ann"}]}, created_us)

    def rows(*scope: Any) -> int:
        count = 0
        for name in store.collections():
            after = ""
            while page := store.scan(name, Scope("t", *scope), after, 500):
                count, after = count + len(page), page[-1].id
        return count

    write(OLD)
    assert rows() == 1202
    run(delete, {"chapter_ids": ["c0"]}, OLD + 1000)
    assert (rows("p", ("c0",)), rows()) == (0, 602)
    run(delete, {"ids": ["e"]}, OLD + 1000)
    assert rows() == 601
    run(delete, {"all": True}, OLD + 2000)
    assert rows() == 0
    write(OLD)
    assert rows() == 0
    write(OLD + 3000)
    assert rows() == 1202
    store.close()
