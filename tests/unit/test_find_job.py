"""A job is found by its id wherever it is, with the reason why it waits there."""

from typing import Any

import pytest

from jobworker.worker.admin.find_job import OVERDUE_S, SILENT_S, JobFinder
from jobworker.worker.admin.identity import read_identity
from jobworker.worker.admin.status_client import Service
from jobworker.worker.envelope import with_retry
from jobworker.worker.keys import Source
from jobworker.worker.shards import shard_names
from jobworker.worker.store.announcements import Announcement
from jobworker.worker.store.operator import LanePlace, Lease, Pause, Rivals, Scheduled
from jobworker.worker.store.ports import RELEASED_IDLE_S, Entry
from support.fake_operator import NOW_S, SOURCE, FakeOperatorStore, job, letter


@pytest.fixture
def store() -> Any:
    """Entries 1-0 to 5-0 with the jobs j1 to j5; a service has read the first two."""
    store = FakeOperatorStore()
    store.streams[SOURCE.stream] = [Entry(b"%d-0" % n, job(f"j{n}")) for n in range(1, 6)]
    store.read_up_to(b"2-0")
    return store


def find(store: Any, id: str, services: list[Service] | None = None, scan_limit: int = 1000) -> Any:
    (location,) = JobFinder(store, [SOURCE], services or [], scan_limit).find(id)
    return location


def lease(store: Any, idle_s: float, id: bytes = b"2-0", deaths: int = 0) -> None:
    """Let host/blue hold the entry."""
    store.leased[id] = Lease(id, "host/blue", idle_s, 1)
    entries = store.streams[SOURCE.stream]
    store.streams[SOURCE.stream] = [e._replace(deaths=deaths) if e.id == id else e for e in entries]


def service(**status: Any) -> Service:
    """A service with one busy worker, which runs entry 2-0."""
    running = {"for_s": 3.0, "limit_in_s": 57.0, "count": 1,
               "jobs": [{"stream": SOURCE.stream, "entry_id": "2-0", "type": "audit"}]}  # fmt: skip
    worker = {"role": "worker", "slot": 1, "pid": 7, "running": running}
    return Service("http://a", {"host": "host", "instance": "blue", "children": [worker], **status})


class TestQueued:
    def test_the_number_of_jobs_ahead_is_given(self, store: Any) -> None:
        location = find(store, "j5")
        assert (location.state, location.job_id, location.facts["ahead"]) == ("queued", "j5", 2)
        assert location.facts["ahead_is_exact"]
        assert "waits for its turn; 2 queued ahead of it" in location.why
        assert find(store, "5-0").facts["entry_id"] == "5-0"

    def test_the_batch_of_a_job_is_named(self, store: Any) -> None:
        member = b'{"id":"j6","type":"audit","metadata":{"batch_id":"import-7"}}'
        store.streams[SOURCE.stream].append(Entry(b"6-0", member))
        assert find(store, "j6").facts["batch"] == "import-7"
        assert "batch" not in find(store, "j5").facts

    def test_a_count_that_the_scan_limit_ends_is_not_exact(self, store: Any) -> None:
        more = [Entry(b"%d-0" % n, job(f"j{n}")) for n in range(6, 40)]
        store.streams[SOURCE.stream] += more
        location = find(store, "39-0", scan_limit=10)
        assert not location.facts["ahead_is_exact"]
        assert f"more than {location.facts['ahead']} queued" in location.why

    def test_a_stream_without_reader_is_the_reason(self, store: Any) -> None:
        store.read_up_to(b"2-0", idle_s=SILENT_S + 1)
        assert f"no service reads this stream for {SILENT_S + 1:.0f} s" in find(store, "j5").why
        store.groups.clear()
        assert "there is no group cg-test" in find(store, "j5").why

    def test_a_paused_type_is_the_reason(self, store: Any) -> None:
        store.paused = [Pause("audit", NOW_S - 90, "disk full")]
        assert "paused for 90 s (disk full): jobworker resume audit" in find(store, "j5").why


