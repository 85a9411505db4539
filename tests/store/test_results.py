"""Results in the job store: each exists exactly if its job has ended, in memory and on real servers."""

import pytest

from jobworker.worker.keys import Source
from jobworker.worker.results import DEAD, SUCCEEDED, JobResult, decode_result, encode_result
from jobworker.worker.store.ports import Dead, Entry, Kept, ReaderStore, Settlement
from support.job_store_steps import read
from support.job_worlds import RedisWorld, World, settle

SOURCE = Source("s", "g")
AT = "2026-01-02T09:20:00.000Z"


def job(id: str) -> bytes:
    return b'{"id":"%s","type":"a"}' % id.encode()


def delivered(world: World, *ids: str) -> tuple[ReaderStore, list[Entry]]:
    reader = world.reader("one")
    reader.acquire([SOURCE])
    world.producer().add("s", map(job, ids))
    return reader, read(reader, source=SOURCE)


def result_of(world: World, id: str) -> JobResult | None:
    record = world.producer().result("s", id)
    return None if record is None else decode_result(record)


def test_results_are_kept_with_the_acknowledgement(any_world: World) -> None:
    reader, entries = delivered(any_world, *(f"j{number}" for number in range(5)))
    kept = [
        Kept(entry.id, f"j{number}", encode_result(SUCCEEDED, AT, value=b'{"n":%d}' % number))
        for number, entry in enumerate(entries[:3])
    ]
    done = [entry.id for entry in entries[3:]]
    assert settle(reader, [Settlement(SOURCE, done, kept=kept)]) == set()
    assert any_world.reaper().depths(SOURCE).pending == 0
    assert [result_of(any_world, f"j{number}") for number in range(3)] == [
        JobResult("succeeded", {"n": number}) for number in range(3)
    ]
    assert result_of(any_world, "j3") is None


def test_the_result_of_a_dropped_job_replaces_none(any_world: World) -> None:
    reader, (first, second, third) = delivered(any_world, "j1", "j1", "j2")
    ran, dropped = (encode_result(state, AT) for state in (SUCCEEDED, "duplicate"))
    late = [Kept(second.id, "j1", dropped, is_dropped=True), Kept(third.id, "j2", dropped, is_dropped=True)]
    settle(reader, [Settlement(SOURCE, kept=[Kept(first.id, "j1", ran)]), Settlement(SOURCE, kept=late)])
    assert any_world.reaper().depths(SOURCE).pending == 0
    states = [getattr(result_of(any_world, id), "state", None) for id in ("j1", "j2")]
    assert states == ["succeeded", "duplicate"]


def test_a_dead_letter_keeps_its_reason_as_the_result(any_world: World) -> None:
    reader, (first, second) = delivered(any_world, "j1", "j2")
    record = encode_result(DEAD, AT, error="ValueError: no", reason="exhausted")
    dead = [Dead(first.id, b"letter 1", None, "j1", record), Dead(second.id, b"letter 2")]
    assert settle(reader, [Settlement(SOURCE, dead=dead)]) == set()
    assert any_world.dead_letters("s") == [b"letter 1", b"letter 2"]
    assert result_of(any_world, "j1") == JobResult("dead", None, "ValueError: no", "exhausted")
    assert result_of(any_world, "j2") is None


def test_an_entry_that_is_not_ours_leaves_no_result(any_world: World) -> None:
    reader, (first, second) = delivered(any_world, "j1", "j2")
    assert settle(reader, [Settlement(SOURCE, [first.id])]) == set()
    late = [Kept(one.id, id, encode_result(SUCCEEDED, AT)) for one, id in ((first, "j1"), (second, "j2"))]
    assert settle(reader, [Settlement(SOURCE, kept=late)]) == {first.id}
    dead = [Dead(second.id, b"letter", None, "j1", encode_result(DEAD, AT))]
    assert settle(reader, [Settlement(SOURCE, dead=dead)]) == {second.id}
    assert (result_of(any_world, "j1"), any_world.dead_letters("s")) == (None, [])
    assert result_of(any_world, "j2") == JobResult("succeeded")


def test_a_result_expires(any_world: World) -> None:
    reader, (entry,) = delivered(any_world, "j1")
    kept = [Kept(entry.id, "j1", encode_result(SUCCEEDED, AT))]
    settle(reader, [Settlement(SOURCE, kept=kept, result_ttl_s=1.0)])
    assert result_of(any_world, "j1") is not None
    any_world.pass_time(1.1)
    assert result_of(any_world, "j1") is None


def test_a_thousand_results_are_kept_in_one_settlement(any_world: World) -> None:
    ids = [f"j{number}" for number in range(1200)]
    reader = any_world.reader("one")
    reader.acquire([SOURCE])
    any_world.producer().add("s", map(job, ids))
    entries: list[Entry] = []
    while len(entries) < len(ids):
        entries += read(reader, source=SOURCE)
    kept = [
        Kept(entry.id, id, encode_result(SUCCEEDED, AT, value=b'"%s"' % id.encode()))
        for id, entry in zip(ids, entries, strict=True)
    ]
    assert settle(reader, [Settlement(SOURCE, kept=kept)]) == set()
    assert any_world.reaper().depths(SOURCE).pending == 0
    assert [getattr(result_of(any_world, id), "value", None) for id in ids[::100]] == ids[::100]


@pytest.mark.parametrize("value", [b"[1]", b"{}", b'"text"', b"1.5", b"null"])
def test_a_result_is_a_key_that_any_client_reads(redis_world: RedisWorld, value: bytes) -> None:
    reader, (entry,) = delivered(redis_world, "j1")
    settle(
        reader, [Settlement(SOURCE, kept=[Kept(entry.id, "j1", encode_result(SUCCEEDED, AT, value=value))])]
    )
    text = redis_world.server.client.get("result:s/j1")
    assert text == b'{"state":"succeeded","value":%s,"error":"","reason":"","finished_at":"%s"}' % (
        value, AT.encode(),
    )  # fmt: skip
    assert 3_500_000 < redis_world.server.client.pttl("result:s/j1") <= 3_600_000
