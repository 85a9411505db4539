"""The job store behind Sentinel and on a Cluster: failover, hung nodes, moved slots, TLS, IPv6."""

import logging
import select
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from redis.exceptions import AskError, MovedError, TryAgainError

from jobworker.worker.errors import StoreRefused, StoreUnavailable
from jobworker.worker.store.ports import Settlement
from jobworker.worker.store.redis.key_faults import concerns_one_stream
from jobworker.worker.store.redis.producer import RedisProducerStore
from jobworker.worker.store.redis.reader import RedisReaderStore
from support.job_store_steps import SOON_S, S, read, retry_until_available
from support.redis_servers import RedisServer, free_port, require
from support.topologies import (
    MASTER_NAME,
    SentinelGroup,
    certificate,
    cluster,
    eventually,
    sentinel_group,
    silent_server,
)

#: Longest time of a first look-up beside servers that do not answer: 1 s on a quiet machine.
LOOK_UP_S = 10.0


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SentinelGroup]:
    with sentinel_group(tmp_path_factory.mktemp("sentinel")) as made:
        yield made


def reader(url: str) -> RedisReaderStore:
    store = RedisReaderStore(url, "host/a")
    store.acquire([S])
    return store


@pytest.mark.parametrize(
    "error", [AskError("7 127.0.0.1:1"), MovedError("7 127.0.0.1:1"), TryAgainError("x")]
)
def test_a_slot_that_moves_is_no_fault_of_its_keys(error: Exception) -> None:
    """All connections are closed then, so all streams must start over."""
    assert not concerns_one_stream(error)


