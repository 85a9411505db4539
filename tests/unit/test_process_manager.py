"""Process manager: starts, limits, exits, restarts and the drain, with fake children on the test's clock."""

import os
import signal
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from jobworker.worker.errors import Exit
from jobworker.worker.ipc.channel import STOPPING
from jobworker.worker.ipc.control import (
    Attach,
    Drain,
    ExitReclaimed,
    HeldElsewhere,
    Report,
    Retire,
    StartFailed,
    SyncDone,
    WorkerExited,
)
from jobworker.worker.supervision import process_manager
from support.fake_children import FakeChild, Service

Make = Callable[..., Service]


@pytest.fixture
def make() -> Iterator[Make]:
    """Makes services with fake children and closes them afterwards."""
    services: list[Service] = []

    def new(**options: Any) -> Service:
        services.append(Service(**options))
        return services[-1]

    yield new
    for service in services:
        service.close()


@pytest.fixture
def service(make: Make) -> Service:
    """A complete service with two workers; the messages of its start are read."""
    complete = make().complete()
    for child in complete.living():
        child.received()
    return complete


def run_job(service: Service, worker: FakeChild, limit_s: float) -> None:
    """Let the worker run a job with this timeout."""
    service.channel(worker).set_running(service.now, service.now + limit_s)


