"""Jobs that kill worker after worker are slowed down, and the jobs of others are not."""

from collections.abc import Iterator
from contextlib import closing

import pytest

from jobworker.worker.outcome import Failure
from support.reader_rig import SOURCE, FakeWorker, ReaderRig, reader_rig


@pytest.fixture
def rig() -> Iterator[ReaderRig]:
    """Four workers, each with credit for two jobs."""
    with reader_rig(4, batch_hint=1) as made:
        yield made


def run_ids(rig: ReaderRig) -> dict[str, FakeWorker]:
    """The jobs that workers get now, each with its worker; all are started."""
    rig.tick()
    taken = {job_id: worker for worker in living(rig) for job_id in worker.take()}
    for job_id, worker in taken.items():
        worker.start(job_id)
    return taken


def living(rig: ReaderRig) -> list[FakeWorker]:
    newest = {worker.slot: worker for worker in rig.workers}
    return list(newest.values())


def kill(rig: ReaderRig, worker: FakeWorker, *, restart: bool = True, **more: bool) -> None:
    """The worker dies under what it has started, and its successor is ready at once."""
    rig.exit(worker, "SIGSEGV", **more)
    rig.tick()
    if restart:
        rig.restart(worker)


def open_breaker(rig: ReaderRig, tenant: str = "bad", **more: bool) -> None:
    """Three jobs of a tenant kill a worker each and are given up."""
    for number in range(3):
        rig.add(f"{tenant}{number}", tenant_id=tenant, deaths=2)
        (worker,) = run_ids(rig).values()
        kill(rig, worker, **more)


# -- one job


def test_a_job_runs_again_at_once_after_one_death_and_later_after_two(rig: ReaderRig) -> None:
    rig.add("1")
    kill(rig, run_ids(rig)["1"])
    kill(rig, run_ids(rig)["1"])
    assert run_ids(rig) == {}, "its worker may have been killed by chance once, not twice"
    rig.advance(0.9)
    assert run_ids(rig) == {}
    rig.advance(0.2)
    assert list(run_ids(rig)) == ["1"]


# -- the share of the workers


def test_suspects_run_on_a_share_of_the_workers(rig: ReaderRig) -> None:
    rig.add(*"12345678", tenant_id="t")
    rig.tick()
    for worker in living(rig):
        worker.start(*worker.take())
        kill(rig, worker)
    taken = run_ids(rig)
    assert len(taken) == 1
    rig.add("9")
    assert list(run_ids(rig)) == ["9"], "the other workers are free"


def test_a_worker_that_died_under_a_suspect_counts_until_its_successor_is_ready(rig: ReaderRig) -> None:
    rig.add("1", tenant_id="t")
    rig.add("2", tenant_id="u")
    for worker in set(run_ids(rig).values()):
        kill(rig, worker)
    ((first, worker),) = run_ids(rig).items()
    kill(rig, worker, restart=False)
    assert run_ids(rig) == {}
    rig.restart(worker)
    ((second, _),) = run_ids(rig).items()
    assert {first, second} == {"1", "2"}


def test_the_only_worker_runs_other_jobs_between_two_suspects() -> None:
    with reader_rig(1, batch_hint=1) as rig:
        rig.add(*"xyz", deaths=1)
        rig.add(*[f"good{number}" for number in range(60)], tenant_id="good")
        runs = ""
        for _ in range(30):
            rig.advance(0.1)
            taken = run_ids(rig)
            runs += "".join("g" if job_id.startswith("good") else "x" for job_id in taken)
            for job_id, worker in taken.items():
                if job_id.startswith("good"):
                    worker.succeed(job_id)
            if any(not job_id.startswith("good") for job_id in taken):
                rig.exit(rig.workers[-1], "SIGSEGV")
                rig.advance(1.0)  # its successor loads a model
                rig.restart(rig.workers[-1])
        assert "xx" not in runs
        assert runs.count("x") >= 3


# -- the breaker of a tenant


def test_a_tenant_whose_jobs_kill_worker_after_worker_is_slowed_and_others_are_not(
    rig: ReaderRig, caplog: pytest.LogCaptureFixture
) -> None:
    open_breaker(rig)
    assert rig.metric("z_novel_crash_circuits_open", "a") == 1
    (line,) = [vars(record) for record in caplog.records if record.msg == "crashes.slowed"]
    assert (line["task_type"], line["tenant_id"], line["deaths"]) == ("a", "bad", 3)
    rig.add(*[f"more{number}" for number in range(60)], tenant_id="bad")
    rig.add("1", tenant_id="good")
    rig.add("2", type_name="b", tenant_id="bad")
    rig.tick(40)
    assert sorted(run_ids(rig)) == ["1", "2"], "jobs behind sixty slow ones are read and run"
    rig.advance(1.1)
    ((probe, worker),) = run_ids(rig).items()
    assert probe == "more0"
    kill(rig, worker)
    rig.advance(1.1)
    assert run_ids(rig) == {}, "the pause grows with each death"
    rig.advance(1.0)
    assert len(run_ids(rig)) == 1