class TestSentinel:
    def test_hung_sentinels_in_front_cost_little(self, group: SentinelGroup) -> None:
        with silent_server() as one, silent_server() as two:
            began = time.monotonic()
            reader(group.url(one, two)).close()
            assert time.monotonic() - began < LOOK_UP_S

    def test_most_sentinels_may_hang(self, group: SentinelGroup) -> None:
        with silent_server() as a, silent_server() as b, silent_server() as c, silent_server() as d:
            began = time.monotonic()
            reader(group.url(a, b, c, d)).close()
            assert time.monotonic() - began < LOOK_UP_S

    def test_where_all_hang_the_error_names_the_group_soon(self) -> None:
        with silent_server() as port:
            began = time.monotonic()
            with pytest.raises(StoreUnavailable, match=f"no sentinel names a master '{MASTER_NAME}'"):
                reader(f"redis+sentinel://127.0.0.1:{port},127.0.0.1:1/{MASTER_NAME}")
            assert time.monotonic() - began < LOOK_UP_S

    def test_an_unknown_name_is_said(self, group: SentinelGroup) -> None:
        with pytest.raises(StoreUnavailable, match="No such master with that name"):
            reader(group.url().replace(MASTER_NAME, "other"))

    def test_a_server_that_is_no_sentinel_is_said(self, group: SentinelGroup) -> None:
        with pytest.raises(StoreUnavailable, match="SENTINEL"):
            reader(f"redis+sentinel://127.0.0.1:{group.master.port}/{MASTER_NAME}")

    def test_a_master_without_replicas_is_left_as_soon_as_another_is_named(self, tmp_path: Path) -> None:
        """The old master still runs, cut off from the sentinels, and refuses writes."""
        with sentinel_group(tmp_path) as group:
            store = reader(group.url())
            old = group.master
            for sentinel in group.sentinels:
                # They take the master for dead, and it does not hear of its successor.
                sentinel.client.execute_command(
                    "SENTINEL", "SET", MASTER_NAME, "down-after-milliseconds", "1"
                )
            old.client.config_set("min-replicas-to-write", 1)
            old.client.config_set("min-replicas-max-lag", 1)
            group.sentinels[0].client.execute_command("SENTINEL", "FAILOVER", MASTER_NAME)
            eventually(lambda: group.named_port() == group.replica.port)
            named_s = time.monotonic()
            retry_until_available(lambda: store.renew_name([S]))
            assert time.monotonic() - named_s < LOOK_UP_S
            assert store.one(S.stream, ("INFO", "replication")).split(b"\r\n")[1] == b"role:master"
            store.close()

    def test_tls_to_sentinel_and_master_with_a_password_of_each(self, tmp_path: Path) -> None:
        files, kind = certificate(tmp_path), require("redis7")
        (tmp_path / "s").mkdir()
        port, sentinel_port = free_port(), free_port()
        options = ["--tls-port", str(port), *files.options, "--requirepass", "m@ster"]
        master = RedisServer(kind, tmp_path, options=options)
        master.client.connection_pool.connection_kwargs["password"] = "m@ster"
        config = tmp_path / "s" / "sentinel.conf"
        config.write_text(
            f"sentinel monitor {MASTER_NAME} 127.0.0.1 {port} 1\n"
            f"sentinel auth-pass {MASTER_NAME} m@ster\n"
            f"requirepass s3ntinel\ntls-port {sentinel_port}\n"
            f"tls-cert-file {files.cert}\ntls-key-file {files.key}\ntls-ca-cert-file {files.cert}\n"
            "tls-auth-clients no\ntls-replication yes\n"
        )
        sentinel = RedisServer(kind, tmp_path / "s")
        sentinel.client.connection_pool.connection_kwargs["password"] = "s3ntinel"
        sentinel.use_sentinel(config)
        master.start()
        sentinel.start()
        try:
            at = f"127.0.0.1:{sentinel_port}/{MASTER_NAME}/0?ssl_ca_certs={files.cert}"
            url = f"rediss+sentinel://:m%40ster@{at}&sentinel_password=s3ntinel"
            retry_until_available(lambda: reader(url).close())
            with pytest.raises(StoreUnavailable, match="no sentinel names"):
                reader(f"rediss+sentinel://:m%40ster@{at}&sentinel_password=wrong")
            with pytest.raises(StoreUnavailable, match=r"(?i)certificate"):
                reader(url.replace(f"?ssl_ca_certs={files.cert}&", "?"))
        finally:
            sentinel.stop()
            master.stop()

    def test_ipv6(self, tmp_path: Path) -> None:
        kind = require("redis7")
        master = RedisServer(kind, tmp_path, options=["--bind", "127.0.0.1", "::1"]).start()
        (tmp_path / "s").mkdir()
        config = tmp_path / "s" / "sentinel.conf"
        config.write_text(f"sentinel monitor {MASTER_NAME} ::1 {master.port} 1\nbind 127.0.0.1 ::1\n")
        sentinel = RedisServer(kind, tmp_path / "s")
        sentinel.use_sentinel(config, bind=("127.0.0.1", "::1"))
        sentinel.start()
        try:
            retry_until_available(
                lambda: reader(f"redis+sentinel://[::1]:{sentinel.port}/{MASTER_NAME}").close()
            )
        finally:
            sentinel.stop()
            master.stop()