class TestPending:
    def test_a_running_job_names_its_worker_and_timeout(self, store: Any) -> None:
        lease(store, 1.0)
        location = find(store, "j2", [service()])
        assert (location.state, location.facts["worker"]) == ("running", "host/blue/1")
        assert (location.facts["running_for_s"], location.facts["limit_in_s"]) == (3.0, 57.0)

    @pytest.mark.parametrize(
        ("limit_in_s", "why"),
        [
            (57.4, "it times out in 57 s"),
            (0.3, "it times out in 0.3 s"),
            (0.0, "it is 0.0 s past its timeout: its worker is being killed"),
            (-0.3, "it is 0.3 s past its timeout: its worker is being killed"),
        ],
    )
    def test_the_time_that_is_left_is_never_negative(self, store: Any, limit_in_s: float, why: str) -> None:
        lease(store, 1.0)
        running = service()
        running.status["children"][0]["running"]["limit_in_s"] = limit_in_s
        assert find(store, "j2", [running]).why.endswith(why)

    @pytest.mark.parametrize(
        ("idle_s", "why"),
        [
            (1.0, "waits for a worker there, or runs"),
            (31.0, "the lease has expired, so a running service claims it"),
            (RELEASED_IDLE_S, "released it when it stopped"),
        ],
    )
    def test_the_lease_says_why_it_waits(self, store: Any, idle_s: float, why: str) -> None:
        lease(store, idle_s)
        assert why in find(store, "j2").why

    def test_the_lease_time_of_the_services_is_used(self, store: Any) -> None:
        lease(store, 31.0)
        assert "expired" not in find(store, "j2", [service(lease_s=60, children=[])]).why

    def test_an_open_circuit_breaker_or_a_pause_is_the_reason(self, store: Any) -> None:
        lease(store, 1.0)
        gauge = {"z_novel_circuit_open": [{"task_type": "audit", "value": 1}]}
        assert (
            "circuit breaker of type audit is open"
            in find(store, "j2", [service(children=[], metrics=gauge)]).why
        )
        store.paused = [Pause("audit", NOW_S, "")]
        assert "type audit is paused" in find(store, "j2").why

    def test_jobs_that_kill_workers_are_the_reason(self, store: Any) -> None:
        lease(store, 1.0)
        gauge = {"z_novel_crash_circuits_open": [{"task_type": "audit", "value": 1}]}
        why = find(store, "j2", [service(children=[], metrics=gauge)]).why
        assert "jobs of type audit kill worker after worker" in why

    def test_worker_deaths_are_reported(self, store: Any) -> None:
        lease(store, 1.0, deaths=2)
        location = find(store, "j2")
        assert (location.facts["deaths"], "2 workers died" in location.why) == (2, True)

    def test_an_acknowledged_entry_is_finished(self, store: Any) -> None:
        assert find(store, "j2").state == "finished"


class TestRetrying:
    def test_the_time_of_the_next_try_is_given(self, store: Any) -> None:
        store.scheduled[SOURCE.stream] = [Scheduled(NOW_S + 60, job("r", retry_count=2))]
        location = find(store, "r")
        assert (location.state, location.facts["due_in_s"], location.facts["retry_count"]) == (
            "retrying",
            60,
            2,
        )
        assert "the next try is in 60.0 s" in location.why

    def test_the_last_error_says_why_it_is_tried_again(self, store: Any) -> None:
        failed = with_retry(job("r"), 1, 0, "ValueError: 缺章", 1000)
        store.scheduled[SOURCE.stream] = [Scheduled(NOW_S + 60, failed)]
        location = find(store, "r")
        assert location.facts["last_error"] == "ValueError: 缺章"
        assert location.why.endswith("the last one failed: ValueError: 缺章")
        store.scheduled.clear()
        store.streams[SOURCE.stream] += [Entry(b"6-0", failed)]
        assert find(store, "r").facts["last_error"] == "ValueError: 缺章"

    def test_an_overdue_retry_says_that_no_service_promotes_it(self, store: Any) -> None:
        store.scheduled[SOURCE.stream] = [Scheduled(NOW_S - OVERDUE_S - 1, job("r"))]
        assert "overdue: no running service promotes" in find(store, "r").why
        store.scheduled[SOURCE.stream] = [Scheduled(NOW_S - OVERDUE_S + 1, job("r"))]
        assert "overdue" not in find(store, "r").why

    def test_the_entry_of_an_earlier_try_is_not_shown_beside_it(self, store: Any) -> None:
        store.scheduled[SOURCE.stream] = [Scheduled(NOW_S + 60, job("j1", retry_count=1))]
        assert find(store, "j1").state == "retrying"

    def test_a_job_that_was_sent_with_a_delay_has_had_no_try(self, store: Any) -> None:
        store.scheduled[SOURCE.stream] = [Scheduled(NOW_S + 60, job("r"))]
        location = find(store, "r")
        assert (location.state, location.why) == ("delayed", "its delayed start is in 60.0 s")
        store.scheduled[SOURCE.stream] = [Scheduled(NOW_S + 60, job("r", deaths=1))]
        assert find(store, "r").state == "retrying"

    def test_a_job_says_until_when_it_is_delayed(self, store: Any) -> None:
        data = job("r", metadata={"not_before": f"{NOW_S + 60}"})
        store.scheduled[SOURCE.stream] = [Scheduled(NOW_S + 60, data)]
        location = find(store, "r")
        assert location.why == "delayed until 10060.0: its delayed start is in 60.0 s"
        store.scheduled.clear()
        store.streams[SOURCE.stream] += [Entry(b"6-0", data)]
        location = find(store, "r")
        assert (location.state, location.facts["not_before"]) == ("queued", "10060.0")
        assert location.why.endswith("then it is delayed until 10060.0")


