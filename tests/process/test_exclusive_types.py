"""Exclusive jobs delay no other job, however many wait and whatever process dies."""

from pathlib import Path

import pytest

from support.service import Service, eventually, handlers, service

pytestmark = pytest.mark.process


def ended(one: Service, ids: list[str]) -> bool:
    return set(ids) <= {event.id for event in one.events("end")}


def test_nothing_waits_behind_a_job_that_runs_alone(tmp_path: Path) -> None:
    with service(tmp_path, handlers("Noop", "Hermit", "Batch"), procs=2) as one:
        before = one.enqueue_many([{"type": "noop"}] * 40)
        long = one.enqueue("hermit", {"gate": "long"})
        after = one.enqueue_many([{"type": kind} for kind in ("noop", "batch")] * 150)
        one.wait_for_start(long)
        eventually(lambda: ended(one, before + after))
        one.wait_for_successor("reader", one.kill_role("reader"))
        later = one.enqueue_many([{"type": "noop"}] * 100)
        eventually(lambda: ended(one, later))
        assert not ended(one, [long])
        one.open_gate("long")
        one.wait_until_drained()
        assert len([event for event in one.events("start") if event.id == long]) == 1


def test_long_jobs_leave_a_worker_to_the_others_and_hold_up_no_suspect(tmp_path: Path) -> None:
    with service(tmp_path, handlers("Noop", "Hermit", "Die"), procs=2) as one:
        first = one.enqueue("hermit", {"gate": "first"})
        one.wait_for_start(first)
        second = one.enqueue("hermit", {"gate": "second"})
        poison = one.enqueue("die", {"how": "SIGKILL"})
        eventually(lambda: [letter["task"]["id"] for letter in one.dead_letters()] == [poison])
        quick = one.enqueue_many([{"type": "noop"}] * 50)
        eventually(lambda: ended(one, quick))
        assert second not in {event.id for event in one.events("start")}
        one.open_gate("first")
        one.wait_for_start(second)
        one.open_gate("second")
        one.wait_until_drained()


def test_slow_jobs_are_not_piled_up_in_one_worker_because_another_type_takes_many(tmp_path: Path) -> None:
    with service(tmp_path, handlers("Gate", "Batch"), procs=2) as one:
        slow = [one.enqueue("gate", {"gate": f"g{number}"}) for number in range(20)]
        one.wait_for_start(slow[0])
        (group,) = one.client.xinfo_groups("stream:story:gen")
        assert group["pending"] <= 8, "another host's idle workers could run the others"
        for number in range(20):
            one.open_gate(f"g{number}")
        one.wait_until_drained()
