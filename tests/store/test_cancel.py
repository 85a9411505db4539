"""Cancellation in the job store: the store in memory and real servers decide alike."""

import json
from collections.abc import Sequence

import pytest

from jobworker.worker.cancel import CancelledJob, Canceller, JobFilter, outcome_of
from jobworker.worker.conditions import unique_name
from jobworker.worker.envelope import read_header
from jobworker.worker.flow import FlowConfig, Lane, LaneRules, Limit, read_flow_header
from jobworker.worker.producer import Producer
from jobworker.worker.results import CancelOutcome
from jobworker.worker.store.ports import Dead, PutBack, ReaderStore, Retry, Settlement, WaitingJob
from support.job_store_steps import S, given, pending, read
from support.job_worlds import RedisWorld, World, settle


def job(id: str, tenant: str = "t1", type: str = "a", **more: object) -> bytes:
    return json.dumps({"id": id, "type": type, "tenant_id": tenant, **more}).encode()


def cancel(world: World, *ids: str, stream: str = S.stream, **options: object) -> list[CancelledJob]:
    types, tenants = (frozenset(options.pop(name, ())) for name in ("types", "tenants"))  # type: ignore[call-overload]
    selected = JobFilter(frozenset(ids), types, tenants)
    with_options = Canceller(world.producer(), [stream], selected, by="test", **options)  # type: ignore[arg-type]
    return list(with_options.run())


def outcomes(jobs: Sequence[CancelledJob]) -> dict[str, str]:
    return {id: str(outcome_of([job for job in jobs if job.id == id])) for id in {job.id for job in jobs}}


def letters(any_world: World) -> dict[str, str]:
    found = [json.loads(letter) for letter in any_world.dead_letters(S.stream)]
    return {letter["task"]["id"]: letter["reason"] for letter in found}


def sort(store: ReaderStore, limits: tuple[Limit, ...] = ()) -> None:
    """Sort all new entries into lanes."""
    rules = LaneRules(limits)
    lanes: dict[bytes, list[WaitingJob]] = {}
    for entry in read(store, 1000):
        assert entry.data is not None
        name = rules.name_of(read_flow_header(entry.data))
        lanes.setdefault(name, []).append(WaitingJob(entry.id, len(entry.data)))
    assert store.sort(S, store.flow_config(S).version, lanes) == set()


def taken(store: ReaderStore, count: int = 1000) -> list[str]:
    return [json.loads(entry.data or b"")["id"] for entry in store.take(S, ["a", "b"], count).entries]


# -- jobs that wait


def test_an_unread_job_is_removed_and_becomes_a_dead_letter(any_world: World) -> None:
    store, _ = given(any_world)
    any_world.producer().add(S.stream, [job("j1"), job("j2")])
    assert outcomes(cancel(any_world, "j1")) == {"j1": "cancelled"}
    assert letters(any_world) == {"j1": "cancelled"}
    assert [json.loads(entry.data or b"")["id"] for entry in read(store)] == ["j2"]
    assert store.backlog(S).cancelled == 1


def test_a_job_of_a_stream_that_no_service_has_read_is_removed(any_world: World) -> None:
    any_world.producer().add(S.stream, [job("j1")])
    assert outcomes(cancel(any_world, "j1", discard=True)) == {"j1": "cancelled"}
    assert (any_world.length(S.stream), any_world.dead_letters(S.stream)) == (0, [])


def test_a_retry_is_removed(any_world: World) -> None:
    store, (first, second) = given(any_world, job("j1"), job("j2"))
    retries = [Retry(first, 60.0, job("j1", retry_count=1)), Retry(second, 60.0, job("j2", retry_count=1))]
    settle(store, [Settlement(S, retries=retries)])
    assert outcomes(cancel(any_world, "j1")) == {"j1": "cancelled"}
    assert [json.loads(data)["id"] for data in any_world.waiting(S.stream)] == ["j2"]
    assert letters(any_world) == {"j1": "cancelled"}


def test_every_retry_of_many_is_removed(any_world: World) -> None:
    store, ids = given(any_world, *(job(f"j{n}", f"t{n % 2}") for n in range(450)))
    while len(ids) < 450:
        ids += [entry.id for entry in read(store)]
    retries = [Retry(id, 60.0, job(f"j{n}", f"t{n % 2}", retry_count=1)) for n, id in enumerate(ids)]
    settle(store, [Settlement(S, retries=retries)])
    cancelled = [
        one.id for one in cancel(any_world, tenants=["t0"], discard=True) if one.outcome == "cancelled"
    ]
    assert len(cancelled) == len(set(cancelled)) == 225
    assert len(any_world.waiting(S.stream)) == 225


