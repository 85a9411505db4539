"""Findings of `jobworker doctor`: each problem is found at its limit and comes with a remedy."""

from collections import Counter
from typing import Any

import pytest

from jobworker.worker.admin import doctor
from jobworker.worker.admin.doctor_facts import HostFacts, read_host_facts
from jobworker.worker.admin.find_job import OVERDUE_S, SILENT_S
from jobworker.worker.admin.finding import Finding
from jobworker.worker.admin.names import Names, UnreadStream, name_findings
from jobworker.worker.admin.status_client import Service
from jobworker.worker.shards import shard_names
from jobworker.worker.store.facts import ServerFacts, StreamFacts
from jobworker.worker.store.operator import Consumer, Pause
from jobworker.worker.store.ports import KeyFault
from support.fake_operator import SOURCE

GROUP = SOURCE.group
HEALTHY_INFO = {
    "valkey_version": "8.1.0", "server_mode": "standalone", "role": "master",
    "maxmemory_policy": "noeviction", "maxmemory": "0", "used_memory": "1000000", "evicted_keys": "0",
    "aof_enabled": "1", "aof_last_write_status": "ok", "aof_last_bgrewrite_status": "ok",
}  # fmt: skip
ALWAYS = {"appendfsync": "always"}
HEALTHY_STREAM = StreamFacts(
    SOURCE, True, 5, {GROUP: 5}, {GROUP: 0}, [Consumer("host/blue", 0, 1.0)], 0, 0.0, 0
)
HEALTHY_HOST = HostFacts(4, 4096, 2**30, [], {"jobworker": "1", "hiredis": "3"})


def problems(findings: Any) -> list[tuple[str, str]]:
    """Level and text of all findings that are not ok. Each wrong one must name a remedy."""
    found = list(findings)
    assert all(one.do for one in found if one.level == "wrong")
    return [(one.level, one.says) for one in found if one.level != "ok"]


def server(info: dict[str, str] | None = None, config: dict[str, str] | None = None, **facts: float) -> Any:
    given: dict[str, float] = {"skew_s": 0.0, "round_trip_s": 0.001} | facts
    info = HEALTHY_INFO | (info or {})
    return problems(doctor.server_findings("store", ServerFacts(info, config or ALWAYS, **given)))


def stream(**changes: Any) -> Any:
    return problems(doctor.stream_findings(HEALTHY_STREAM._replace(**changes)))


def test_a_healthy_deployment_has_no_problem() -> None:
    assert server() == []
    assert stream() == []
    assert problems(doctor.host_findings(HEALTHY_HOST)) == []


@pytest.mark.parametrize(
    ("info", "level", "says"),
    [
        ({"role": "slave"}, "wrong", "is a replica"),
        ({"maxmemory_policy": "allkeys-lru", "maxmemory": "100000000"}, "wrong", "allkeys-lru"),
        ({"maxmemory_policy": "allkeys-lru"}, "note", "allkeys-lru"),
        ({"evicted_keys": "7"}, "wrong", "7 keys were evicted"),
        ({"maxmemory": "1200000"}, "wrong", "MiB are in use"),
        ({"aof_enabled": "0"}, "wrong", "no append-only file"),
        ({"aof_last_write_status": "err"}, "wrong", "aof_last_write_status is err"),
    ],
)
def test_a_problem_of_a_server_is_found(info: dict[str, str], level: str, says: str) -> None:
    ((found_level, found_says),) = server(info)
    assert (found_level, says in found_says) == (level, True)


@pytest.mark.parametrize(
    ("appendfsync", "level"), [("everysec", "note"), ("no", "wrong"), ("unknown to this version", "note")]
)
def test_a_weaker_appendfsync_is_reported(appendfsync: str, level: str) -> None:
    assert [one[0] for one in server(config={"appendfsync": appendfsync})] == [level]


def test_a_slow_store_and_a_wrong_clock_are_found() -> None:
    assert server(round_trip_s=0.2) == [("wrong", "slow to answer")]
    assert server(skew_s=-3.0) == [("wrong", "its clock is 3.0 s behind ours")]


def test_a_user_without_info_gets_a_note_and_no_false_alarm() -> None:
    found = problems(doctor.server_findings("store", ServerFacts({}, {}, 0.0, 0.001)))
    assert [level for level, _ in found] == ["note"]