class TestStart:
    def test_workers_start_a_few_at_a_time_after_reader_and_reaper(
        self, make: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(process_manager, "cores", lambda: 1)
        service = make(procs=5)
        counts = []
        for _ in range(4):
            service.tick(1.1)
            counts.append((len(service.living()), len(service.living("worker"))))
        assert counts == [(2, 0), (4, 2), (6, 4), (7, 5)]

    def test_the_service_is_not_ready_until_every_child_is(self, make: Make) -> None:
        service = make(procs=1)
        service.tick()
        assert service.manager.reasons() == ["no reader", "no reaper", "worker 0 is starting"]
        service.complete()
        assert service.manager.reasons() == []

    def test_a_child_that_fails_at_the_first_start_ends_the_service_with_its_exit_code(
        self, make: Make
    ) -> None:
        service = make()
        service.tick()
        service.child("reader").peer.send(StartFailed("no module x", Exit.BOOT_FAILED))
        assert service.tick() == Exit.BOOT_FAILED

    def test_a_failed_restart_is_retried_unless_the_configuration_is_wrong(self, service: Service) -> None:
        worker = service.child("worker", 0)
        worker.peer.send(StartFailed("no module x", Exit.BOOT_FAILED))
        assert service.tick() is None
        assert service.manager.reasons() == ["worker 0: no module x"]
        worker.peer.send(StartFailed("no such option", Exit.USAGE))
        assert service.tick() == Exit.USAGE

    def test_three_exits_before_ready_end_the_service_at_its_first_start(
        self, make: Make, caplog: pytest.LogCaptureFixture
    ) -> None:
        service = make(procs=1)
        exits = 0
        for _ in range(9):
            if (code := service.tick(2.0)) is not None:
                break
            for worker in service.living("worker"):
                worker.exit("exit 1")
                exits += 1
        assert (code, exits) == (Exit.BOOT_FAILED, 3)
        (said,) = [record for record in caplog.records if record.levelname == "CRITICAL"]
        assert (said.message, vars(said)["child"]) == ("child.start_failed", "worker 0")

    def test_ends_of_the_forkserver_do_not_end_the_first_start(self, make: Make) -> None:
        """The kernel then kills the children, which says nothing about whether they can start."""
        service = make(procs=1)
        for _ in range(9):
            assert service.tick(2.0) is None
            for child in service.living():
                child.exit("SIGKILL", with_forkserver=True)
        service.tick(2.0)
        service.complete()
        assert service.manager.reasons() == []

    def test_a_reader_that_does_not_reach_the_store_in_time_ends_the_service(self, make: Make) -> None:
        service = make(connect_timeout_s=30.0)
        assert service.tick(29.0) is None
        assert service.tick(2.0) is None, "the reader has said nothing yet"
        service.child("reader").peer.send(Report(trouble="Connection refused"))
        assert service.tick() == Exit.STORE_UNREACHABLE

    def test_a_reader_that_never_says_anything_ends_the_service(self, make: Make) -> None:
        service = make(connect_timeout_s=30.0)
        assert service.tick(44.0) is None
        assert service.tick(2.0) == Exit.STORE_UNREACHABLE

    def test_workers_that_never_become_ready_again_are_a_crash_loop(self, service: Service) -> None:
        for exits in range(7):
            for worker in service.living("worker"):
                worker.exit("exit 1")
            code = service.tick(1.0)
            assert (code == Exit.CRASH_LOOP) == (exits == 6), exits
            service.tick(31.0)

    def test_a_system_that_is_short_of_descriptors_ends_no_running_service(self, service: Service) -> None:
        service.start_error = OSError(24, "Too many open files")
        service.child("worker", 0).exit("SIGKILL")
        service.manager.restart_workers()
        for _ in range(20):
            assert service.tick(31.0) is None
        assert [worker.slot_no for worker in service.living("worker")] == [1]
        service.start_error = None
        service.tick(31.0)
        assert service.child("worker", 0)

    def test_a_system_that_is_short_of_descriptors_ends_the_first_start(self, make: Make) -> None:
        service = make(procs=1)
        service.start_error = OSError(24, "Too many open files")
        codes = [service.tick(2.0) for _ in range(4)]
        assert Exit.BOOT_FAILED in codes

    def test_one_worker_that_stays_up_is_no_crash_loop(self, service: Service) -> None:
        for _ in range(10):
            service.child("worker", 1).exit("exit 1")
            assert service.tick(1.0) is None
            assert service.tick(31.0) is None


class TestInstanceName:
    def test_a_name_that_a_living_service_holds_is_an_error_of_usage(self, make: Make) -> None:
        service = make()
        service.tick()
        service.child("reader").peer.send(HeldElsewhere("pid 7 on host h", 3.0, True))
        assert service.tick() == Exit.USAGE

    def test_the_lease_of_a_dead_service_is_waited_for_beyond_the_connect_timeout(self, make: Make) -> None:
        service = make(connect_timeout_s=30.0)
        service.tick(20.0)
        service.child("reader").peer.send(HeldElsewhere("pid 7 on host h", 25.0, False))
        assert service.tick() is None
        service.child("reader").peer.send(Report(trouble="held by pid 7"))
        assert service.tick(54.0) is None
        assert service.tick(2.0) == Exit.STORE_UNREACHABLE

    def test_a_service_that_had_the_name_waits_for_it(self, service: Service) -> None:
        service.child("reader").peer.send(HeldElsewhere("pid 7 on host h", 3.0, True))
        assert service.tick() is None


class TestExits:
    def test_the_reader_is_told_of_a_killed_worker_and_of_the_next_one(self, service: Service) -> None:
        reader, worker = service.child("reader"), service.child("worker", 1)
        worker.exit("SIGSEGV")
        service.tick(2.0)
        exited, attached = reader.received()
        assert isinstance(exited, WorkerExited)
        assert (exited.slot, exited.generation, exited.cause) == (1, 1, "SIGSEGV")
        assert (exited.charge, exited.timed_out) == (True, False)
        assert attached == Attach(1, 2)
        assert service.restarts() == {("worker", "SIGSEGV"): 1}

    def test_a_worker_that_announces_its_exit_is_not_charged(self, service: Service) -> None:
        service.child("worker", 0).leave()
        service.tick()
        exited = service.child("reader").received()[0]
        assert isinstance(exited, WorkerExited)
        assert not exited.charge
        assert service.restarts() == {}

    def test_a_handler_that_ends_its_worker_with_exit_code_0_is_charged(self, service: Service) -> None:
        service.child("worker", 0).exit("exit 0")
        service.tick()
        exited = service.child("reader").received()[0]
        assert isinstance(exited, WorkerExited)
        assert exited.charge

    def test_a_new_reader_is_told_of_exits_that_the_last_one_did_not_reclaim(self, service: Service) -> None:
        service.child("worker", 0).exit("SIGKILL")
        service.child("worker", 1).exit("SIGKILL")
        service.tick()
        service.child("reader").peer.send(ExitReclaimed(1, 1))
        service.tick(2.0)
        service.child("reader").exit("SIGKILL")
        service.tick()
        messages = service.child("reader").received()
        assert messages[:2] == [Attach(0, 2), Attach(1, 2)], "living workers"
        attached, exited, done = messages[2:]
        assert attached == Attach(0, 1)
        assert isinstance(exited, WorkerExited)
        assert (exited.slot, exited.generation) == (0, 1)
        assert done == SyncDone()

    def test_jobs_are_not_charged_with_the_end_of_the_forkserver(self, service: Service) -> None:
        reader = service.child("reader")
        service.server.kill()
        service.child("worker", 0).exit("SIGKILL", with_forkserver=True)
        service.child("worker", 1).exit("SIGSEGV")
        service.tick()
        charged = {one.slot: one.charge for one in reader.received() if isinstance(one, WorkerExited)}
        assert charged == {0: False, 1: True}
        assert service.restarts()["forkserver", "SIGKILL"] == 1

    def test_a_forkserver_that_does_not_answer_is_killed(self, service: Service) -> None:
        service.child("worker", 0).unanswered = True
        service.tick(10.0)
        service.child("worker", 0).unanswered = False
        service.tick(10.0)
        assert service.server.exit_code is None
        service.child("worker", 0).unanswered = True
        service.tick(10.0)
        service.tick(20.0)
        assert service.server.exit_code == -signal.SIGKILL

    def test_a_drain_waits_less_for_the_forkserver_when_every_worker_has_exited(
        self, service: Service
    ) -> None:
        service.manager.drain()
        for slot_no in (0, 1):
            assert service.server.exit_code is None, "a worker may run a job"
            service.child("worker", slot_no).unanswered = True
            service.tick(4.0)
        service.tick(4.0)
        assert service.server.exit_code == -signal.SIGKILL

    def test_a_child_that_hung_up_does_not_wake_the_supervisor_again(
        self, service: Service, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The forkserver may take its time to report the exit."""
        worker = service.child("worker", 0)
        worker.peer.close()
        service.tick()
        polled = []
        poll = SimpleNamespace(register=lambda of, _: polled.append(of), poll=lambda _: [])
        monkeypatch.setattr(process_manager.select, "poll", lambda: poll)
        service.manager.wait(0.0, queue=None)  # type: ignore[arg-type]
        assert worker.control not in polled
        assert service.child("worker", 1).control in polled


class TestReaderDeaths:
    """A reader that dies leaves a mark at the entry that it was reading."""

    ENTRY = (0, b"1-1")

    def strikes(self, service: Service) -> int:
        """Strikes of the entry that are enough to refuse it, as the next reader sees them; else 0."""
        marks = service.child("reader").marks()
        strikes = marks.poison.get(self.ENTRY, 0)
        marks.close()
        return strikes

    def marked_reader(self, service: Service) -> FakeChild:
        """The reader, while it reads the entry."""
        service.tick(2.0)
        reader = service.child("reader")
        marks = reader.marks()
        marks.mark(*self.ENTRY)
        marks.close()
        return reader

    @pytest.mark.parametrize(
        ("cause", "strikes"), [("SIGSEGV", 3), ("exit 1", 3), ("SIGKILL", 0), ("SIGTERM", 0)]
    )
    def test_a_crash_makes_the_entry_poison_but_one_kill_from_outside_does_not(
        self, make: Make, cause: str, strikes: int
    ) -> None:
        service = make()
        self.marked_reader(service).exit(cause)
        service.tick()
        service.tick(1.0)
        assert self.strikes(service) == strikes

    @pytest.mark.parametrize(("computing", "strikes"), [(True, 3), (False, 0)])
    def test_an_endless_computation_makes_the_entry_poison_but_a_blocked_reader_does_not(
        self, make: Make, computing: bool, strikes: int
    ) -> None:
        service = make()
        reader = self.marked_reader(service)
        reader.become_ready()
        service.tick()
        reader.silent, reader.computing = True, computing
        for _ in range(4):
            service.tick(8.0)
        assert signal.SIGKILL in reader.signals
        assert self.strikes(service) == strikes

    def test_three_kills_at_the_same_entry_make_it_poison(self, make: Make) -> None:
        service = make(procs=1)
        for _ in range(3):
            self.marked_reader(service).exit("SIGKILL")
            service.tick(40.0)
        service.tick(40.0)
        assert self.strikes(service) == 3


class TestLimits:
    def test_a_job_over_its_timeout_has_its_stack_dumped_before_its_worker_is_killed(
        self, service: Service
    ) -> None:
        worker = service.child("worker", 0)
        run_job(service, worker, limit_s=5.0)
        service.tick(4.9)
        assert worker.signals == []
        service.tick(0.2)
        assert worker.signals == [signal.SIGUSR2]
        service.tick(0.2)
        assert worker.signals == [signal.SIGUSR2], "the stack dump takes a moment"
        service.tick(0.2)
        assert worker.signals == [signal.SIGUSR2, signal.SIGKILL]
        service.tick()
        exited = service.child("reader").received()[0]
        assert isinstance(exited, WorkerExited)
        assert (exited.cause, exited.charge, exited.timed_out) == ("SIGKILL (timeout of 5 s)", True, True)
        assert service.restarts() == {("worker", "timeout"): 1}

    def test_a_job_that_ends_during_the_stack_dump_keeps_its_worker(self, service: Service) -> None:
        worker = service.child("worker", 0)
        run_job(service, worker, limit_s=5.0)
        service.tick(5.1)
        service.channel(worker).set_running(0.0, 0.0)
        service.tick(1.0)
        run_job(service, worker, limit_s=5.0)
        service.tick(5.1)
        assert worker.signals == [signal.SIGUSR2] * 2, "the next job has a stack dump of its own"

    def test_a_job_over_the_memory_limit_is_killed_without_delay(self, make: Make) -> None:
        service = make(max_rss_mib=500).complete()
        worker = service.child("worker", 0)
        run_job(service, worker, limit_s=60.0)
        worker.used_mib = 501
        service.tick()
        service.tick(0.01)
        assert worker.signals == [signal.SIGUSR2, signal.SIGKILL]
        service.tick()
        causes = [one.cause for one in service.child("reader").received() if isinstance(one, WorkerExited)]
        assert causes == ["SIGKILL (rss above 500 MiB)"]

    def test_a_reader_that_stops_reporting_is_replaced(self, service: Service) -> None:
        reader = service.child("reader")
        reader.silent = True
        service.tick(14.0)
        assert reader.signals == []
        for _ in range(3):
            service.tick(1.1)
        assert reader.signals == [signal.SIGUSR2, signal.SIGKILL]
        assert service.child("reader") is not reader
        assert service.restarts() == {("reader", "stuck"): 1}

    def test_a_service_with_a_dispatched_job_is_not_idle(self, service: Service) -> None:
        """Else its loop would sleep until after the timeout of the job."""
        assert service.manager.idle
        jobs = service.channel(service.child("worker", 0)).jobs
        jobs.push(b"frame")
        assert not service.manager.idle
        jobs.release(next(tail for _, tail in jobs.frames()))
        assert service.manager.idle

    def test_an_idle_worker_without_a_heartbeat_is_replaced(self, service: Service) -> None:
        worker = service.child("worker", 0)
        worker.silent = True
        for _ in range(5):
            service.tick(8.0)
        assert worker.signals == [signal.SIGUSR2, signal.SIGKILL]
        assert service.restarts() == {("worker", "stuck"): 1}

    def test_a_child_that_does_not_become_ready_in_ten_minutes_is_killed(self, make: Make) -> None:
        service = make(procs=1, connect_timeout_s=3600.0)
        service.tick(2.0)
        service.tick(2.0)
        worker = service.child("worker", 0)
        service.tick(599.0)
        assert worker.signals == []
        service.tick(2.0)
        service.tick(1.0)
        assert worker.signals == [signal.SIGUSR2, signal.SIGKILL]

    def test_a_reader_without_its_store_does_not_stop_the_watchdog(self, service: Service) -> None:
        before = service.manager.progress
        service.child("reader").peer.send(Report(trouble="Redis does not answer"))
        service.manager.tick(service.now)
        assert service.manager.progress == before + 1
        service.child("reader").peer.send(Report())
        service.manager.tick(service.now)
        assert service.manager.progress == before + 1, "a reader that reads nothing makes no progress"

    def test_warnings_are_shown_once_and_do_not_make_the_service_unready(self, service: Service) -> None:
        for role in ("reader", "reaper"):
            service.child(role).peer.send(Report(warnings=["stream s is isolated"]))
        service.manager.tick(service.now)
        assert service.manager.warnings() == ["stream s is isolated"]
        assert service.manager.reasons() == []

    def test_no_message_of_a_worker_stops_the_supervisor(self, service: Service) -> None:
        """A handler may write to any descriptor, and report what the service has no metric for."""
        worker = service.child("worker")
        os.write(worker.peer.fileno(), b"no message")
        worker.peer.send(Report([("z_novel_jobs_completed_total", (), 5.0), ("\n", ("x",), 1.0)]))
        worker.peer.send(Report(gauges=[("z_novel_x", (), 5.0)], histograms=[("z_novel_x", (), [1], 5.0)]))
        worker.peer.send(Report([("z_novel_words_total", (), 5.0)]))
        for _ in range(5):
            service.tick()
        assert b"z_novel_words_total 5.0" in service.metrics.page()
        assert service.metrics.totals()["z_novel_jobs_completed_total"] == []


class TestRollingRestart:
    def test_workers_are_replaced_one_by_one_when_the_successor_is_ready(self, service: Service) -> None:
        reader, first, second = (service.child(*key) for key in (("reader", 0), ("worker", 0), ("worker", 1)))
        service.manager.restart_workers()
        service.tick()
        (successor,) = (one for one in service.living("worker") if one not in (first, second))
        assert (successor.slot_no, successor.generation) == (0, 2)
        service.tick(1.0)
        assert first.signals == [], "the successor is not ready"
        successor.become_ready()
        service.tick()
        assert service.channel(first).stop_requested
        assert reader.received() == [Attach(0, 2), Retire(0, 1)]
        assert len(service.living("worker")) == 3, "the next worker waits for its turn"
        first.leave()
        service.tick()
        service.tick()
        service.tick()
        (next_successor,) = (one for one in service.living("worker") if one not in (successor, second))
        assert next_successor.slot_no == 1
        next_successor.become_ready()
        service.tick()
        second.leave()
        for _ in range(3):
            service.tick()
        assert not service.manager.restarting
        assert service.living("worker") == [successor, next_successor]
        assert service.restarts() == {}

    def test_any_number_of_failed_restarts_ends_no_service_with_a_living_worker(self, make: Make) -> None:
        """Each restart brings other code, so failed starts before it neither count nor delay it."""
        service = make(procs=1).complete()
        before = service.living("worker")
        for _ in range(10):
            service.manager.restart_workers()
            service.tick()
            (successor,) = (one for one in service.living("worker") if one not in before)
            successor.exit("exit 3")
            assert service.tick() is None
        assert service.living("worker") == before

    def test_a_successor_that_does_not_start_ends_the_restart_and_no_worker_is_lost(
        self, service: Service
    ) -> None:
        before = service.living("worker")
        service.manager.restart_workers()
        service.tick()
        (successor,) = (one for one in service.living("worker") if one not in before)
        successor.exit("exit 3")
        service.tick()
        assert not service.manager.restarting
        service.tick(60.0)
        assert service.living("worker") == before
        assert service.manager.reasons() == []

    @pytest.mark.parametrize(
        "options",
        [{"max_jobs": 3}, {"max_age_s": 100.0}, {"max_rss_mib": 500}],
        ids=lambda one: next(iter(one)),
    )
    def test_a_worker_over_its_limit_is_recycled(
        self, make: Make, options: dict[str, float], caplog: pytest.LogCaptureFixture
    ) -> None:
        service = make(procs=1, **options).complete()
        caplog.set_level("INFO")
        caplog.clear()
        worker = service.child("worker", 0)
        service.tick()
        assert service.living("worker") == [worker]
        service.channel(worker).finished = 3
        worker.used_mib = 501
        service.tick(101.0)
        service.tick()
        assert len(service.living("worker")) == 2
        assert [record.msg for record in caplog.records] == ["worker.recycle_due"]

    def test_a_large_worker_is_recycled_only_while_it_is_idle(self, make: Make) -> None:
        service = make(procs=1, max_rss_mib=500).complete()
        worker = service.child("worker", 0)
        run_job(service, worker, limit_s=60.0)
        worker.used_mib = 501
        service.tick()
        assert not service.manager.restarting
        service.channel(worker).set_running(0.0, 0.0)
        service.tick()
        assert service.manager.restarting


class TestDrain:
    def test_every_child_is_asked_to_stop_and_none_is_started(self, service: Service) -> None:
        reader, reaper = service.child("reader"), service.child("reaper")
        workers = service.living("worker")
        service.manager.drain()
        assert reader.received() == reaper.received() == [Drain()]
        assert all(service.channel(worker).stop_requested for worker in workers)
        assert [worker.signals for worker in workers] == [[], []], "a handler may have replaced the action"
        for worker in workers:
            worker.leave()
        started = len(service.all)
        service.tick(60.0)
        assert len(service.all) == started

    def test_it_ends_when_the_reader_has_reclaimed_every_exit(self, service: Service) -> None:
        service.manager.drain()
        for worker in service.living("worker"):
            worker.leave()
        service.tick()
        assert not service.manager.drained
        for slot_no in (0, 1):
            service.child("reader").peer.send(ExitReclaimed(slot_no, 1))
        service.tick()
        assert not service.manager.drained, "reader and reaper still run"
        for role in ("reader", "reaper"):
            service.child(role).leave()
        service.tick()
        assert service.manager.drained

    def test_a_reader_that_dies_is_replaced_until_all_is_settled(self, service: Service) -> None:
        service.manager.drain()
        for worker in service.living("worker"):
            worker.leave()
        service.child("reader").exit("SIGKILL")
        service.tick()
        messages = service.child("reader").received()
        assert messages[-2:] == [SyncDone(), Drain()]
        assert sum(isinstance(message, WorkerExited) for message in messages) == 2

    @pytest.mark.parametrize(("by_drain", "charge"), [(True, False), (False, True)])
    def test_only_a_kill_from_outside_is_charged_to_the_job(
        self, service: Service, by_drain: bool, charge: bool
    ) -> None:
        service.manager.drain()
        if by_drain:
            service.manager.kill_workers()
        else:
            for worker in service.living("worker"):
                worker.exit("SIGKILL")
        service.tick()
        exits = [one for one in service.child("reader").received() if isinstance(one, WorkerExited)]
        assert [one.charge for one in exits] == [charge, charge]

    def test_a_worker_that_does_not_exit_after_its_stop_is_killed(self, service: Service) -> None:
        first, second = service.living("worker")
        service.manager.drain()
        for worker in (first, second):
            service.channel(worker).phase = STOPPING
            worker.silent = True
        second.exit("exit 0")
        for _ in range(3):
            service.tick(8.0)
        assert first.signals == [signal.SIGUSR2, signal.SIGKILL]

    def test_a_worker_whose_set_up_ignores_the_signal_is_killed_without_a_charge(self, make: Make) -> None:
        service = make(procs=1)
        service.tick(2.0)
        service.tick(2.0)
        (worker,) = service.living("worker")
        service.manager.drain()
        for _ in range(4):
            service.tick(3.0)
        assert worker.signals == [signal.SIGTERM, signal.SIGKILL]
        exits = [one for one in service.child("reader").received() if isinstance(one, WorkerExited)]
        assert [one.charge for one in exits] == [False]
        assert service.restarts() == {}

    def test_a_term_before_the_worker_handles_it_is_a_regular_stop(self, make: Make) -> None:
        service = make()
        for _ in range(5):
            service.tick(2.0)
        service.manager.drain()
        for worker in service.living("worker"):
            worker.exit("SIGTERM")
        service.tick()
        exits = [one for one in service.child("reader").received() if isinstance(one, WorkerExited)]
        assert [one.charge for one in exits] == [False, False]