def test_a_job_in_a_lane_is_removed_with_its_count(any_world: World) -> None:
    store, _ = given(any_world)
    any_world.producer().add(S.stream, [job(f"j{n}") for n in range(4)])
    sort(store)
    assert outcomes(cancel(any_world, "j0", "j2")) == {"j0": "cancelled", "j2": "cancelled"}
    assert store.backlog(S).waiting == {"a": 2}
    assert taken(store) == ["j1", "j3"]
    assert store.backlog(S).waiting in ({}, {"a": 0})


def test_the_last_job_of_the_lanes_leaves_no_key_behind(redis_world: RedisWorld) -> None:
    store, _ = given(redis_world)
    redis_world.producer().add(S.stream, [job("j0", "t1"), job("j1", "t2")])
    sort(store)
    cancel(redis_world, discard=True)
    left = {key.decode() for key in redis_world.server.client.keys("*ready*")}
    assert left == {f"ready:{S.stream}/config"}
    assert redis_world.length(S.stream) == 0
    redis_world.producer().add(S.stream, [job("j2")])
    sort(store)
    assert taken(store) == ["j2"]


def test_a_job_behind_younger_ones_leaves_no_mark(redis_world: RedisWorld) -> None:
    store, _ = given(redis_world)
    redis_world.producer().add(S.stream, [job("old")])
    store.begin_read(S, 10, 0)
    (old,) = store.finish_read(S)
    redis_world.pass_time(0.05)
    redis_world.producer().add(S.stream, [job("young")])
    sort(store)
    lane = LaneRules().name_of(read_flow_header(old.data or b""))
    assert store.sort(S, 0, {lane: [WaitingJob(old.id, len(old.data or b""))]}) == set()
    late = f"ready:{S.stream}/late"
    assert redis_world.server.client.zrange(late, 0, -1) == [old.id]
    cancel(redis_world, "old", discard=True)
    assert redis_world.server.client.exists(late) == 0
    assert taken(store) == ["young"]


def test_a_lane_that_waits_for_a_limit_is_left(any_world: World) -> None:
    store, _ = given(any_world)
    limits = (Limit("a/tenant", "a", "tenant", 1, 0, 0),)
    assert store.configure(S, FlowConfig(0, limits, {}))
    any_world.producer().add(S.stream, [job("j0"), job("j1"), job("j2")])
    sort(store, limits)
    assert taken(store) == ["j0"]
    assert taken(store) == [], "the limit is reached, so the lane is parked"
    assert outcomes(cancel(any_world, "j1", "j2")) == {"j1": "cancelled", "j2": "cancelled"}
    settle(store, [Settlement(S, done=pending(store))])
    any_world.producer().add(S.stream, [job("j3"), job("j4")])
    sort(store, limits)
    assert taken(store) == ["j3"]


def test_a_woken_lane_that_is_emptied_leaves_its_room_to_another(any_world: World) -> None:
    # A slot that becomes free wakes one lane. If that lane has no job left at its turn, another must start.
    store, _ = given(any_world)
    limits = (Limit("a/tenant", "a", "tenant", 1, 0, 0),)
    assert store.configure(S, FlowConfig(0, limits, {}))
    prioritised = [job(f"j{priority}", metadata={"priority": str(priority)}) for priority in (9, 7, 2)]
    any_world.producer().add(S.stream, prioritised)
    sort(store, limits)
    assert taken(store) == ["j9"]
    assert taken(store) == [], "both other lanes are parked"
    settle(store, [Settlement(S, done=pending(store))])
    assert outcomes(cancel(any_world, "j7")) == {"j7": "cancelled"}
    assert taken(store) == ["j2"]


def test_a_job_whose_limits_have_changed_is_removed_from_its_lane(any_world: World) -> None:
    store, _ = given(any_world)
    any_world.producer().add(S.stream, [job("j0"), job("j1")])
    sort(store)
    assert store.configure(S, FlowConfig(0, (Limit("a/tenant", "a", "tenant", 1, 0, 0),), {}))
    assert outcomes(cancel(any_world, "j0")) == {"j0": "cancelled"}
    assert store.backlog(S).waiting == {"a": 1}
    (left,) = store.take(S, ["a"], 10).outdated
    assert json.loads(left.data or b"")["id"] == "j1"