def test_timeouts_count_as_deaths(rig: ReaderRig) -> None:
    open_breaker(rig, timed_out=True)
    assert rig.metric("z_novel_crash_circuits_open", "a") == 1


@pytest.mark.parametrize("fails", [False, True])
def test_jobs_that_end_without_a_death_end_the_slowdown(rig: ReaderRig, fails: bool) -> None:
    open_breaker(rig)
    rig.add("1", "2", "3", tenant_id="bad")
    assert run_ids(rig) == {}
    rig.advance(1.1)
    ((probe, worker),) = run_ids(rig).items()
    if fails:
        worker.fail(probe, Failure("ValueError: no", permanent=True))
    else:
        worker.succeed(probe)
    assert sorted(run_ids(rig)) == ["2", "3"], "both at once, on any worker"
    assert rig.metric("z_novel_crash_circuits_open", "a") == 0


def test_a_minute_without_deaths_ends_the_slowdown(rig: ReaderRig) -> None:
    open_breaker(rig)
    rig.advance(61.0)
    rig.add("1", "2", tenant_id="bad")
    assert sorted(run_ids(rig)) == ["1", "2"]


def test_a_success_of_another_tenant_does_not_end_it(rig: ReaderRig) -> None:
    open_breaker(rig)
    rig.add("1", tenant_id="good")
    for job_id, worker in run_ids(rig).items():
        worker.succeed(job_id)
    rig.add("2", tenant_id="bad")
    assert run_ids(rig) == {}


def test_jobs_that_a_dead_worker_had_not_started_are_slowed_too() -> None:
    with reader_rig(1, batch_hint=8) as rig:
        rig.add(*"abcdefgh", tenant_id="bad", deaths=2)
        deaths = 0
        for _ in range(20):
            rig.tick()
            worker = rig.workers[-1]
            if ids := worker.take():
                worker.start(ids[0])
                kill(rig, worker)
                deaths += 1
        assert deaths == 3, "no more of them start before the pause is over"
        assert rig.pending == 5


def test_a_whole_type_is_slowed_if_it_kills_workers_for_tenant_after_tenant(rig: ReaderRig) -> None:
    for number in range(8):
        rig.add(str(number), tenant_id=f"t{number}", deaths=2)
        (worker,) = run_ids(rig).values()
        kill(rig, worker)
    rig.add("next", tenant_id="another")
    assert run_ids(rig) == {}
    rig.add("other type", type_name="b", tenant_id="another")
    assert list(run_ids(rig)) == ["other type"]


def test_a_job_that_is_slowed_and_paused_runs_after_both(
    rig: ReaderRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_breaker(rig)
    rig.add("1", tenant_id="bad")
    rig.tick()
    monkeypatch.setattr(rig.store, "paused_types", lambda: {"a"})
    rig.advance(1.1)
    assert run_ids(rig) == {}
    monkeypatch.undo()
    rig.advance(1.1)
    assert list(run_ids(rig)) == ["1"]


def test_sixty_poison_jobs_do_not_hold_up_fifty_good_ones() -> None:
    """Steps are counted: in each, every worker ends what it runs, and a dead one is restarted."""
    with closing(ReaderRig()) as rig:
        for _ in range(2):
            rig.attach(1)
        rig.sync()
        rig.add(*[f"bad{number}" for number in range(60)], tenant_id="bad")
        rig.add(*[f"good{number}" for number in range(50)], tenant_id="good")
        good = deaths = steps = 0
        while good < 50 and steps < 200:
            steps += 1
            rig.advance(0.05)
            for worker in living(rig):
                ids = worker.take()
                if ids and ids[0].startswith("bad"):
                    worker.start(ids[0])
                    kill(rig, worker)
                    deaths += 1
                else:
                    worker.start(*ids)
                    worker.succeed(*ids)
                    good += len(ids)
        assert good == 50
        assert deaths <= 10
        assert steps <= 60
        assert rig.store.depths(SOURCE).pending >= 50, "the poison jobs still wait"