@pytest.mark.parametrize(
    ("changes", "level", "says"),
    [
        ({"lags": {}}, "wrong", f"there is no group {GROUP}"),
        ({"lags": {}, "length": 0}, "note", f"there is no group {GROUP}"),
        ({"consumers": []}, "wrong", "no service reads it; 5 jobs wait"),
        ({"consumers": [], "lags": {GROUP: 0}}, "note", "no service reads it"),
        ({"consumers": [Consumer("a", 0, SILENT_S + 1)]}, "wrong", f"for {SILENT_S + 1:.0f} s"),
        ({"lags": {GROUP: 8}}, "wrong", "3 jobs or more were trimmed"),
        ({"missing": 2}, "wrong", "2 pending jobs are gone"),
        ({"overdue_s": OVERDUE_S + 1}, "wrong", "overdue"),
        ({"dead": 4}, "note", "4 dead letters"),
        ({"lags": {GROUP: 5, "other": 3}, "pendings": {GROUP: 0, "other": 1}}, "note", "4 entries behind"),
        ({"lags": {GROUP: 5, "other": 0}, "pendings": {GROUP: 0, "other": 0}}, "note", "second group, other"),
        ({"lags": {GROUP: 5, "other": 10_001}, "pendings": {GROUP: 0, "other": 0}}, "wrong", "10001 entries"),
    ],
)
def test_a_problem_of_a_stream_is_found(changes: dict[str, Any], level: str, says: str) -> None:
    ((found_level, found_says),) = stream(**changes)
    assert (found_level, says in found_says) == (level, True)


def test_keys_that_the_store_refuses_are_named_with_their_repair() -> None:
    retry = KeyFault("retry:s", "is a string, not a zset", "RENAME retry:s retry:s:damaged")
    full = KeyFault(SOURCE.stream, "takes no more entries", "RENAME a b", blocks=False)
    found = list(doctor.stream_findings(HEALTHY_STREAM._replace(faults=[retry, full])))
    assert [one.do for one in found if one.level == "wrong"] == [retry.repair, full.repair]
    assert "key retry:s is a string, not a zset" in found[0].says
    wrong_type = KeyFault(SOURCE.stream, "is a string, not a stream", "RENAME c d")
    (only,) = doctor.stream_findings(HEALTHY_STREAM._replace(faults=[wrong_type], lags={}))
    assert only.do == "RENAME c d"
    (paused,) = doctor.fault_findings("paused", [KeyFault("jobworker:paused", "is a list", "RENAME e f")])
    assert paused == Finding("wrong", "paused", "key jobworker:paused is a list", "RENAME e f")


def test_dead_consumers_are_found() -> None:
    reading = Consumer("host/blue", 0, 1.0)
    assert stream(consumers=[reading, Consumer("host/red", 3, 61.0)]) == [
        ("wrong", "host/red has leased 3 jobs and is idle for 61 s")
    ]
    many = [Consumer(f"host/{n}", 0, 61.0) for n in range(51)]
    assert stream(consumers=[reading, *many]) == [("wrong", "51 consumer names of services that are gone")]
    assert stream(consumers=[reading, *many[1:]]) == []


def test_a_retry_that_is_a_little_late_is_not_overdue() -> None:
    assert stream(overdue_s=OVERDUE_S - 1) == []


def test_a_pause_comes_with_the_command_that_ends_it() -> None:
    (found,) = doctor.pause_findings([Pause("audit", 1.0, "disk full")])
    assert found == Finding("note", "paused", "type audit (disk full)", "jobworker resume audit")


