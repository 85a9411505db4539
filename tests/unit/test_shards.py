"""Shards: their names, the shard of a job, and the move of entries into them on the store in memory."""

import json
import time
from collections import Counter
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobworker.worker.config.tables import ConfigTables
from jobworker.worker.errors import ConfigurationError
from jobworker.worker.flow import FlowConfig, Limit
from jobworker.worker.forwarding import Forwarder
from jobworker.worker.keys import Source
from jobworker.worker.producer import Producer
from jobworker.worker.producer_batch import BatchChanged
from jobworker.worker.results import SUCCEEDED, CancelOutcome, encode_result
from jobworker.worker.settings import Settings
from jobworker.worker.shards import (
    logical_stream,
    shard_count,
    shard_names,
    shard_number,
    shard_number_of,
    spread,
    unread_shard_advice,
)
from jobworker.worker.store.faults import StreamFaults
from jobworker.worker.store.memory.server import MemoryServer
from jobworker.worker.store.memory.store import MemoryStore
from jobworker.worker.telemetry.metrics import MetricsBuffer
from support.reader_rig import SOURCE, ReaderRig

PLAIN = Source("stream:test", "cg-test")


def job(id: str, tenant: str = "", **metadata: str) -> bytes:
    return json.dumps({"id": id, "type": "noop", "tenant_id": tenant, "metadata": metadata}).encode()


