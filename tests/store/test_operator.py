"""Operator's store: dead letters move whole, pauses last, a job is found wherever it is."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator

import pytest

from jobworker.worker.admin.dead_letters import LetterFilter, read_letter
from jobworker.worker.envelope import fresh_job
from jobworker.worker.errors import StoreUnavailable
from jobworker.worker.flow import FlowConfig, Lane, Limit
from jobworker.worker.keys import Source
from jobworker.worker.store.operator import START, LanePlace, walk
from jobworker.worker.store.ports import Dead, Entry, Retry, Settlement, WaitingJob
from jobworker.worker.store.redis.operator import OperatorStore
from jobworker.worker.store.redis.reader import RedisReaderStore
from jobworker.worker.store.redis.server_facts import RedisFacts
from support.job_worlds import RedisWorld, settle

S = Source("stream:test", "cg-test")


@pytest.fixture
def operator(redis_world: RedisWorld) -> Iterator[OperatorStore]:
    store = OperatorStore(redis_world.server.url)
    yield store
    store.close()


def delivered(world: RedisWorld, *jobs: bytes) -> tuple[RedisReaderStore, list[bytes]]:
    """A reader that holds the jobs, and their ids."""
    reader = world.reader("host/a")
    reader.acquire([S])
    world.producer().add(S.stream, jobs)
    reader.begin_read(S, len(jobs), 0)
    return reader, [entry.id for entry in reader.finish_read(S)]


def given_up(world: RedisWorld, *letters: bytes) -> None:
    """Dead letters, made as the service makes them."""
    reader, ids = delivered(world, *(b"{}" for _ in letters))
    settle(reader, [Settlement(S, dead=[Dead(*pair) for pair in zip(ids, letters, strict=True)])])


def bodies(world: RedisWorld) -> list[bytes]:
    return [fields[b"data"] for _, fields in world.server.client.xrange(S.stream)]


class TestDeadLetters:
    def test_dead_letters_are_paged_both_ways_and_counted(
        self, redis_world: RedisWorld, operator: OperatorStore
    ) -> None:
        letters = [b"%d" % n for n in range(50)]
        given_up(redis_world, *letters)
        up = [e.data for page in walk(lambda at, n: operator.dead_after(S.stream, at, n)) for e in page]
        down = [e.data for page in walk(lambda at, n: operator.dead_before(S.stream, at, n)) for e in page]
        assert up == letters
        assert down == letters[::-1]
        assert operator.dead_count(S.stream) == 50
        assert operator.dead_after("stream:none", START, 5) == []

    def test_a_requeued_letter_is_a_job_and_no_letter(
        self, redis_world: RedisWorld, operator: OperatorStore
    ) -> None:
        given_up(redis_world, b"a", b"b", b"c")
        a, b, _ = [entry.id for entry in operator.dead_after(S.stream, START, 9)]
        before = len(bodies(redis_world))
        assert operator.requeue(S.stream, [(a, b"job a"), (b, b"job b")]) == [True, True]
        assert bodies(redis_world)[before:] == [b"job a", b"job b"]
        assert redis_world.dead_letters(S.stream) == [b"c"]

    def test_a_job_of_a_wrong_stream_is_requeued_to_another_one(
        self, redis_world: RedisWorld, operator: OperatorStore
    ) -> None:
        given_up(redis_world, b"a", b"b")
        a, _ = [entry.id for entry in operator.dead_after(S.stream, START, 9)]
        before = redis_world.length(S.stream)
        job = b'{"id":"a","type":"t","metadata":{"batch_id":"b1"}}'
        assert operator.requeue(S.stream, [(a, job)], "stream:right") == [True]
        assert operator.requeue(S.stream, [(a, job)], "stream:right") == [False]
        assert [fields[b"data"] for _, fields in redis_world.server.client.xrange("stream:right")] == [job]
        assert redis_world.length(S.stream) == before
        assert redis_world.dead_letters(S.stream) == [b"b"]
        redis_world.server.client.delete("stream:right")

    def test_two_operators_at_once_requeue_each_job_once(
        self, redis_world: RedisWorld, operator: OperatorStore
    ) -> None:
        given_up(redis_world, *(b"%d" % n for n in range(300)))
        jobs = [(e.id, b"job " + (e.data or b"")) for e in operator.dead_after(S.stream, START, 1000)]
        before = len(bodies(redis_world))
        other = OperatorStore(redis_world.server.url)
        moved: list[bool] = []
        thread = threading.Thread(target=lambda: moved.extend(other.requeue(S.stream, jobs[::-1])))
        thread.start()
        mine = operator.requeue(S.stream, jobs)
        thread.join(30)
        other.close()
        assert sum(mine) + sum(moved) == 300
        assert sorted(bodies(redis_world)[before:]) == sorted(job for _, job in jobs)
        assert operator.dead_count(S.stream) == 0

    def test_a_full_server_keeps_the_dead_letter(
        self, redis_world: RedisWorld, operator: OperatorStore
    ) -> None:
        given_up(redis_world, b"a")
        (letter,) = operator.dead_after(S.stream, START, 1)
        client = redis_world.server.client
        client.config_set("maxmemory", 1)
        try:
            with pytest.raises(StoreUnavailable, match="maxmemory"):
                operator.requeue(S.stream, [(letter.id, b"job a")])
        finally:
            client.config_set("maxmemory", 0)
        assert redis_world.dead_letters(S.stream) == [b"a"]

    def test_purged_letters_are_deleted_and_counted(
        self, redis_world: RedisWorld, operator: OperatorStore
    ) -> None:
        given_up(redis_world, b"a", b"b")
        a, _ = [entry.id for entry in operator.dead_after(S.stream, START, 9)]
        assert operator.purge(S.stream, [a, b"1-1"]) == 1
        assert operator.purge(S.stream, []) == 0
        assert redis_world.dead_letters(S.stream) == [b"b"]


class TestRetries:
    def test_retries_are_listed_soonest_first_with_due_times(
        self, redis_world: RedisWorld, operator: OperatorStore
    ) -> None:
        reader, (a, b) = delivered(redis_world, b"a", b"b")
        settle(reader, [Settlement(S, retries=[Retry(a, 90, b"late"), Retry(b, 30, b"soon")])])
        now = operator.wall_now_s(S.stream)
        soon, late = operator.retries(S.stream, 0, 10)
        assert (soon.data, late.data) == (b"soon", b"late")
        assert soon.due_wall_s == pytest.approx(now + 30, abs=5)
        assert operator.retries(S.stream, 1, 10) == [late]

    def test_a_retry_made_due_is_promoted_by_the_reaper(
        self, redis_world: RedisWorld, operator: OperatorStore
    ) -> None:
        reader, (a, b) = delivered(redis_world, b"a", b"b")
        settle(reader, [Settlement(S, retries=[Retry(a, 90, b"one"), Retry(b, 90, b"two")])])
        assert operator.retry_now(S.stream, [b"one", b"unknown"]) == 1
        assert redis_world.reaper().promote(S.stream, 10).moved == 1
        assert redis_world.waiting(S.stream) == [b"two"]
        assert operator.retry_now(S.stream, [b"one"]) == 0, "what is moved already is not put back"


class TestPauses:
    def test_pauses_last_until_resumed_and_readers_see_them(
        self, redis_world: RedisWorld, operator: OperatorStore
    ) -> None:
        operator.pause("audit", "disk full")
        operator.pause("embedding_batch", "")
        assert [(pause.job_type, pause.note) for pause in operator.pauses()] == [
            ("audit", "disk full"),
            ("embedding_batch", ""),
        ]
        assert operator.pauses()[0].wall_since_s == pytest.approx(operator.wall_now_s(S.stream), abs=5)
        assert redis_world.reader("host/b").paused_types() == {"audit", "embedding_batch"}
        operator.pause("embedding_batch", "bytes \udcff of a terminal")
        assert operator.pauses()[1].note == "bytes ? of a terminal"
        assert operator.resume("audit")
        assert not operator.resume("audit")
        assert redis_world.reader("host/b").paused_types() == {"embedding_batch"}

    @pytest.mark.parametrize(
        "value", [b"[" * 100_000, b'{"since": "nan"}', b'{"since": 1e300}', b'{"since": [1]}', b"\xff"]
    )
    def test_a_damaged_value_pauses_too(
        self, redis_world: RedisWorld, operator: OperatorStore, value: bytes
    ) -> None:
        redis_world.server.client.hset("jobworker:paused", "audit", value)
        (pause,) = operator.pauses()
        assert (pause.job_type, pause.wall_since_s) == ("audit", 0.0)

    def test_a_value_written_by_hand_pauses_too(
        self, redis_world: RedisWorld, operator: OperatorStore
    ) -> None:
        redis_world.server.client.hset("jobworker:paused", "audit", "1")
        assert [pause.job_type for pause in operator.pauses()] == ["audit"]
        assert redis_world.reader("host/b").paused_types() == {"audit"}

    def test_a_user_without_permission_for_pauses_can_read_jobs(self, redis_world: RedisWorld) -> None:
        redis_world.server.client.hset("jobworker:paused", "audit", "1")
        redis_world.server.client.acl_setuser(
            "narrow", enabled=True, passwords=["+pw"], commands=["+@all"], keys=["stream:*", "fence:*"]
        )
        reader = RedisReaderStore(redis_world.server.url.replace("//", "//narrow:pw@"), "host/n")
        try:
            reader.acquire([S])
            assert reader.paused_types() == set()
        finally:
            reader.close()
            redis_world.server.client.acl_deluser("narrow")


class TestLanes:
    def test_a_job_whose_limits_changed_is_found_until_it_is_sorted_again(
        self, redis_world: RedisWorld, operator: OperatorStore
    ) -> None:
        one, two = (b'{"type": "a", "tenant_id": "t", "id": "%d"}' % number for number in (1, 2))
        reader, ids = delivered(redis_world, one, two)
        first, second = (Entry(id, data) for id, data in zip(ids, (one, two), strict=True))
        lane = Lane("a", 5, "t").encode()
        assert operator.lane_place(S.stream, first) is None
        reader.sort(S, 0, {lane: [WaitingJob(entry.id, len(one)) for entry in (first, second)]})
        assert operator.lane_place(S.stream, second) == LanePlace(1, None)
        limit = Limit("a/tenant", "a", "tenant", concurrency=1)
        assert operator.configure(S.stream, FlowConfig(limits=(limit,)))
        assert operator.lane_place(S.stream, second) == LanePlace(1, None, is_outdated=True)
        assert operator.lane_place(S.stream, Entry(b"1-1", one)) is None


class TestWhereAJobIs:
    def test_a_missing_group_is_none(self, redis_world: RedisWorld, operator: OperatorStore) -> None:
        assert operator.group(S) is None
        redis_world.producer().add(S.stream, [b"x"])
        assert operator.group(S) is None
        assert operator.leases(S, START, 5) == []

    def test_a_reader_that_finds_nothing_is_not_silent(
        self, redis_world: RedisWorld, operator: OperatorStore
    ) -> None:
        reader, (a,) = delivered(redis_world, b"a")
        settle(reader, [Settlement(S, [a])])
        time.sleep(0.5)  # the server counts the idle time
        began_s = time.monotonic()
        reader.renew_name([S])
        group = operator.group(S)
        assert group is not None
        assert group.consumers[0].idle_s < time.monotonic() - began_s + 0.1
        redis_world.server.client.hset("fence:stream:test", "/holder/host/a", '{"renewed": ["x"]}')
        group = operator.group(S)
        assert group is not None
        assert group.consumers[0].idle_s >= 0.5, "a damaged record does not count"

    def test_leases_name_their_consumer(self, redis_world: RedisWorld, operator: OperatorStore) -> None:
        reader, (a, b) = delivered(redis_world, b"a", b"b")
        reader.set_deaths(S, {a: 2})
        lease = operator.lease(S, a)
        assert lease is not None
        assert (lease.consumer, lease.deliveries) == ("host/a", 1)
        assert lease.idle_s < 30
        assert operator.entry(S.stream, a) == Entry(a, b"a", deaths=2)
        assert [one.id for one in operator.leases(S, START, 10)] == [a, b]
        settle(reader, [Settlement(S, done=[a])])
        assert operator.lease(S, a) is None
        group = operator.group(S)
        assert group is not None
        assert (group.last_delivered, group.pending) == (b, 1)
        assert [(c.name, c.pending) for c in group.consumers] == [("host/a", 1)]
        assert operator.entry(S.stream, b"1-1") is None


class TestLetters:
    def test_a_letter_of_the_service_is_parsed(self) -> None:
        task = b'{"id":"j","type":"audit","tenant_id":"t","x":1}'
        said = {"error": "E: e", "reason": "poison", "original_id": "5-0", "retry_count": 2, "deaths": 3}
        data = json.dumps(said)[:-1].encode() + b',"task":' + task + b"}"
        letter = read_letter("s", Entry(b"1500-0", data))
        assert (letter.job_id, letter.type, letter.tenant_id, letter.task) == ("j", "audit", "t", task)
        assert (letter.reason, letter.deaths, letter.wall_s) == ("poison", 3, 1.5)

    @pytest.mark.parametrize("data", [None, b"", b"no json", b"[1]", b'{"task": 5}', b'{"retry_count": "x"}'])
    def test_a_malformed_letter_is_shown_without_a_job(self, data: bytes | None) -> None:
        assert read_letter("s", Entry(b"1-0", data)).task is None

    def test_a_fresh_job_keeps_every_other_byte(self) -> None:
        task = b'{"id": "j", "retry_count": 3, "payload": {"n": 1.50, "s": "\\u4e00"}, "deaths": 2}'
        assert fresh_job(task) == b'{"id":"j","payload":{"n": 1.50, "s": "\\u4e00"}}'
        assert fresh_job(b'{"id": "j"}') == b'{"id": "j"}'

    def test_a_choice_is_all_that_fits_everything(self) -> None:
        letter = read_letter(
            "s", Entry(b"5000-0", b'{"task":{"id":"j","type":"audit"},"reason":"poison","error":"E: no"}')
        )
        assert letter in LetterFilter()
        assert letter in LetterFilter(ids=frozenset({"j"}), reasons=frozenset({"poison"}), error="no")
        assert letter not in LetterFilter(ids=frozenset({"j"}), reasons=frozenset({"exhausted"}))
        assert letter in LetterFilter(after_wall_s=4, before_wall_s=6)
        assert letter not in LetterFilter(before_wall_s=4)
        assert LetterFilter().is_empty
        assert not LetterFilter(before_wall_s=4).is_empty


class TestNamesOfOthers:
    def test_names_that_are_no_text_and_damaged_deaths_end_no_report(
        self, redis_world: RedisWorld, operator: OperatorStore
    ) -> None:
        _, ids = delivered(redis_world, b"{}")
        client = redis_world.server.client
        client.hset("deaths:stream:test", ids[0], "abc")
        client.execute_command("XGROUP", "CREATE", S.stream, b"\xff", "0")
        client.execute_command("XGROUP", "CREATECONSUMER", S.stream, S.group, b"\xfe")
        client.execute_command("XCLAIM", S.stream, S.group, b"\xfe", 0, ids[0])
        entry, lease = operator.entry(S.stream, ids[0]), operator.lease(S, ids[0])
        assert entry is not None
        assert entry.deaths == 0
        assert lease is not None
        assert lease.consumer == "\ufffd"
        with contextlib.closing(RedisFacts(redis_world.server.url)) as facts:
            assert set(facts.stream(S).lags) == {S.group, "\ufffd"}
