"""Real servers as deployments have them: a Sentinel group, a Cluster, TLS, a server that is silent."""

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from support.redis_servers import START_LIMIT_S, RedisServer, free_port, require

MASTER_NAME = "mymaster"
#: Time without an answer after which a sentinel takes a master for dead (ms).
_DOWN_AFTER_MS = 500


class Certificate(NamedTuple):
    """Files of a self-signed certificate for 127.0.0.1 and ::1."""

    cert: Path
    key: Path

    @property
    def options(self) -> list[str]:
        """Options of a server that uses it for TLS with clients and with other servers."""
        return [
            "--tls-cert-file", str(self.cert), "--tls-key-file", str(self.key),
            "--tls-ca-cert-file", str(self.cert), "--tls-auth-clients", "no", "--tls-replication", "yes",
        ]  # fmt: skip


def certificate(folder: Path) -> Certificate:
    """A new certificate; skips the test where openssl is missing."""
    made = Certificate(folder / "cert.pem", folder / "key.pem")
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed")
    subprocess.run(
        [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
         "-keyout", made.key, "-out", made.cert, "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=IP:127.0.0.1,IP:::1"],
        check=True, capture_output=True, timeout=30,
    )  # fmt: skip
    return made


@contextmanager
def silent_server() -> Iterator[int]:
    """A port that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1])


def eventually(happens: Callable[[], Any], limit_s: float = START_LIMIT_S) -> Any:
    """What `happens` returns once it is true. Servers that agree among themselves send no event."""
    deadline = time.monotonic() + limit_s
    while not (found := happens()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
    return found


def has_copy(replica: RedisServer) -> bool:
    """Whether it has its first copy. Before, its master counts it as connected, but it is never promoted."""
    return bool(replica.client.info("replication").get("master_link_status") == "up")


class SentinelGroup:
    """A master, a replica and three sentinels."""

    def __init__(self, folder: Path, kind: str = "redis7") -> None:
        binary = require(kind)
        for name in ("master", "replica", "s1", "s2", "s3"):
            (folder / name).mkdir()
        self.master = RedisServer(binary, folder / "master").start()
        replica_of = ["--replicaof", "127.0.0.1", str(self.master.port)]
        self.replica = RedisServer(binary, folder / "replica", options=replica_of).start()
        self.sentinels = [_sentinel(binary, folder / name, self.master.port) for name in ("s1", "s2", "s3")]
        eventually(lambda: has_copy(self.replica))
        eventually(self._is_complete)

    def _is_complete(self) -> bool:
        states = [one.client.sentinel_master(MASTER_NAME) for one in self.sentinels]
        return all(one["num-slaves"] == 1 and one["num-other-sentinels"] == 2 for one in states)

    def url(self, *first_ports: int) -> str:
        """The URL, with further ports in front of those of the sentinels."""
        ports = [*first_ports, *(one.port for one in self.sentinels)]
        hosts = ",".join(f"127.0.0.1:{port}" for port in ports)
        return f"redis+sentinel://{hosts}/{MASTER_NAME}/0"

    def named_port(self) -> int:
        """The port of the master by the first sentinel."""
        return int(self.sentinels[0].client.sentinel_get_master_addr_by_name(MASTER_NAME)[1])

    def stop(self) -> None:
        for server in (*self.sentinels, self.replica, self.master):
            server.stop()


def _sentinel(binary: str, folder: Path, master_port: int) -> RedisServer:
    config = folder / "sentinel.conf"
    config.write_text(
        f"sentinel monitor {MASTER_NAME} 127.0.0.1 {master_port} 2\n"
        f"sentinel down-after-milliseconds {MASTER_NAME} {_DOWN_AFTER_MS}\n"
        f"sentinel failover-timeout {MASTER_NAME} 3000\n"
    )
    server = RedisServer(binary, folder)
    server.use_sentinel(config)
    return server.start()


@contextmanager
def sentinel_group(folder: Path, kind: str = "redis7") -> Iterator[SentinelGroup]:
    """A running group."""
    group = SentinelGroup(folder, kind)
    try:
        yield group
    finally:
        group.stop()


class Cluster:
    """Masters that share the slots, each with as many replicas; every server on 127.0.0.1."""

    def __init__(
        self, folder: Path, kind: str = "valkey", masters: int = 2, replicas: int = 0, *options: str
    ) -> None:
        binary = require(kind)
        self.servers: list[RedisServer] = []
        for number in range(masters * (1 + replicas)):
            (place := folder / f"node{number}").mkdir()
            own = [
                "--cluster-enabled",
                "yes",
                "--cluster-port",
                str(free_port()),
                "--cluster-node-timeout",
                "2000",
            ]
            self.servers.append(RedisServer(binary, place, options=[*own, *options]).start())
        self.masters, others = self.servers[:masters], self.servers[masters:]
        first = self.servers[0].client
        bounds = [16384 * number // masters for number in range(masters + 1)]
        for server, start, end in zip(self.masters, bounds, bounds[1:], strict=False):
            server.client.execute_command("CLUSTER", "ADDSLOTSRANGE", str(start), str(end - 1))
        for server in self.servers[1:]:
            bus = server.client.config_get("cluster-port")["cluster-port"]
            first.execute_command("CLUSTER", "MEET", "127.0.0.1", str(server.port), bus)
        eventually(lambda: all(self._knows_all(server) for server in self.servers))
        for number, server in enumerate(others):
            master_id = self.masters[number % masters].client.execute_command("CLUSTER", "MYID").decode()
            server.client.execute_command("CLUSTER", "REPLICATE", master_id)
        eventually(lambda: all(self._is_ok(server) for server in self.servers))
        self.replicas = others
        eventually(lambda: all(map(has_copy, others)))

    def _knows_all(self, server: RedisServer) -> bool:
        return int(server.client.cluster("INFO")["cluster_known_nodes"]) == len(self.servers)

    def _is_ok(self, server: RedisServer) -> bool:
        return bool(server.client.cluster("INFO")["cluster_state"] == "ok")

    def url(self, *first_ports: int) -> str:
        """The URL, with further ports in front of those of the masters."""
        ports = [*first_ports, *(one.port for one in self.masters)]
        return "redis+cluster://" + ",".join(f"127.0.0.1:{port}" for port in ports)

    def owner(self, key: str) -> RedisServer:
        """The server that holds a key, as the first one sees it."""
        slot = self.servers[0].client.execute_command("CLUSTER", "KEYSLOT", key)
        for start, end, (_, port, *_), *_ in self.servers[0].client.execute_command("CLUSTER", "SLOTS"):
            if start <= slot <= end:
                return next(one for one in self.servers if one.port == port)
        raise AssertionError(f"no server holds {key}")

    def move_slot(self, key: str, target: RedisServer) -> None:
        """Move the slot of a key with all its keys to another master."""
        with self.moving_slot(key, target):
            pass

    @contextmanager
    def moving_slot(self, key: str, target: RedisServer) -> Iterator[None]:
        """As `move_slot`. In between all keys have moved, and the slot still belongs to its old master."""
        source = self.owner(key)
        slot = str(source.client.execute_command("CLUSTER", "KEYSLOT", key))
        ids = {one: one.client.execute_command("CLUSTER", "MYID").decode() for one in (source, target)}
        target.client.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[source])
        source.client.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[target])
        while found := source.client.execute_command("CLUSTER", "GETKEYSINSLOT", slot, "100"):
            arguments = ["127.0.0.1", str(target.port), "", "0", "5000", "KEYS", *found]
            source.client.execute_command("MIGRATE", *arguments)
        yield
        for server in (target, source, *self.masters):
            server.client.execute_command("CLUSTER", "SETSLOT", slot, "NODE", ids[target])

    def fail_over(self, replica: RedisServer) -> None:
        """Make a replica the master, and wait until it is: the masters need a moment to agree."""

        def is_master() -> bool:
            return bool(replica.client.info("replication")["role"] == "master")

        for _ in range(4):
            replica.client.execute_command("CLUSTER", "FAILOVER")
            with contextlib.suppress(AssertionError):
                return eventually(is_master, START_LIMIT_S / 4)
        raise AssertionError("the masters do not agree to the failover")

    def stop(self) -> None:
        for server in self.servers:
            server.stop()


@contextmanager
def cluster(
    folder: Path, kind: str = "valkey", masters: int = 2, replicas: int = 0, *options: str
) -> Iterator[Cluster]:
    """A running cluster."""
    with ExitStack() as stack:
        made = Cluster(folder, kind, masters, replicas, *options)
        stack.callback(made.stop)
        yield made