def test_names_are_spread_over_all_slots_and_say_where_they_belong() -> None:
    from redis.crc import key_slot

    for count in (1, 2, 3, 7, 64):
        names = shard_names(PLAIN.stream, count)
        assert [key_slot(name.encode()) * count // 16384 for name in names] == list(range(count))
        assert {(logical_stream(name), shard_count(name)) for name in names} == {(PLAIN.stream, count)}
        assert unread_shard_advice(names[0]).endswith(f"of {PLAIN.stream} with --drain-shards {count}")


@pytest.mark.parametrize(
    "name", ["stream:test", "a:shard-3.0.x", "a:shard-3.5.0", "a:shard-0.0.0", ":shard-", "a:shard-2.0.9999"]
)
def test_other_names_are_no_shards(name: str) -> None:
    assert (logical_stream(name), shard_count(name)) == (name, 0)


def test_a_tenant_has_one_shard_and_jobs_without_one_are_spread_unless_they_are_compared() -> None:
    assert len({shard_number(5, "t001", str(id), None) for id in range(50)}) == 1
    assert len({shard_number(5, f"t{tenant}", "a", None) for tenant in range(50)}) == 5
    assert len({shard_number(5, "", str(id), {}) for id in range(50)}) == 5
    assert len({shard_number(5, "", str(id), {"supersede_key": str(id)}) for id in range(50)}) == 1


class World:
    """A stream that is spread, and forwarders of several hosts; time passes by hand."""

    def __init__(self) -> None:
        self.now_s = 1_767_345_600.0
        self.server = MemoryServer(lambda: self.now_s)
        self.store = MemoryStore(self.server, "here/a")
        self.store.acquire([PLAIN])

    def forwarder(self, shards: int, *drain: int, host: str = "here") -> Forwarder:
        counts = [count for count in (shards, *drain) if count]
        streams = spread([PLAIN], counts)
        settings = Settings(streams=streams, shards=shards, drain_shards=drain, host=host, instance="a")
        metrics = MetricsBuffer()
        faults = StreamFaults(self.store, streams, metrics.gauge, "reaper", None, self.mono_s)  # type: ignore[arg-type]
        return Forwarder(MemoryStore(self.server), settings, metrics, faults, self.mono_s)

    def mono_s(self) -> float:
        return self.now_s

    def send(self, *jobs: bytes) -> None:
        self.store.add(PLAIN.stream, jobs)

    def found(self, shards: int) -> Counter[str]:
        """How often each job is in the shards."""
        entries = [
            e for name in shard_names(PLAIN.stream, shards) for e in self.server.entries(name).values()
        ]
        return Counter(json.loads(entry)["id"] for entry in entries if entry)


def test_entries_are_moved_once_in_the_order_of_their_tenant() -> None:
    world = World()
    world.send(*(job(f"{number:03}", f"t{number % 7}") for number in range(100)))
    assert not world.forwarder(3).run_once()
    assert world.found(3) == Counter(f"{number:03}" for number in range(100))
    assert world.server.entries(PLAIN.stream) == {}
    for name in shard_names(PLAIN.stream, 3):
        ids = [json.loads(data or b"")["id"] for data in world.server.entries(name).values()]
        assert ids == sorted(ids)


def test_one_host_moves_at_a_time_and_another_follows_when_it_is_gone() -> None:
    world = World()
    first, second = world.forwarder(2, host="one"), world.forwarder(2, host="two")
    first.run_once()
    world.send(job("a", "t1"))
    second.run_once()
    assert not world.found(2)
    world.now_s += 3
    second.run_once()
    assert world.found(2) == {"a": 1}


def test_a_number_of_shards_that_is_not_read_any_more_is_said_until_it_is_drained_and_empty() -> None:
    world = World()
    world.send(job("a", "t1"))
    world.forwarder(2).run_once()
    without = world.forwarder(0)
    without.check_used()
    assert without.warnings() == [
        "stream stream:test has shards that this service does not read: give --drain-shards 2"
    ]
    draining = world.forwarder(3, 2)
    draining.check_used()
    world.now_s += 300
    draining.check_used()
    assert world.store.used_shards(PLAIN.stream) == {2}, "a job waits"
    for name in shard_names(PLAIN.stream, 2):
        source = Source(name, PLAIN.group)
        world.store.acquire([source])
        world.store.begin_read(source, 10, 0)
        for entry in world.store.finish_read(source):
            world.server.delete_entry(name, entry.id)
            world.server.stream(name).groups[PLAIN.group].leases.clear()
    draining.check_used()
    assert world.store.used_shards(PLAIN.stream) == {2}, "a producer may send another one"
    world.now_s += 300
    draining.check_used()
    without.check_used()
    assert (world.store.used_shards(PLAIN.stream), without.warnings()) == (set(), [])


def test_a_batch_counts_its_jobs_in_shards() -> None:
    world = World()
    world.store.batch_open(PLAIN.stream, "b1", {"name": b""})
    world.store.batch_add(PLAIN.stream, "b1", "", [job("a", "t1", batch_id="b1")])
    world.forwarder(2).run_once()
    record = world.store.batch_hash(PLAIN.stream, "b1")
    assert record is not None
    (shard,) = record.streams
    (entry_id,) = world.server.entries(shard)
    world.store.acquire([Source(shard, PLAIN.group)])
    world.store.begin_read(Source(shard, PLAIN.group), 1, 0)
    world.store.finish_read(Source(shard, PLAIN.group))
    assert world.store.register_batches(Source(shard, PLAIN.group), {entry_id: "b1"}) == set()


def test_a_producer_sends_to_the_shards_of_running_services_and_finds_results_there() -> None:
    world = World()
    producer = Producer(store=world.store, wall_now_s=world.mono_s)
    world.store.announce("host/a", ["noop"], spread([PLAIN], [2, 3]), shards=3)
    for tenant in ("t1", "t2", "t3", "t4", "t5"):
        producer.enqueue("noop", None, tenant_id=tenant, id=tenant, stream=PLAIN.stream)
    assert world.found(3) == Counter(["t1", "t2", "t3", "t4", "t5"])
    shard = shard_names(PLAIN.stream, 3)[shard_number(3, "t1", "", None)]
    (data, *_) = world.server.entries(shard).values()
    assert shard_number_of(3, data)[0] == shard_number(3, json.loads(data or b"")["tenant_id"], "", None)
    world.server.keep_result(shard, "t1", encode_result(SUCCEEDED, "", value=b"7"), 60.0)
    assert producer.result("t1", 0, stream=PLAIN.stream).value == 7
    with pytest.raises(ValueError, match="send the job to stream 'stream:test'"):
        producer.enqueue("noop", None, stream=shard)
    world.now_s += 300
    with Producer(store=world.store, wall_now_s=world.mono_s) as late:
        late.enqueue("noop", None, tenant_id="t1", id="late", stream=PLAIN.stream)
    assert len(world.server.entries(PLAIN.stream)) == 1, "no service runs that would announce shards"


@pytest.mark.parametrize("on_complete", [None, {"type": "noop", "stream": PLAIN.stream}])
def test_a_batch_is_continued_after_the_number_of_shards_has_changed(on_complete: Any) -> None:
    world = World()
    for shards in (2, 3):
        world.store.announce("host/a", ["noop"], spread([PLAIN], [shards]), shards=shards)
        with Producer(store=world.store, wall_now_s=world.mono_s) as producer:
            batch = producer.batch("t1", id="b1", on_complete=on_complete)
            jobs = [{"type": "noop", "tenant_id": f"t{number}"} for number in range(10)]
            batch.enqueue_many(jobs, stream=PLAIN.stream)
    assert batch.counts().total == 20
    batch.close()
    assert world.store.batch_ids(PLAIN.stream, 10) == ["b1"]


def test_a_job_in_a_shard_is_cancelled_by_the_name_of_its_stream() -> None:
    world = World()
    world.store.announce("host/a", ["noop"], spread([PLAIN], [2]), shards=2)
    for name in shard_names(PLAIN.stream, 2):
        world.store.acquire([Source(name, PLAIN.group)])
    producer = Producer(store=world.store, wall_now_s=world.mono_s)
    for tenant in ("t1", "t2", "t3", "t4"):
        producer.enqueue("noop", None, tenant_id=tenant, id=tenant, stream=PLAIN.stream)
    assert producer.cancel("t1", stream=PLAIN.stream) == CancelOutcome.CANCELLED
    assert world.found(2) == Counter(["t2", "t3", "t4"])


def test_a_job_that_is_moved_is_cancelled_in_its_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    mover = world.forwarder(2)
    world.store.announce("host/a", ["noop"], spread([PLAIN], [2]), shards=2)
    world.send(job("1", "t1"), job("2", "t2"))
    assert world.store.forward_take(PLAIN, "here/a", 0.0, 2, 10)
    monkeypatch.setattr(time, "sleep", lambda _: mover.run_once())
    producer = Producer(store=world.store, wall_now_s=world.mono_s)
    assert producer.cancel("1", stream=PLAIN.stream) == CancelOutcome.CANCELLED
    assert world.found(2) == Counter(["2"])


def test_a_wait_for_a_result_follows_the_job_into_new_shards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World()
    world.store.announce("host/a", ["noop"], spread([PLAIN], [2]), shards=2)
    shard = shard_names(PLAIN.stream, 3)[0]

    def change(_: float) -> None:
        world.store.announce("host/a", ["noop"], spread([PLAIN], [3, 2]), shards=3)
        world.server.keep_result(shard, "1", encode_result(SUCCEEDED, "", value=b"7"), 60.0)

    monkeypatch.setattr(time, "sleep", change)
    monkeypatch.setattr("jobworker.worker.producer._STREAMS_LIFETIME_S", 0.0)
    producer = Producer(store=world.store, wall_now_s=world.mono_s)
    assert producer.result("1", 20, stream=PLAIN.stream).value == 7


def test_of_two_producers_that_know_other_numbers_of_shards_one_fills_a_batch() -> None:
    world = World()
    jobs = [{"type": "noop", "tenant_id": f"t{number}"} for number in range(10)]
    batches = []
    for shards in (2, 3):
        world.store.announce("host/a", ["noop"], spread([PLAIN], [shards]), shards=shards)
        producer = Producer(store=world.store, wall_now_s=world.mono_s)
        batches.append(producer.batch("t1", id="b1", stream=PLAIN.stream))
        batches[-1].enqueue_many([], expected_total=0)
        producer.enqueue("noop", None, stream=PLAIN.stream)  # notes the number of shards
    batches[0].enqueue_many(jobs, stream=PLAIN.stream, expected_total=0)
    with pytest.raises(BatchChanged):
        batches[1].enqueue_many(jobs, stream=PLAIN.stream, expected_total=0)
    assert batches[1].counts().total == 10


def test_jobs_that_were_held_back_for_long_are_sent_to_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    world.store.announce("host/a", ["noop"], spread([PLAIN], [2]), shards=2)
    producer = Producer(store=world.store, wall_now_s=world.mono_s)
    monkeypatch.setattr("jobworker.worker.producer_batch.SHARDS_LIFETIME_S", -1.0)
    producer.enqueue("noop", None, stream=PLAIN.stream)
    producer.batch("t1", id="b1").enqueue_many([{"type": "noop"}], stream=PLAIN.stream)
    assert len(world.server.entries(PLAIN.stream)) == 2, "services may not read the shards any more"


def test_new_shards_have_the_limits_and_weights_of_their_stream() -> None:
    limit = Limit("a/tenant", "a", key="tenant", concurrency=2)
    with closing(ReaderRig(streams=spread([SOURCE], [2]), shards=2)) as rig:
        rig.store.configure(SOURCE, FlowConfig(0, (limit,), {"t1": 3.0}))
        rig.sync()
        for name in shard_names(SOURCE.stream, 2):
            config = rig.store.flow_config(Source(name, SOURCE.group))
            assert (config.limits, config.weights) == ((limit,), {"t1": 3.0})
        shard = Source(name, SOURCE.group)
        assert rig.store.configure(shard, FlowConfig(config.version, (), {}))
        rig.advance(1.1)
        assert rig.store.flow_config(shard).limits == (), "what is changed later stays"


@pytest.mark.parametrize("key", ["project", "global"])
def test_limits_that_span_shards_are_refused(tmp_path: Path, key: str) -> None:
    file = tmp_path / "jobworker.toml"
    file.write_text(f'[[limit]]\ntype = "noop"\nkey = "{key}"\nconcurrency = 2\n')
    settings = Settings(config_file=str(file), shards=2)
    with pytest.raises(ConfigurationError, match=f"key tenant.*noop/{key}"):
        ConfigTables.load(settings)
    assert ConfigTables.load(replace(settings, shards=0)).flow
