"""Deletions: nothing of a scope is left, whatever dies and whatever is retried late; newer work stays."""

import contextlib
import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest

from jobworker.handlers.erasure.erase import Busy
from jobworker.handlers.erasure.payload import DeletePayload
from jobworker.handlers.vectors.ports import TransientStoreError
from jobworker.handlers.vectors.versioned_writer import Contended
from jobworker.worker import PermanentError
from support.erasure_world import CUTOFF_US, NEW_US, OLD_US, ErasureWorld, made
from support.rebuild_world import Killed, kill_at

#: What a job meets that waits too long; the service retries it.
RETRIED = (Contended, TransientStoreError)


def filled() -> ErasureWorld:
    """Two projects of one tenant, with chapters, a summary, an entity, and a collection of users."""
    world = ErasureWorld()
    world.embed("a", "b")
    world.embed("v1", "v2", job="versioned", chapter="d", version=3)
    world.store.ensure_collection("notes", 8)
    world.embed("n", collection="notes")
    world.summarise()
    world.embed("other", project="q", job="q")
    world.summarise("cq", project="q", job="qs")
    return world


def late_work(world: ErasureWorld, **options: Any) -> None:
    """Each older job runs once more."""
    world.embed("a", "b", **options)
    world.embed("v1", "v2", job="versioned", chapter="d", version=3, **options)
    world.embed("n", collection="notes", **options)
    world.summarise(**options)


def assert_gone(world: ErasureWorld, others: list[str]) -> None:
    assert world.ids() == []
    assert world.kept() == others
    late_work(world)
    assert world.ids() == []
    assert world.kept() == others


def others_of(world: ErasureWorld) -> list[str]:
    return [key for key in world.kept() if ":q:" in key]


def test_nothing_of_a_project_is_left_and_other_projects_stay() -> None:
    world = filled()
    others, rows_of_q = others_of(world), world.ids("q")
    assert len(world.ids()) == 7
    world.erase()
    assert_gone(world, others)
    assert world.ids("q") == rows_of_q


def test_a_whole_tenant_is_erased_by_a_job_without_a_project() -> None:
    world = filled()
    world.erase(project="")
    late_work(world)
    world.embed("other", project="q", job="q")
    assert world.ids("") == []
    assert world.kept() == []


def test_chapters_are_erased_with_their_summaries_and_entities() -> None:
    world = filled()
    world.summarise("d", job="summary of d")
    world.erase(chapter_ids=["c"])
    late_work(world)
    assert [id_ for id_ in world.ids() if not id_.startswith("entity:")] == ["n", "summary:d", "v1", "v2"][1:]
    assert len(world.ids()) == 4
    assert "summary:t:p:c" not in world.kept()
    assert "entities:t:p:c" not in world.kept()
    assert "summary:t:p:d" in world.kept()


def test_single_rows_are_erased_with_the_record_that_would_restore_them() -> None:
    world = filled()
    (entity,) = (id_ for id_ in world.ids() if id_.startswith("entity:"))
    world.erase(ids=["a", "summary:c", entity, "absent", "other"])
    late_work(world)
    assert world.ids() == ["b", "n", "v1", "v2"]
    assert "other" in world.ids("q")
    assert not [key for key in world.kept() if key.startswith(("summary:t:p", "entity:t:p"))]


def test_collections_that_are_not_named_keep_their_rows() -> None:
    world = filled()
    world.erase(all=True, collections=["z_novel_notes", "later"])
    late_work(world)
    assert "n" not in world.ids()
    assert "a" in world.ids()
    assert "summary:t:p:c" in world.kept()


def test_collections_wait_together_for_reads_that_may_miss_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    world = filled()
    monkeypatch.setattr(world.store, "max_read_lag_s", lambda: 5.0)
    began_s = world.now_s
    world.erase()
    assert len(world.store._rows) > 2
    assert 5.0 <= world.now_s - began_s < 6.0


def test_a_collection_that_is_made_later_has_the_tombstones_too() -> None:
    world = filled()
    world.erase()
    world.store.ensure_collection("later", 8)
    world.embed("x", collection="later")
    world.embed("y", collection="later", created_us=NEW_US)
    assert world.ids() == ["y"]


def test_newer_work_stays_whether_it_runs_before_or_after_the_deletion() -> None:
    for first in (True, False):
        world = filled()
        if first:
            late_work(world, created_us=NEW_US)
        world.erase()
        late_work(world, created_us=NEW_US)
        late_work(world)
        assert len(world.ids()) == 7
        world.erase(created_us=NEW_US + 1, job="second")
        assert world.ids() == []


def test_an_older_version_is_stored_after_the_deletion_of_a_newer_one() -> None:
    world = filled()
    world.erase()
    world.embed("v1", job="restart", chapter="d", version=1, created_us=NEW_US)
    assert world.ids() == ["v1"]


def test_a_deletion_that_runs_late_takes_only_what_was_older() -> None:
    world = filled()
    world.embed("a", created_us=NEW_US)
    world.erase()
    assert world.ids() == ["a"]


def steps_of(run: Callable[..., None]) -> int:
    count = itertools.count()
    run(around=lambda name, before: next(count))
    return next(count)


def test_a_kill_at_any_step_of_the_deletion_leaves_nothing_after_the_next_try() -> None:
    for payload in ({"all": True}, {"chapter_ids": ["c", "d", "n"]}):
        total = steps_of(lambda around: filled().erase(around=around, **payload))  # noqa: B023
        assert total > 60
        for step in range(total):
            world = filled()
            with pytest.raises(Killed):
                world.erase(around=kill_at(step), **payload)
            with contextlib.suppress(*RETRIED):
                late_work(world)
            world.erase(**payload)
            late_work(world)
            assert world.ids() == [], step
            assert world.kept() == others_of(world), step