class TestReplaced:
    def test_a_duplicate_names_the_job_that_ran(self, store: Any) -> None:
        store.known_rivals[b"2-0"] = Rivals(owner=b"1-0", newest=b"3-0")
        location = find(store, "j2")
        assert (location.state, location.facts["duplicate_of"]) == ("finished", "1-0")
        assert location.why == "not run: a duplicate of the job in entry 1-0, by its idempotency_key"

    def test_a_superseded_job_names_the_newer_one(self, store: Any) -> None:
        store.known_rivals[b"2-0"] = Rivals(newest=b"3-0")
        location = find(store, "j2")
        assert (location.state, location.facts["superseded_by"]) == ("finished", "3-0")
        assert "the job in entry 3-0 has the same supersede_key and is newer" in location.why
        assert "after a success" not in location.why


class TestDead:
    @pytest.mark.parametrize("id", ["j", "9-0", "77-0"])
    def test_a_letter_is_found_by_each_of_its_ids(self, store: Any, id: str) -> None:
        store.letters[SOURCE.stream] = [letter("9-0", "timeout", original_id="77-0", error="too slow")]
        location = find(store, id)
        assert (location.state, location.facts["letter"], location.facts["reason"]) == (
            "dead",
            "9-0",
            "timeout",
        )
        assert "too slow" in location.why

    def test_the_traceback_is_shown(self, store: Any) -> None:
        details = {"traceback": "Traceback\n  line 1", "batch": ["1-0"]}
        store.letters[SOURCE.stream] = [letter("9-0", "permanent", original_id="77-0", details=details)]
        assert find(store, "9-0").facts["traceback"] == "Traceback\n  line 1"


def test_a_search_that_the_scan_limit_ends_says_where(store: Any) -> None:
    store.scheduled[SOURCE.stream] = [Scheduled(NOW_S + n, job(f"r{n}")) for n in range(300)]
    store.letters[SOURCE.stream] = [letter(f"{n}-0") for n in range(1, 9)]
    finder = JobFinder(store, [SOURCE], [], 4)
    assert finder.find("x") == []
    assert finder.incomplete == [
        SOURCE.stream,
        f"retries of {SOURCE.stream}",
        f"dead letters of {SOURCE.stream}",
    ]
    complete = JobFinder(store, [SOURCE], [], 1000)
    assert (complete.find("x"), complete.incomplete, complete.scanned) == ([], [], 5 + 300 + 8)


def test_an_id_with_escapes_in_json_is_found(store: Any) -> None:
    store.streams[SOURCE.stream] = [Entry(b"9-0", b'{"id": "\\u957f/\\u7bc7", "type": "audit"}')]
    assert find(store, "长/篇").state == "queued"


@pytest.mark.parametrize(
    ("data", "id", "retry_count"),
    [
        (b'{"id": "j", "type": "a", "retry_count": 3}', "j", 3),
        (b'{"id": "j", "type": "a", "retry_count": "3"}', "j", 0),
        (b'{"id": 5}', "", 0),
        (b"[]", "", 0),
        (b"[" * 100_000, "", 0),
        (None, "", 0),
    ],
)
def test_an_invalid_job_is_identified_as_far_as_possible(
    data: bytes | None, id: str, retry_count: int
) -> None:
    identity = read_identity(data)
    assert (identity.id, identity.retry_count) == (id, retry_count)


