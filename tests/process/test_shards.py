"""Services that spread a stream over a cluster of three masters: kills and moved slots lose nothing."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from click.testing import CliRunner

from jobworker.worker.cli import main
from jobworker.worker.keys import ready_key
from jobworker.worker.producer import Producer
from jobworker.worker.shards import shard_names
from support.job_store_steps import retry_until_available
from support.service import GROUP, STREAM, Service, ending, eventually, handlers
from support.topologies import Cluster, cluster

pytestmark = pytest.mark.process

SHARDS = shard_names(STREAM, 3)
ACCESS = Path(__file__).resolve().parents[2] / "deploy/acl/jobworker.acl"


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("cluster"), masters=3) as made:
        yield made


def restrict(nodes: Cluster) -> str:
    """Give all servers the user of few rights; returns the URL for it."""
    for server in nodes.servers:
        server.client.execute_command(
            "ACL", "SETUSER", *ACCESS.read_text("utf-8").split()[1:], "+client|setinfo"
        )
        server.client.execute_command("ACL", "LOG", "RESET")
    return nodes.url().replace("//", "//jobworker:PASSWORD@")


def host(folder: Path, nodes: Cluster, name: str, url: str = "") -> Service:
    (folder / name).mkdir()
    return Service(
        folder / name, handlers("Noop"), procs=1, redis_url=url or nodes.url(), instance=name, lease=2.0,
        shards=3, stream=f"{STREAM}={GROUP}",
    )  # fmt: skip


def verb(nodes: Cluster, *arguments: str, code: int = 0) -> str:
    found = CliRunner().invoke(main, [*arguments], env={"JOBWORKER_REDIS_URL": nodes.url()})
    assert found.exit_code == code, (found.output, found.exception)
    return found.output


def send(producer: Producer, ids: list[str]) -> None:
    """A producer that knows of shards."""
    jobs = [{"type": "noop", "tenant_id": f"t{number}", "id": id} for number, id in enumerate(ids)]
    retry_until_available(lambda: producer.enqueue_many(jobs, stream=STREAM))


def send_plain(client: "redis.RedisCluster", ids: list[str]) -> None:
    """A producer that knows nothing of shards."""
    for number, id in enumerate(ids):
        client.xadd(STREAM, {"data": f'{{"id":"{id}","type":"noop","tenant_id":"t{number}"}}'})


def unfinished(client: "redis.RedisCluster") -> dict[str, int]:
    """Entries of the stream and its shards that are undelivered, pending or in lanes."""
    left = {}
    for name in (STREAM, *SHARDS):
        (group,) = client.xinfo_groups(name)
        undelivered = client.xrange(name, f"({group['last-delivered-id'].decode()}")
        in_lanes = int(client.hget(ready_key(name, cluster=True), "n") or 0)
        left[name] = group["pending"] + len(undelivered) + in_lanes
    return {name: count for name, count in left.items() if count}


def ended(*services: Service) -> Counter[str]:
    return Counter(event.id for service in services for event in service.events("end"))


def shares(*services: Service) -> list[list[int]]:
    """The shards that each service said last that it owns."""
    return [service.logged("shards.shared")[-1]["shards"] for service in services]


def test_jobs_of_all_producers_run_through_kills_and_moved_slots(tmp_path: Path, nodes: Cluster) -> None:
    one, two = host(tmp_path, nodes, "one"), host(tmp_path, nodes, "two", restrict(nodes))
    client = redis.RedisCluster("127.0.0.1", nodes.masters[0].port)
    with ending(one), ending(two), Producer(nodes.url()) as producer:
        one.start()
        two.start()
        assert [nodes.owner(name) for name in SHARDS] == nodes.masters, "each master has a shard"
        events = {
            3: lambda: (one.kill_role("reaper"), two.kill_role("reaper")),
            6: lambda: nodes.move_slot(SHARDS[1], nodes.owner(SHARDS[2])),
            9: lambda: one.kill_role("reader"),
            12: lambda: nodes.move_slot(STREAM, nodes.masters[2]),
        }
        ids: list[str] = []
        for part in range(16):
            plain, direct = ([f"{kind}-{part}-{number}" for number in range(100)] for kind in ("p", "d"))
            send_plain(client, plain)
            events.get(part, lambda: None)()
            send(producer, direct)
            ids += plain + direct
        eventually(lambda: ended(one, two).keys() >= set(ids), 60.0, lambda: unfinished(client))
        eventually(lambda: not unfinished(client))
        runs = ended(one, two)
        assert runs.keys() == set(ids)
        assert all(count == 1 for id, count in runs.items() if id.startswith("p-0")), "before any kill"
        assert client.xlen(STREAM) == 0, "all were moved"
        assert one.events("end"), "both have run jobs"
        assert two.events("end")
        eventually(lambda: sorted(map(len, shares(one, two))) == [1, 2])

        (row,) = [line for line in verb(nodes, "stats").splitlines() if line.startswith(STREAM)]
        assert row.split()[0] == STREAM, "the shards count for their stream"
        eventually(lambda: one.metric("z_novel_jobs_queued", stream=STREAM) == 0)
        assert "only share limits with --key tenant" in verb(
            nodes, "limit", "set", "noop", "--rate", "1/s", code=1
        )
        assert two.terminate() == 0
        assert not [line for server in nodes.servers for line in server.client.acl_log()]
        eventually(lambda: sorted(shares(one)[0]) == [0, 1, 2])
    client.close()