# -- jobs that a service has


def test_a_pending_job_is_flagged_for_its_service(any_world: World) -> None:
    store, (first, second) = given(any_world, job("j1"), job("j2"))
    assert store.backlog(S).cancels == 0
    assert outcomes(cancel(any_world, "j1")) == {"j1": "requested"}
    assert outcomes(cancel(any_world, "j2", discard=True)) == {"j2": "requested"}
    assert store.backlog(S).cancels == 2
    assert store.cancels(S) == {first: True, second: False}
    assert (pending(store), any_world.dead_letters(S.stream)) == ([first, second], [])
    store.end_cancels(S, [first])
    assert store.cancels(S) == {second: False}


def test_a_flagged_job_is_neither_retried_nor_put_back(any_world: World) -> None:
    store, (first, second, third) = given(any_world, job("j1"), job("j2"), job("j3"))
    cancel(any_world, "j1")
    cancel(any_world, "j2", discard=True)
    lane = LaneRules().name_of(read_flow_header(job("j2")))
    settlement = Settlement(
        S,
        retries=[Retry(first, 1.0, job("j1")), Retry(third, 60.0, job("j3"))],
        put_back=[PutBack(WaitingJob(second, 10), lane, "=a", 1.0)],
    )
    (settled,) = store.settle([settlement])
    assert (settled.refused, settled.unsettled) == (set(), set())
    assert settled.cancelled == {first: True, second: False}
    assert pending(store) == [first, second]
    assert len(any_world.waiting(S.stream)) == 1
    assert store.backlog(S).waiting in ({}, {"a": 0})


def test_a_flagged_job_that_succeeds_is_done(any_world: World) -> None:
    store, (first,) = given(any_world, job("j1"))
    cancel(any_world, "j1")
    assert settle(store, [Settlement(S, done=[first])]) == set()
    assert pending(store) == []


# -- which jobs


def test_requests_whose_entries_have_ended_are_forgotten(redis_world: RedisWorld) -> None:
    store, (first,) = given(redis_world, job("j1"))
    ended = {f"1-{number}": "1" for number in range(2000)}
    redis_world.server.client.hset(f"ready:{S.stream}/cancels", mapping=ended)
    for _ in range(80):
        cancel(redis_world, "j1")
    left = store.cancels(S)
    assert left[first]
    assert len(left) <= 1001


def test_a_filter_selects_by_type_and_tenant(any_world: World) -> None:
    given(any_world)
    jobs = [job("j1"), job("j2", "t2"), job("j3", type="b"), job("j4", "t2", "b")]
    any_world.producer().add(S.stream, jobs)
    assert outcomes(cancel(any_world, types=["a"], tenants=["t2"])) == {"j2": "cancelled"}
    assert outcomes(cancel(any_world, types=["b"])) == {"j3": "cancelled", "j4": "cancelled"}
    assert letters(any_world).keys() == {"j2", "j3", "j4"}


def test_a_dry_run_changes_nothing(any_world: World) -> None:
    store, (first,) = given(any_world, job("j1"))
    settle(store, [Settlement(S, retries=[Retry(first, 60.0, job("j1"))])])
    any_world.producer().add(S.stream, [job("j2"), job("j3")])
    read(store, 1)
    found = outcomes(cancel(any_world, dry_run=True))
    assert found == {"j1": "cancelled", "j2": "requested", "j3": "cancelled"}
    assert (store.cancels(S), len(any_world.waiting(S.stream)), any_world.dead_letters(S.stream)) == (
        {},
        1,
        [],
    )
    assert store.backlog(S).cancelled == 0


def test_jobs_that_ended_and_unknown_ones_are_told_apart(any_world: World) -> None:
    store, (first,) = given(any_world, job("j1"))
    settle(store, [Settlement(S, done=[first])])
    with Producer(store=any_world.producer()) as producer:
        assert producer.cancel("j1", stream=S.stream) == CancelOutcome.ENDED
        assert producer.cancel(first.decode(), stream=S.stream) == "ended"
        assert producer.cancel("j2", stream=S.stream) == "unknown"
        assert producer.cancel("j2") == "unknown"


