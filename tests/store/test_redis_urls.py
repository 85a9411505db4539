"""The job store on real servers: URLs, versions, connections, streams that are found."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import redis

from jobworker.worker.errors import (
    AnswerTooLarge,
    ConfigurationError,
    StoreUnavailable,
)
from jobworker.worker.keys import Source, base_stream
from jobworker.worker.settings import without_credentials
from jobworker.worker.store.ports import Dead, Retry, Settlement
from jobworker.worker.store.redis import blocking_read
from jobworker.worker.store.redis.connect import require_version
from jobworker.worker.store.redis.key_scan import find_streams
from jobworker.worker.store.redis.operator import OperatorStore
from jobworker.worker.store.redis.producer import RedisProducerStore
from jobworker.worker.store.redis.reader import RedisReaderStore
from jobworker.worker.store.redis.reaper import RedisReaperStore
from support.job_store_steps import S, given, read, retry_until_available
from support.job_worlds import RedisWorld, settle
from support.redis_servers import RedisServer, free_port, require
from support.topologies import cluster


def run_one_job(url: str) -> None:
    """One job through every store, by a URL."""
    reader, reaper, producer = RedisReaderStore(url, "a"), RedisReaperStore(url), RedisProducerStore(url)
    try:
        reader.acquire([S])
        producer.add(S.stream, [b"1"])
        (entry,) = read(reader)
        assert settle(reader, [Settlement(S, [], [Retry(entry.id, 0, b"2")])]) == set()
        assert reaper.promote(S.stream, 10).moved == 1
        (again,) = read(reader)
        assert again.data == b"2"
        reader.set_deaths(S, {again.id: 1})
        assert settle(reader, [Settlement(S, [], [], [Dead(again.id, b"dead")])]) == set()
        assert reaper.depths(S)[:4] == (0, 0, 0, 1)
        assert reaper.trim(S.stream) == 2
    finally:
        for store in (reader, reaper, producer):
            store.close()


class TestUrls:
    def test_unix_socket(self, tmp_path: Path) -> None:
        path = tmp_path / "redis.sock"
        server = RedisServer(require("valkey"), tmp_path, options=["--unixsocket", str(path)]).start()
        try:
            run_one_job(f"unix://{path}?db=1")
        finally:
            server.stop()

    def test_tls(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """With an answer over the budget, because the budget is counted on the encrypted connection too."""
        certificate, key, port = tmp_path / "cert.pem", tmp_path / "key.pem", free_port()
        openssl = shutil.which("openssl")
        if openssl is None:
            pytest.skip("openssl is not installed")
        subprocess.run(
            [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
             "-keyout", key, "-out", certificate, "-days", "2", "-subj", "/CN=localhost",
             "-addext", "subjectAltName=IP:127.0.0.1"],
            check=True, capture_output=True, timeout=30,
        )  # fmt: skip
        files = ["--tls-cert-file", str(certificate), "--tls-key-file", str(key)]
        options = ["--tls-port", str(port), "--tls-auth-clients", "no", *files]
        server = RedisServer(require("redis7"), tmp_path, options=options).start()
        url = f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={certificate}"
        try:
            run_one_job(url)
            monkeypatch.setattr(blocking_read, "_ANSWER_BYTES", 100_000)
            store = RedisReaderStore(url, "b")
            store.acquire([S])
            RedisProducerStore(url).add(S.stream, [b"x" * 80_000] * 2)
            with pytest.raises(AnswerTooLarge):
                read(store, 2)
            assert len(store.own_pending(S, b"0-0", 10)) == 2
            store.close()
        finally:
            server.stop()

    def test_cluster_keeps_derived_keys_in_the_streams_slot(self, tmp_path: Path) -> None:
        with cluster(tmp_path, masters=1) as nodes:
            (server,) = nodes.servers
            url = nodes.url()
            retry_until_available(lambda: RedisProducerStore(url).add("stream:first", [b"1"]))
            run_one_job(url)
            assert server.client.xlen("dlq:{stream:test}") == 1
            store, two = RedisReaderStore(url, "a"), Source("stream:two", "cg")
            store.acquire([S, two])
            producer = RedisProducerStore(url)
            for source in (S, two):
                producer.add(source.stream, [b"x"])
                store.begin_read(source, 10, 0)
            ids = {source: [entry.id for entry in store.finish_read(source)] for source in (S, two)}
            assert settle(store, [Settlement(source, done) for source, done in ids.items()]) == set()
            server.client.zadd("retry:{stream:delayed}", {b"{}": 2e9})
            operator = OperatorStore(url)
            found = operator.find_streams()
            assert found == (["stream:delayed", "stream:first", "stream:test", "stream:two"], True)
            for one in (operator, store, producer):
                one.close()
            plain = RedisReaderStore(f"redis://127.0.0.1:{server.port}", "b")
            with pytest.raises(StoreUnavailable, match=r"must begin with redis\+cluster://"):
                plain.acquire([S])
            plain.close()

    def test_sentinel_leads_to_the_master(self, redis_world: RedisWorld, tmp_path: Path) -> None:
        config = tmp_path / "sentinel.conf"
        config.write_text(f"sentinel monitor mymaster 127.0.0.1 {redis_world.server.port} 1\n")
        sentinel = RedisServer(require("redis7"), tmp_path, options=[])
        sentinel.use_sentinel(config)
        sentinel.start()
        try:
            run_one_job(
                f"redis+sentinel://127.0.0.1:{sentinel.port}, 127.0.0.1:1/mymaster/0?pool_size=2&protocol=3"
            )
        finally:
            sentinel.stop()

    def test_password_and_a_wrong_one(self, tmp_path: Path) -> None:
        server = RedisServer(require("valkey"), tmp_path).start()
        try:
            server.client.config_set("requirepass", "s3cret/@%")
            at = f"127.0.0.1:{server.port}/0"
            run_one_job(f"redis://:s3cret%2F%40%25@{at}")
            with pytest.raises(StoreUnavailable) as caught:
                RedisReaderStore(f"redis://:guess@{at}", "a").acquire([S])
            assert "guess" not in str(caught.value)
            with pytest.raises(StoreUnavailable, match=r"(?i)auth"):
                RedisReaderStore(f"redis://{at}", "a").acquire([S])
        finally:
            server.stop()

    @pytest.mark.parametrize(
        "url",
        [
            "http://u:hunter2@h",
            "redis://u:hun/ter2@h:1",
            "redis+sentinel://:hunter2@h:26379",
            "redis+cluster://:hunter2@h:x",
            "nonsense",
        ],
    )
    def test_a_url_that_cannot_be_read_is_refused_without_its_password(self, url: str) -> None:
        with pytest.raises(ConfigurationError) as caught:
            RedisReaderStore(url, "a")
        assert "ter2" not in str(caught.value)

    @pytest.mark.parametrize(
        ("url", "shown"),
        [
            ("redis://localhost:6379/0", "redis://localhost:6379/0"),
            ("redis://user:pa@ss@localhost:6379/0", "redis://***@localhost:6379/0"),
            ("rediss://:pw@h:1/2?password=pw", "rediss://***@h:1/2"),
            ("redis://:p?w@h:1", "redis://***@h:1"),
            ("redis+sentinel://:pw@h:1,h2:2/mymaster/0", "redis+sentinel://***@h:1,h2:2/mymaster/0"),
            ("unix:///run/redis.sock?password=pw", "unix:///run/redis.sock"),
        ],
    )
    def test_a_url_is_shown_without_credentials_and_options(self, url: str, shown: str) -> None:
        assert without_credentials(url, "***@") == shown


class TestVersion:
    @pytest.mark.parametrize(
        "info",
        [
            b"redis_version:7.0.15\r\n",
            b"redis_version:8.2.0\r\n",
            b"redis_version:7.2.4\r\nserver_name:valkey\r\nvalkey_version:8.0.1\r\n",
        ],
    )
    def test_new_enough(self, info: bytes) -> None:
        require_version(b"# Server\r\n" + info)

    @pytest.mark.parametrize(
        "info", [b"redis_version:6.2.14\r\n", b"redis_version:7.2.4\r\nvalkey_version:7.2.5\r\n", b""]
    )
    def test_too_old(self, info: bytes) -> None:
        with pytest.raises(ConfigurationError, match="too old"):
            require_version(b"# Server\r\n" + info)

    def test_a_user_without_permission_for_info_is_accepted(self, redis_world: RedisWorld) -> None:
        client = redis_world.server.client
        client.acl_setuser("limited", enabled=True, passwords=["+pw"], keys="*", commands=["+@all", "-info"])
        try:
            store = RedisReaderStore(f"redis://limited:pw@127.0.0.1:{redis_world.server.port}/0", "a")
            store.acquire([S])
            client.acl_setuser("limited", commands=["-evalsha"])
            with pytest.raises(StoreUnavailable, match=r"(?i)permission"):
                store.renew(S, [b"1-1"])
            store.close()
        finally:
            client.acl_deluser("limited")


def test_the_store_opens_no_more_connections_than_it_needs(redis_world: RedisWorld) -> None:
    store, ids = given(redis_world, b"1")
    settle(store, [Settlement(S, ids)])
    for _ in range(5):
        read(store)
    client: redis.Redis = redis_world.server.client
    assert len([c for c in client.client_list() if c["name"] == "jobworker"]) <= 3


class TestSearchForStreams:
    def test_streams_are_found_among_many_other_keys(self, redis_world: RedisWorld) -> None:
        client = redis_world.server.client
        client.mset({f"key-{number}": "text" for number in range(5000)})
        client.xadd("stream:typo", {"data": "{}"})
        client.zadd("retry:stream:delayed", {"{}": 1})
        client.zadd("retry", {"{}": 1})
        client.xadd("dlq:stream:gone", {"data": "{}"})
        operator = OperatorStore(redis_world.server.url)
        assert operator.find_streams() == (["stream:delayed", "stream:gone", "stream:typo"], True)
        operator.close()

    def test_a_user_who_may_not_scan_is_told(self, redis_world: RedisWorld) -> None:
        redis_world.server.client.acl_setuser(
            "narrow", enabled=True, passwords=["+pw"], commands=["+@all", "-scan"], keys=["*"]
        )
        operator = OperatorStore(redis_world.server.url.replace("//", "//narrow:pw@"))
        try:
            assert operator.find_streams() == ([], False)
        finally:
            operator.close()
            redis_world.server.client.acl_deluser("narrow")

    def test_the_search_is_bounded(self) -> None:
        calls = []

        def one(key: str, command: Any) -> Any:
            calls.append(command)
            return [b"7", [b"stream:%d" % len(calls)]]  # a cursor that never ends

        found = find_streams(["one server"], one, base_stream)
        assert (len(found.names), found.complete) == (200, False)
        assert len(calls) < 500