class TestMisspeltNames:
    def test_a_job_in_a_stream_that_no_service_reads_is_found_with_the_reason(self, store: Any) -> None:
        store.streams["stream:tset"] = [Entry(b"1-0", job("lost"))]
        location = find(store, "lost")
        assert (location.state, location.stream) == ("queued", "stream:tset")
        assert location.why == "no service reads this stream: did you mean 'stream:test'?"
        (shard,) = shard_names("stream:test", 1)
        store.streams[shard] = [Entry(b"1-0", job("stray"))]
        assert "restart the services of stream:test with --drain-shards 1" in find(store, "stray").why

    def test_a_delayed_job_for_such_a_stream_too(self, store: Any) -> None:
        store.scheduled["stream:tset"] = [Scheduled(NOW_S - 60, job("lost"))]
        location = find(store, "lost")
        assert (location.state, "no running service promotes jobs" in location.why) == ("delayed", True)

    def test_a_stream_of_another_service_is_searched_by_its_group(self, store: Any) -> None:
        store.streams["mine"] = [Entry(b"1-0", job("elsewhere"))]
        announce(store, {"audit"}, Source("mine", "cg-mine"))
        assert (
            find(store, "elsewhere").why == "no service has read this stream yet: there is no group cg-mine"
        )

    def test_a_type_that_no_service_handles_is_the_reason(self, store: Any) -> None:
        store.streams[SOURCE.stream].append(Entry(b"6-0", job("typo", "audti")))
        store.scheduled[SOURCE.stream] = [Scheduled(NOW_S + 60, job("later", "audti"))]
        announce(store, {"audit", "shout"}, SOURCE)
        reason = "no service handles type audti: did you mean 'audit'?"
        assert reason in find(store, "typo").why
        assert reason in find(store, "later").why
        assert "handles" not in find(store, "j5").why

    def test_other_streams_are_searched_only_for_a_job_that_is_not_found(self, store: Any) -> None:
        store.streams["other"] = [Entry(b"1-0", job("j5"))]
        assert find(store, "j5").stream == SOURCE.stream
        finder = JobFinder(store, [SOURCE], [], 1000)
        assert finder.find("nowhere") == []
        assert finder.searched == [SOURCE.stream, "other"]
        assert finder.incomplete == []

    def test_an_acknowledged_entry_is_explained_by_what_was_searched(self, store: Any) -> None:
        location = find(store, "j1")
        assert location.state == "finished"
        assert "neither a retry nor a dead letter" in location.why
        by_entry = find(store, location.facts["entry_id"])
        assert "no dead letter; search for job j1" in by_entry.why
        store.letters[SOURCE.stream] = [letter(f"{number}-0") for number in range(1, 30)]
        assert "not all dead letters were searched" in find(store, "j1", scan_limit=20).why


def announce(store: Any, types: set[str], *sources: Source) -> None:
    store.announced = [Announcement("host/blue", frozenset(types), sources, NOW_S)]


@pytest.mark.parametrize(
    ("blocked_by", "says"),
    [
        (None, "waits for the turn of its tenant and priority; 7 jobs"),
        ("audit/tenant=t1", "limit audit/tenant is reached for t1; 7 jobs"),
        ("audit/global=", "limit audit/global is reached; 7 jobs"),
        ("=audit", "a handler asked jobs of its type to wait"),
        ("~=0123", "another job with its supersede_key runs; 7 jobs"),
    ],
)
def test_a_sorted_job_is_queued_and_says_what_it_waits_for(
    store: Any, blocked_by: str | None, says: str
) -> None:
    store.lanes[b"2-0"] = LanePlace(7, blocked_by)
    found = find(store, "j2")
    assert found.state == "queued"
    assert says in found.why
    assert found.facts["ahead_in_lane"] == 7
    store.lanes[b"2-0"] = LanePlace(7, None, is_outdated=True)
    assert "limits have changed" in find(store, "j2").why
    store.paused = [Pause("audit", NOW_S - 5.0, "")]
    assert "is paused" in find(store, "j2").why