def test_malformed_entries_are_passed_over(any_world: World) -> None:
    store, _ = given(any_world)
    any_world.add_without_data(S.stream)
    any_world.producer().add(S.stream, [b"{", b'{"id":"j1"}', b'{"id":1,"type":"a"}', job("j1")])
    assert outcomes(cancel(any_world, "j1")) == {"j1": "cancelled"}
    assert len(read(store)) == 4


def test_an_id_that_json_escapes_is_found(any_world: World) -> None:
    given(any_world)
    any_world.producer().add(S.stream, [b'{"id":"caf\\u00e9 1","type":"a"}'])
    assert outcomes(cancel(any_world, "café 1")) == {"café 1": "cancelled"}


def test_a_cancelled_job_that_asks_for_it_has_a_result(any_world: World) -> None:
    given(any_world)
    any_world.producer().add(S.stream, [job("j1", metadata={"keep_result": "true"}), job("j2")])
    cancel(any_world, discard=True)
    with Producer(store=any_world.producer()) as producer:
        result = producer.result("j1", 0, stream=S.stream)
        assert (result.state, result.value, result.reason) == ("cancelled", None, "cancelled")
        with pytest.raises(TimeoutError, match="job j2 has no result after 0 s"):
            producer.result("j2", 0, stream=S.stream)


def test_cancelled_jobs_count_as_dead_in_their_batch(any_world: World) -> None:
    store, _ = given(any_world)
    with Producer(store=any_world.producer()) as producer, producer.batch("t1") as batch:
        ids = [batch.enqueue("a", number, stream=S.stream) for number in range(4)]
        ids.append(batch.enqueue("a", 4, stream=S.stream, delay=60.0))
    (running,) = read(store, 1)
    assert store.register_batches(S, {running.id: batch.id}) == set()
    cancel(any_world, ids[1])
    cancel(any_world, ids[4], discard=True)
    sort(store)
    cancel(any_world, ids[2], dry_run=True)
    cancel(any_world, ids[0], ids[2], discard=True)
    found = any_world.producer().batch_hash(S.stream, batch.id)
    assert found is not None
    assert (found.total, found.done, found.dead) == (5, 0, 3)
    settle(store, [Settlement(S, dead=[Dead(running.id, b"", None, ids[0], b"cancelled")])])
    found = any_world.producer().batch_hash(S.stream, batch.id)
    assert found is not None
    assert (found.done, found.dead) == (0, 4)
    assert any_world.producer().result(S.stream, ids[0]) == b"cancelled"


def test_the_key_of_a_cancelled_job_is_free_again(any_world: World) -> None:
    store, _ = given(any_world)
    again = job("j2", metadata={"idempotency_key": "k"})
    any_world.producer().add(S.stream, [job("j1", metadata={"idempotency_key": "k"})])
    (first,) = read(store)
    name = unique_name(read_header(again))
    assert store.claim_keys(S, [(first.id, name)], 3600.0) == {}
    waits = job("j1", metadata={"idempotency_key": "k"}, jobworker_first_id=first.id.decode())
    settle(store, [Settlement(S, retries=[Retry(first.id, 60.0, waits)])])
    any_world.producer().add(S.stream, [again])
    (second,) = read(store)
    assert store.claim_keys(S, [(second.id, name)], 3600.0) == {second.id: first.id}
    cancel(any_world, "j1", discard=True)
    assert store.claim_keys(S, [(second.id, name)], 3600.0) == {}


def test_a_search_ends_at_its_limit(any_world: World) -> None:
    any_world.producer().add(S.stream, [job(f"j{n}") for n in range(30)])
    selected = JobFilter(frozenset(["j20"]))
    search = Canceller(any_world.producer(), [S.stream], selected, by="test", scan_limit=10)
    assert outcome_of(list(search.run())) == CancelOutcome.UNKNOWN
    assert search.incomplete == [S.stream]


def test_many_jobs_are_cancelled_in_steps(any_world: World) -> None:
    store, _ = given(any_world)
    any_world.producer().add(S.stream, [job(f"j{n}", f"t{n % 2}") for n in range(500)])
    sort(store)
    assert len(cancel(any_world, tenants=["t1"], discard=True)) == 250
    assert store.backlog(S).waiting == {"a": 250}
    assert taken(store, 250) == [f"j{n}" for n in range(0, 500, 2)]


def test_a_lane_name_is_that_of_a_lane() -> None:
    name = LaneRules().name_of(read_flow_header(job("j1")))
    assert (Lane.decode(name).type, Lane.decode(name).tenant_id) == ("a", "t1")