class TestServices:
    def test_a_missing_answer_is_wrong_only_if_the_url_was_given(self) -> None:
        silent = [Service("http://a", {}, "refused")]
        assert problems(doctor.service_findings(silent, False, "1")) == [("wrong", "no status: refused")]
        assert problems(doctor.service_findings(silent, True, "1")) == [("note", "no status: refused")]

    def test_problems_that_a_service_reports_are_passed_on(self) -> None:
        gauge = {
            name: [{"task_type": "audit", "value": 1}]
            for name in ("z_novel_circuit_open", "z_novel_crash_circuits_open")
        }
        status = {"ready": False, "reasons": ["no reader"], "version": "1", "metrics": gauge}
        assert problems(doctor.service_findings([Service("http://a", status)], False, "1")) == [
            ("wrong", "no reader"),
            ("wrong", "the circuit breaker of type audit is open: its dependency does not answer"),
            ("wrong", "jobs of type audit kill worker after worker, so their tenants are slowed down"),
        ]

    def test_the_restart_of_one_worker_is_a_note(self) -> None:
        starting = {"reasons": ["worker 1 is starting"], "transient_reasons": ["worker 1 is starting"]}
        status = {"ready": False, "version": "1", **starting}
        assert problems(doctor.service_findings([Service("http://a", status)], False, "1")) == [
            ("note", "worker 1 is starting")
        ]

    def test_another_version_is_a_note(self) -> None:
        status = {"ready": True, "version": "2"}
        ((level, _),) = problems(doctor.service_findings([Service("http://a", status)], False, "1"))
        assert level == "note"


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        (HEALTHY_HOST._replace(open_files=1023), "only 1023 open files"),
        (HEALTHY_HOST._replace(versions={"jobworker": "1", "hiredis": ""}), "hiredis is missing"),
    ],
)
def test_a_problem_of_this_host_is_found(facts: HostFacts, says: str) -> None:
    ((level, found_says),) = problems(doctor.host_findings(facts))
    assert (level, says in found_says) == ("wrong", True)


def test_facts_of_this_host_are_read() -> None:
    facts = read_host_facts()
    assert facts.cores >= 1
    assert facts.open_files >= 1
    assert 0 < facts.memory_free < 2**50
    assert facts.versions["jobworker"]
    assert facts.versions["Python"].startswith("3.")


class TestNames:
    """Streams that no service reads and types that no service handles."""

    NONE = Names(frozenset({"audit", "shout"}), frozenset({"stream:a"}), True, [], Counter(), Counter(), True)

    def test_names_in_use_are_no_problem(self) -> None:
        names = self.NONE._replace(waiting=Counter({("stream:a", "audit"): 5}))
        assert problems(name_findings(names)) == []

    def test_a_stream_without_reader_is_wrong(self) -> None:
        (found,) = name_findings(self.NONE._replace(unread=[UnreadStream("stream:b", 3, 2)]))
        assert (found.level, found.subject) == ("wrong", "stream:b")
        assert found.says == "no running service reads this stream; 3 jobs wait and 2 are scheduled"
        assert found.do.startswith("did you mean 'stream:a'? restart a service of these jobs with --stream ")

    def test_a_shard_without_reader_is_drained(self) -> None:
        unread = [UnreadStream(shard_names("stream:a", 2)[1], 3, 0)]
        (found,) = name_findings(self.NONE._replace(unread=unread))
        assert found.do == "restart the services of stream:a with --drain-shards 2"

    def test_a_type_without_handler_is_wrong(self) -> None:
        (found,) = name_findings(self.NONE._replace(waiting=Counter({("stream:a", "audti"): 2})))
        assert found.level == "wrong"
        assert found.says == "2 waiting jobs have the type 'audti', which no running service handles"
        assert "did you mean 'audit'?" in found.do

    def test_types_are_not_judged_while_those_of_services_are_unknown(self) -> None:
        names = self.NONE._replace(types=frozenset(), waiting=Counter({("stream:a", "x"): 2}))
        assert problems(name_findings(names)) == []

    def test_dead_letters_of_an_unknown_type_are_named_until_a_service_handles_it(self) -> None:
        names = self.NONE._replace(refused=Counter({("stream:a", "audti"): 2, ("stream:a", "shout"): 1}))
        assert problems(name_findings(names)) == [
            ("note", "2 jobs of the type 'audti' were dead-lettered: no running service handles it")
        ]

    def test_many_names_give_a_bounded_report(self) -> None:
        unread = [UnreadStream(f"s{n}", 1, 0) for n in range(500)]
        waiting = Counter({("stream:a", f"t{n}"): 1 for n in range(500)})
        assert len(list(name_findings(self.NONE._replace(unread=unread, waiting=waiting)))) < 25

    def test_a_paused_type_that_no_service_handles_is_named(self) -> None:
        pause = Pause("audti", 1.0, "")
        assert "no service handles" in next(doctor.pause_findings([pause], {"audit"})).says
        assert "no service handles" not in next(doctor.pause_findings([pause], {"audti"})).says