def test_a_kill_at_any_step_of_an_older_write_leaves_nothing() -> None:
    """The deletion waits for the lease of the dead write, or until the job is retried."""
    total = steps_of(lambda around: late_work(filled(), around=around))
    assert total > 60
    for step, retried in itertools.product(range(total), (False, True)):
        world = filled()
        others = others_of(world)
        with pytest.raises(Killed):
            late_work(world, around=kill_at(step))
        if retried:
            late_work(world)
        world.erase()
        assert_gone(world, others)


def test_an_older_write_that_hangs_longer_than_its_lease_leaves_nothing() -> None:
    """It is suspended at a step; the deletion runs from start to end meanwhile."""
    for write in (
        lambda world, around: world.embed("a", "x", around=around),
        lambda world, around: world.embed("v1", "x", job="versioned", chapter="d", version=4, around=around),
    ):
        for step in range(steps_of(lambda around: write(filled(), around))):  # noqa: B023
            world, count = filled(), itertools.count()

            def around(
                name: str, before: bool, world: Any = world, count: Any = count, at: int = step
            ) -> None:
                if next(count) == at:
                    world.erase()

            with contextlib.suppress(*RETRIED):
                write(world, around)
            assert world.ids() == [], step


def test_newer_work_in_the_middle_of_a_deletion_is_stored_in_the_end() -> None:
    for version in (None, 9):
        for step in range(steps_of(lambda around: filled().erase(around=around))):
            world, count = filled(), itertools.count()

            def newer(world: Any = world, version: Any = version) -> None:
                world.embed("a", "v1", job="newer", chapter="d", version=version, created_us=NEW_US)

            def around(
                name: str, before: bool, count: Any = count, at: int = step, newer: Any = newer
            ) -> None:
                if next(count) == at:
                    with contextlib.suppress(*RETRIED):
                        newer()

            world.erase(around=around)
            newer()
            assert world.ids() == ["a", "v1"], step


def test_kills_at_random_with_late_retries_at_every_step_leave_nothing() -> None:
    """The kill matrix: deletions and older jobs die at any step and run again, 200 retries in flight."""
    for seed in range(60):
        shuffle, world = random.Random(seed), filled()
        others, left = others_of(world), [200]

        def retry(
            name: str, before: bool, world: Any = world, shuffle: Any = shuffle, left: Any = left
        ) -> None:
            if left[0] > 0 and shuffle.random() < 0.5:
                left[0] -= 1
                job = shuffle.choice([world.summarise, lambda **o: world.embed("a", "b", **o)])
                around = kill_at(shuffle.randrange(12)) if shuffle.random() < 0.5 else None
                with contextlib.suppress(Killed, *RETRIED):
                    job(around=around)

        for _ in range(shuffle.randrange(6)):
            die = kill_at(shuffle.randrange(80))

            def around(name: str, before: bool, die: Any = die, retry: Any = retry) -> None:
                die(name, before)
                retry(name, before)

            with contextlib.suppress(Killed, Busy):
                world.erase(around=around)
        world.erase(around=retry)
        assert world.ids() == [], seed
        world.now_s += 100  # the fields of dead writes end with their leases
        world.erase()
        assert_gone(world, others)


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        ([], "payload must be an object"),
        ({}, "one of ids, chapter_ids and all, not none of them"),
        ({"all": True, "ids": ["a"]}, "not ids and all"),
        ({"all": "yes"}, "all must be true"),
        ({"ids": []}, "ids must be a list of ids"),
        ({"ids": "a"}, "ids must be a list of ids"),
        ({"ids": ["a", 'x" or id != "']}, r"ids\[1\] must be a string that matches"),
        ({"chapter_ids": [7]}, r"chapter_ids\[0\]"),
        ({"ids": ["a"] * 10_001}, "a job may have 10000"),
        ({"all": True, "collections": []}, "collections must be a list"),
        ({"all": True, "collections": ["x_v2"]}, "reserved"),
        ({"all": True, "tenant_id": "other"}, "tenant_id of the payload"),
    ],
)
def test_a_payload_that_breaks_a_rule_deletes_nothing(payload: Any, words: str) -> None:
    with pytest.raises(PermanentError, match=words):
        DeletePayload.parse(made("vectors_delete", "j", payload, CUTOFF_US, "p"), "z_novel_")


def test_only_all_may_leave_the_project_out() -> None:
    with pytest.raises(PermanentError, match="project_id of the job"):
        DeletePayload.parse(made("vectors_delete", "j", {"ids": ["a"]}, CUTOFF_US, ""), "z_novel_")


def test_the_creation_of_a_job_decides_and_its_entry_bounds_it() -> None:
    job = made("vectors_delete", "j", {"all": True}, CUTOFF_US, "p")

    def cutoff(created_at: str) -> int:
        from msgspec.structs import replace

        return DeletePayload.parse(replace(job, created_at=created_at), "z_novel_").cutoff_us

    assert cutoff("2001-09-09T01:46:40.000001Z") == OLD_US + 1
    assert cutoff("2001-09-09T03:46:40.000001234+02:00") == OLD_US + 1
    assert cutoff("2099-01-01T00:00:00Z") == CUTOFF_US
    assert cutoff("") == cutoff("0001-01-01T00:00:00Z") == cutoff("2001-09-09") == CUTOFF_US
