"""Flow control on a cluster, and as a Redis user who may do no more than the documentation says."""

import json
from pathlib import Path

from jobworker.worker.admin.limits import limit_states
from jobworker.worker.flow import FlowConfig, LaneRules, Limit, read_flow_header, tenant_key
from jobworker.worker.keys import Source
from jobworker.worker.store.operator import LanePlace
from jobworker.worker.store.ports import Entry, PutBack, Retry, Settlement, WaitingJob
from jobworker.worker.store.redis.operator import OperatorStore
from jobworker.worker.store.redis.producer import RedisProducerStore
from jobworker.worker.store.redis.reader import RedisReaderStore
from jobworker.worker.store.redis.reaper import RedisReaperStore
from support.job_worlds import RedisWorld, settle
from support.topologies import cluster

S = Source("stream:test", "cg-test")
TWO = Limit("a/tenant", "a", "tenant", concurrency=2, starts=1000, per_ms=1000)


def waiting_job(entry: Entry) -> WaitingJob:
    return WaitingJob(entry.id, len(entry.data or b""))


def run_jobs_within_a_limit(url: str) -> list[bytes]:
    """Sort, take, put back, retry and finish jobs; returns the entries in the order in which they ended."""
    reader, reaper, operator = RedisReaderStore(url, "one"), RedisReaperStore(url), OperatorStore(url)
    reader.acquire([S])
    assert operator.configure(S.stream, FlowConfig(limits=(TWO,), weights={"t1": 3.0}))
    jobs = [json.dumps({"id": f"{n}", "type": "a", "tenant_id": f"t{n % 2}"}).encode() for n in range(8)]
    RedisProducerStore(url).add(S.stream, jobs)
    reader.begin_read(S, 100, 0)
    entries = reader.finish_read(S)
    config = reader.flow_config(S)
    rules = LaneRules(config.limits)
    lane_of = {entry.id: rules.name_of(read_flow_header(entry.data or b"")) for entry in entries}
    lanes = {
        name: [waiting_job(entry) for entry in entries if lane_of[entry.id] == name]
        for name in lane_of.values()
    }
    assert reader.sort(S, config.version, lanes) == set()
    assert operator.lane_place(S.stream, entries[7]) == LanePlace(3, None)
    assert sorted(reaper.depths(S).tenant_ages_s) == ["t0", "t1"]
    ended: list[bytes] = []
    taken = reader.take(S, ["a"], 100).entries
    assert len(taken) == 4, "two of each tenant"
    assert reader.take(S, ["a"], 100).entries == []
    counts = operator.lane_counts(S.stream)
    assert counts.running == counts.parked == {"a/tenant=t0": 2, "a/tenant=t1": 2}
    (state,) = limit_states(S.stream, config, counts)
    assert (state.running, state.waiting, state.busy["t0"]) == (4, 4, (2, 2))
    first, second = taken[:2]
    put_back = PutBack(waiting_job(first), lane_of[first.id], tenant_key("a", "absent"), 0.1)
    retry = Retry(second.id, 0.0, second.data or b"")
    settlement = Settlement(S, retries=[retry], put_back=[put_back], version=config.version)
    assert settle(reader, [settlement]) == set()
    assert reaper.promote(S.stream, 10).moved == 1
    assert reaper.mend_slots(S) == 0
    taken = taken[2:]
    while taken:
        assert settle(reader, [Settlement(S, done=[entry.id for entry in taken])]) == set()
        ended += [entry.id for entry in taken]
        taken = reader.take(S, ["a"], 100).entries
    reader.begin_read(S, 100, 0)
    assert [entry.data for entry in reader.finish_read(S)] == [second.data]
    reaper.trim(S.stream)
    assert reaper.depths(S).waiting == 0
    for store in (reader, reaper, operator):
        store.close()
    return ended


def test_on_a_cluster_lanes_are_in_the_slot_of_their_stream(tmp_path: Path) -> None:
    with cluster(tmp_path, masters=1) as nodes:
        (server,) = nodes.servers
        ended = run_jobs_within_a_limit(nodes.url())
        assert len(ended) == len(set(ended)) == 7
        keys = [key.decode() if isinstance(key, bytes) else key for key in server.client.keys("ready:*")]
        assert f"ready:{{{S.stream}}}/config" in keys
        assert {server.client.execute_command("CLUSTER", "KEYSLOT", key) for key in keys} == {
            server.client.execute_command("CLUSTER", "KEYSLOT", S.stream)
        }


def test_the_shipped_access_list_is_enough(redis_world: RedisWorld) -> None:
    text = (Path(__file__).resolve().parents[2] / "deploy/acl/jobworker.acl").read_text("utf-8")
    client = redis_world.server.client
    client.execute_command("ACL", "SETUSER", *text.split()[1:])
    try:
        url = redis_world.server.url.replace("//", "//jobworker:PASSWORD@")
        assert len(run_jobs_within_a_limit(url)) == 7
        reaper = RedisReaperStore(url)
        reaper.announce("host/a", ["a"], [S])
        assert reaper.key_faults(S) == []
        assert reaper.cron_clock(S.stream)[0] == b""
        reaper.close()
    finally:
        client.acl_deluser("jobworker")
