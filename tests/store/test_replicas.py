"""--wait-replicas with a real replica: what it has not confirmed is reported, and not lost."""

import os
import signal
from pathlib import Path

from jobworker.worker.keys import Source
from jobworker.worker.store.forwarding import ForwardEntry
from jobworker.worker.store.ports import Settlement
from jobworker.worker.store.redis.producer import RedisProducerStore
from jobworker.worker.store.redis.reader import RedisReaderStore
from jobworker.worker.store.redis.reaper import RedisReaperStore
from support.redis_servers import RedisServer, require
from support.topologies import eventually

S = Source("stream:test", "cg-test")


def test_a_settlement_without_its_replica_is_valid_and_reported(tmp_path: Path) -> None:
    (tmp_path / "master").mkdir()
    (tmp_path / "replica").mkdir()
    master = RedisServer(require("valkey"), tmp_path / "master")
    replica = RedisServer(
        require("valkey"), tmp_path / "replica", options=["--replicaof", "127.0.0.1", str(master.port)]
    )
    reader = RedisReaderStore(master.url, "one", wait_replicas=1)
    reaper = RedisReaperStore(master.url, wait_replicas=1)
    moved = [ForwardEntry(b"%d-0" % number, b"data", b"{}") for number in (1, 2)]
    try:
        master.start()
        replica.start()
        eventually(lambda: replica.client.info("replication")["master_link_status"] == "up")
        reader.acquire([S])
        RedisProducerStore(master.url).add(S.stream, [b'{"id": "1"}', b'{"id": "2"}', b'{"id": "3"}'])
        reader.begin_read(S, 3, 0)
        first, second, third = (entry.id for entry in reader.finish_read(S))

        (settled,) = reader.settle([Settlement(S, done=[first])])
        assert settled.is_replicated
        assert replica.client.xpending(S.stream, S.group)["pending"] == 2

        assert reaper.forward_add("shard", S.stream, moved[:1])
        assert replica.client.xlen("shard") == 1

        os.kill(replica.pid, signal.SIGSTOP)
        assert not reaper.forward_add("shard", S.stream, moved)
        (settled,) = reader.settle([Settlement(S, done=[second])])
        assert not settled.is_replicated
        assert (settled.refused, settled.unsettled) == (set(), set())
        assert master.client.xpending(S.stream, S.group)["pending"] == 1, "it is settled all the same"

        os.kill(replica.pid, signal.SIGCONT)
        eventually(lambda: replica.client.xpending(S.stream, S.group)["pending"] == 1)
        (settled,) = reader.settle([Settlement(S, done=[third])])
        assert settled.is_replicated
    finally:
        reader.close()
        reaper.close()
        replica.stop()
        master.stop()