class TestCluster:
    def test_a_hung_node_in_front_costs_little(self, tmp_path: Path) -> None:
        with cluster(tmp_path) as made, silent_server() as one, silent_server() as two:
            began = time.monotonic()
            reader(made.url(one, two)).close()
            assert time.monotonic() - began < LOOK_UP_S

    @pytest.mark.parametrize("kind", ["redis7", "valkey"])
    def test_a_moved_slot_is_followed_and_no_group_is_reported_deleted(
        self, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with cluster(tmp_path, kind) as made:
            store, producer = reader(made.url()), RedisProducerStore(made.url())
            producer.add(S.stream, [b"1"])
            (first,) = read(store)
            fd = store.begin_read(S, 10, 60_000)
            (target,) = [one for one in made.masters if one is not made.owner(S.stream)]
            made.move_slot(S.stream, target)
            assert select.select([fd], [], [], SOON_S)[0]
            with caplog.at_level(logging.INFO):
                retry_until_available(lambda: store.finish_read(S))
                retry_until_available(lambda: store.settle([Settlement(S, [first.id])]))
            retry_until_available(lambda: producer.add(S.stream, [b"2"]))
            assert [entry.data for entry in read(store)] == [b"2"]
            assert "group.recreated" not in caplog.text
            store.close()
            producer.close()

    @pytest.mark.parametrize("kind", ["redis7", "valkey"])
    def test_a_slot_on_its_way_is_no_fault_of_its_stream(self, kind: str, tmp_path: Path) -> None:
        with cluster(tmp_path, kind) as made:
            store, producer = reader(made.url()), RedisProducerStore(made.url())
            producer.add(S.stream, [b"1"])
            (first,) = read(store)
            (target,) = [one for one in made.masters if one is not made.owner(S.stream)]
            with ThreadPoolExecutor() as threads:
                with made.moving_slot(S.stream, target):
                    adding = threads.submit(producer.add, S.stream, [b"2"])
                    for use in (
                        lambda: read(store),
                        lambda: store.settle([Settlement(S, [first.id])]),
                        lambda: store.renew_name([S]),
                    ):
                        with pytest.raises(StoreUnavailable) as caught:
                            use()
                        assert not isinstance(caught.value, StoreRefused), "a refusal isolates the stream"
                    assert not adding.done(), "it waits for the end of the move"
                assert adding.result(SOON_S) == 1
            retry_until_available(lambda: store.settle([Settlement(S, [first.id])]))
            assert [entry.data for entry in read(store)] == [b"2"]
            store.close()
            producer.close()

    @pytest.mark.parametrize("kind", ["redis7", "valkey"])
    def test_a_failover_by_hand_is_followed_and_no_group_is_reported_deleted(
        self, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with cluster(tmp_path, kind, 3, 1) as made:
            store, producer = reader(made.url()), RedisProducerStore(made.url())
            producer.add(S.stream, [b"1"])
            assert [entry.data for entry in read(store)] == [b"1"]
            old = made.owner(S.stream)
            replica = made.replicas[made.masters.index(old)]
            fd = store.begin_read(S, 10, 60_000)
            made.fail_over(replica)
            assert select.select([fd], [], [], SOON_S)[0]
            with caplog.at_level(logging.INFO), pytest.raises(StoreUnavailable):
                store.finish_read(S)
            retry_until_available(lambda: producer.add(S.stream, [b"2"]))
            retry_until_available(lambda: store.renew_name([S]))
            assert [entry.data for entry in read(store)] == [b"2"]
            assert "group.recreated" not in caplog.text
            store.close()
            producer.close()

    def test_tls_to_every_node(self, tmp_path: Path) -> None:
        files = certificate(tmp_path)
        port = free_port()
        options = ["--tls-port", str(port), "--tls-cluster", "yes", "--cluster-enabled", "yes"]
        options += ["--cluster-port", str(free_port()), *files.options]
        server = RedisServer(require("redis7"), tmp_path, options=options).start()
        try:
            server.client.execute_command("CLUSTER", "ADDSLOTSRANGE", "0", "16383")
            url = f"rediss+cluster://127.0.0.1:{port}?ssl_ca_certs={files.cert}"
            retry_until_available(lambda: reader(url).close())
        finally:
            server.stop()

    def test_ipv6(self, tmp_path: Path) -> None:
        options = [
            "--bind",
            "127.0.0.1",
            "::1",
            "--cluster-enabled",
            "yes",
            "--cluster-port",
            str(free_port()),
        ]
        options += ["--cluster-announce-ip", "::1"]
        server = RedisServer(require("valkey"), tmp_path, options=options).start()
        try:
            server.client.execute_command("CLUSTER", "ADDSLOTSRANGE", "0", "16383")
            retry_until_available(lambda: reader(f"redis+cluster://[::1]:{server.port}").close())
        finally:
            server.stop()
