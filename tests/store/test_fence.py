"""Rows equal the newest version, in any order of arrival, with repeats and under kills."""

import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobworker.handlers.jobstore.fence import LEASE_MS, Fence, RebuildLease, WriteIntent
from jobworker.handlers.jobstore.memory_fence import MemoryFence
from jobworker.handlers.jobstore.open import open_fence, open_rebuilds
from jobworker.handlers.jobstore.redis_fence import RedisFence
from jobworker.handlers.vectors import versioned_writer as fenced
from jobworker.handlers.vectors.memory import MemoryVectors
from jobworker.handlers.vectors.ports import PermanentStoreError, Row, TransientStoreError
from jobworker.handlers.vectors.versioned_writer import Contended, VersionedRows, VersionedWriter
from jobworker.worker import ConfigurationError, Fenced
from support.redis_servers import RedisServer, free_port

NAME = "story_segments"
SCOPE: dict[str, Any] = {"tenant_id": "t", "project_id": "p"}


@pytest.fixture
def fence(any_server: RedisServer | None) -> Iterator[Any]:
    if any_server is None:
        yield MemoryFence()
        return
    any_server.client.flushall()
    made = RedisFence(any_server.url)
    yield made
    made.close()


def intent(
    token: str, *ids: str, owner: str = "", held: Sequence[str] = (), chapters: Any = ()
) -> WriteIntent:
    return WriteIntent("z_a", token, owner or token, ids, tuple(held), tuple(chapters))


def verdicts(fence: Any, *intents: WriteIntent) -> list[str]:
    return [answer.verdict for answer in fence.admit(intents)]


# ---- the port


def test_a_rebuild_without_a_job_store_is_refused() -> None:
    """It would not see the writes that another object in memory admits."""
    with pytest.raises(ConfigurationError, match="empty"):
        open_rebuilds("")


def test_what_one_holds_no_other_gets_and_no_part_of_it_either(fence: Any) -> None:
    first, second = intent("a", held=["x", "y"]), intent("b", held=["y", "z"])
    third = intent("c", held=["z"])
    assert verdicts(fence, first, second, third) == ["in", "held", "in"]
    fence.release([first])
    assert verdicts(fence, second) == ["held"]
    fence.release([third])
    assert verdicts(fence, second) == ["in"]


def test_the_next_try_of_a_job_gets_what_the_one_before_held(fence: Any) -> None:
    died, again = intent("a", owner="job", held=["x"]), intent("b", owner="job", held=["x"])
    assert verdicts(fence, died, again, intent("c", held=["x"])) == ["in", "in", "held"]
    fence.release([again])
    assert verdicts(fence, intent("c", held=["x"])) == ["in"]


def test_writes_without_a_version_do_not_wait_for_each_other(fence: Any) -> None:
    assert verdicts(fence, intent("a", "1"), intent("b", "1")) == ["in", "in"]


def test_collections_do_not_wait_for_each_other(fence: Any) -> None:
    first = intent("a", held=["x"])
    assert verdicts(fence, first, first._replace(token="b", owner="b", collection="z_b")) == ["in", "in"]


def test_floors_of_large_versions_are_told_and_missing_ones_left_out(fence: Any) -> None:
    write = intent("a", chapters=["c1", "c2", "c3"])
    fence.record_removal(write, [], {"c2": 2**63 - 1, "c3": -(2**63)})
    (answer,) = fence.admit([write])
    assert answer.min_versions == {"c2": 2**63 - 1, "c3": -(2**63)}


def test_one_rebuilds_at_a_time_and_the_last_to_take_it_counts(fence: Any) -> None:
    first = fence.begin("z_a", "one", 60_000)
    assert fence.begin("z_a", "two", 60_000) == "one"
    fence.save("z_a", first.epoch, {"phase": "fill"}, lease_ms=60_000)
    again = fence.begin("z_a", "one", 60_000)
    assert isinstance(again, RebuildLease)
    assert again.fields["phase"] == "fill"
    with pytest.raises(Fenced):
        fence.save("z_a", first.epoch, {"phase": "old"}, lease_ms=60_000)
    fence.save("z_a", again.epoch, {}, lease_ms=0)
    assert isinstance(fence.begin("z_a", "two", 60_000), RebuildLease)
    assert fence.state("z_a")["phase"] == "fill"


def test_a_shut_door_lets_those_inside_go_on_and_opens_again(fence: Any) -> None:
    inside, outside = intent("a", "1"), intent("b", "2")
    epoch = fence.begin("z_a", "one", 60_000).epoch
    assert verdicts(fence, inside) == ["in"]
    fence.save("z_a", epoch, {}, lease_ms=60_000, shut_ms=60_000)
    assert verdicts(fence, inside, outside) == ["in", "closed"]
    assert fence.writers("z_a") == 1
    fence.release([inside])
    assert fence.writers("z_a") == 0
    fence.save("z_a", epoch, {}, lease_ms=60_000, shut_ms=0)
    assert verdicts(fence, outside) == ["in"]


def test_the_door_does_not_stay_shut_for_ever(fence: Any) -> None:
    epoch = fence.begin("z_a", "one", 60_000).epoch
    fence.save("z_a", epoch, {}, lease_ms=60_000, shut_ms=50)
    assert verdicts(fence, intent("a")) == ["closed"]
    time.sleep(0.06)  # it is the passing of time that opens it
    assert verdicts(fence, intent("a")) == ["in"]


def test_what_is_written_during_a_rebuild_is_told_until_it_is_seen_to(fence: Any) -> None:
    early, late = intent("a", "1", "2"), intent("b", "3")
    fence.admit([early])
    epoch = fence.begin("z_a", "one", 60_000).epoch
    fence.save("z_a", epoch, {}, lease_ms=60_000, journal=True)
    assert fence.changed("z_a", [], 10) == []
    fence.release([early])  # was in before the journal began, ended after: told
    assert sorted(fence.changed("z_a", [], 10)) == ["1", "2"]
    fence.admit([late])
    assert sorted(fence.changed("z_a", [], 10)) == ["1", "2"]
    fence.release([intent("c", "1")])
    assert sorted(fence.changed("z_a", ["1", "2"], 10)) == ["1", "3"]
    fence.record_removal(late, ["9"], {})
    fence.release([late])
    assert sorted(fence.changed("z_a", ["1", "3"], 10)) == ["3", "9"]
    fence.save("z_a", epoch, {}, lease_ms=60_000, journal=False)
    assert fence.changed("z_a", [], 10) == []


def test_vectors_of_another_model_than_the_rebuilt_collections_are_not_let_in(fence: Any) -> None:
    epoch = fence.begin("z_a", "one", 60_000).epoch
    fence.save("z_a", epoch, {"live_model": "new"}, lease_ms=60_000)
    old, new, any_model = (intent(name)._replace(model=name) for name in ("old", "new", ""))
    answers = fence.admit([old, new, any_model])
    assert [(answer.verdict, answer.model) for answer in answers] == [
        ("model", "new"),
        ("in", ""),
        ("in", ""),
    ]


# ---- the writer


def edition(
    version: int | None, *ids: str, chapter: str = "c", replace: bool = True, job: str = ""
) -> VersionedRows:
    rows = [
        Row(id_, np.ones(2, np.float32), "t", "p", chapter, 0, "", f"{id_} v{version}", version or 0)
        for id_ in ids
    ]
    return VersionedRows(job or f"{chapter}-{version}", rows, version, replace)


def texts(store: Any, *ids: str) -> dict[str, str]:
    return {row.id: row.text_content for row in store.get(NAME, ids, **SCOPE)}


@pytest.fixture
def store() -> MemoryVectors:
    made = MemoryVectors()
    made.ensure_collection(NAME, 2)
    return made


@pytest.fixture
def writer(store: MemoryVectors, fence: Any) -> VersionedWriter:
    return VersionedWriter(store, fence, prefix="z_")


def test_an_older_version_covers_nothing_and_brings_nothing_back(writer: Any, store: Any) -> None:
    writer.write(NAME, [edition(1, "a", "b")])
    writer.write(NAME, [edition(3, "a", "c")])
    writer.write(NAME, [edition(2, "a", "b", "d")])
    assert texts(store, "a", "b", "c", "d") == {"a": "a v3", "c": "c v3"}


def test_without_replace_versions_count_row_by_row(writer: Any, store: Any) -> None:
    writer.write(NAME, [edition(5, "a", replace=False)])
    writer.write(NAME, [edition(4, "a", "b", replace=False)])
    assert texts(store, "a", "b") == {"a": "a v5", "b": "b v4"}
    writer.write(NAME, [edition(5, "c")])
    assert texts(store, "a", "b", "c") == {"a": "a v5", "c": "c v5"}
    writer.write(NAME, [edition(4, "b", replace=False)])
    assert texts(store, "b") == {}


def test_a_chapter_may_be_replaced_in_parts_of_one_version(writer: Any, store: Any) -> None:
    writer.write(NAME, [edition(1, "a", "b", "c", "d")])
    writer.write(NAME, [edition(2, "a", job="part 1"), edition(2, "c", job="part 2")])
    assert texts(store, "a", "b", "c", "d") == {"a": "a v2", "c": "c v2"}


def test_chapters_tenants_and_rows_of_no_chapter_are_left_alone(writer: Any, store: Any) -> None:
    writer.write(NAME, [edition(1, "a"), edition(1, "x", chapter="other"), edition(1, "y", chapter="")])
    foreign = edition(1, "z")
    rows = [row._replace(project_id="q") for row in foreign.rows]
    writer.write(NAME, [foreign._replace(rows=rows, owner="q")])
    writer.write(NAME, [edition(2, "b")])
    assert texts(store, "a", "b", "x", "y") == {"b": "b v2", "x": "x v1", "y": "y v1"}
    assert len(store.get(NAME, ["z"], tenant_id="t", project_id="q")) == 1


def test_the_summary_of_a_replaced_chapter_stays(writer: Any, store: Any) -> None:
    writer.write(NAME, [edition(1, "a", "summary:c", replace=False)])
    writer.write(NAME, [edition(2, "b")])
    assert set(texts(store, "a", "b", "summary:c")) == {"b", "summary:c"}


def test_without_a_version_the_last_to_write_wins(writer: Any, store: Any) -> None:
    writer.write(NAME, [edition(None, "a", replace=False)])
    writer.write(NAME, [edition(2, "a", replace=False)])
    writer.write(NAME, [edition(None, "a", replace=False)])
    assert texts(store, "a") == {"a": "a vNone"}


def test_versions_in_one_call_leave_the_newest(writer: Any, store: Any) -> None:
    editions = [edition(version, "a", f"b{version}") for version in (2, 7, 5, 7, 1)]
    writer.write(NAME, editions)
    assert texts(store, "a", "b1", "b2", "b5", "b7") == {"a": "a v7", "b7": "b7 v7"}


def test_no_search_finds_the_chapter_empty(store: Any, fence: Any) -> None:
    counts = []

    class Watched:
        def __getattr__(self, name: str) -> Any:
            counts.append(store.count(NAME))
            return getattr(store, name)

    writer = VersionedWriter(Watched(), fence, prefix="z_")  # type: ignore[arg-type]
    writer.write(NAME, [edition(1, "a", "b")])
    counts.clear()
    writer.write(NAME, [edition(2, "c", "d")])
    assert min(counts) == 2
    assert max(counts) == 4


def test_one_that_must_wait_gives_up_in_time_and_says_for_whom(store: Any, fence: Any) -> None:
    now = [0.0]
    writer = VersionedWriter(
        store, fence, prefix="z_", mono_s=lambda: now[0], sleep=lambda s: now.__setitem__(0, now[0] + s)
    )
    fence.admit([WriteIntent("z_" + NAME, "x", "other", ("a",), ("i/a",))])
    with pytest.raises(Contended, match="c-1"):
        writer.write(NAME, [edition(1, "a")])
    assert now[0] == pytest.approx(fenced.WAIT_S, abs=1)
    writer.write(NAME, [edition(1, "b")])


def test_a_collection_that_is_being_switched_is_waited_for_then_unavailable(store: Any, fence: Any) -> None:
    now = [0.0]
    writer = VersionedWriter(
        store, fence, prefix="z_", mono_s=lambda: now[0], sleep=lambda s: now.__setitem__(0, now[0] + s)
    )
    epoch = fence.begin("z_" + NAME, "one", 60_000).epoch
    fence.save("z_" + NAME, epoch, {}, lease_ms=60_000, shut_ms=60_000)
    with pytest.raises(TransientStoreError, match="rebuild"):
        writer.write(NAME, [edition(None, "a", replace=False)])


def test_a_refusal_frees_what_was_held_and_an_outage_does_not(store: Any, fence: Any) -> None:
    class Failing(MemoryVectors):
        def upsert(self, name: str, rows: Any) -> None:
            raise error

    failing = Failing()
    failing.ensure_collection(NAME, 2)
    writer = VersionedWriter(failing, fence, prefix="z_")
    error: Exception = PermanentStoreError("no")
    with pytest.raises(PermanentStoreError):
        writer.write(NAME, [edition(1, "a")])
    assert fence.writers("z_" + NAME) == 0
    error = TransientStoreError("late")  # it may still be carried out
    with pytest.raises(TransientStoreError):
        writer.write(NAME, [edition(2, "a")])
    assert fence.writers("z_" + NAME) == 1


def test_a_job_store_that_is_away_is_no_fault_of_the_job(store: Any) -> None:
    writer = VersionedWriter(store, open_fence(f"redis://127.0.0.1:{free_port()}/0"), prefix="z_")
    with pytest.raises(TransientStoreError):
        writer.write(NAME, [edition(1, "a")])
    assert store.count(NAME) == 0


# ---- any order, any number of times, any kill


class Killed(BaseException):
    """The worker is dead: it says nothing more to anybody."""


class Mortal:
    """Store and fence of one worker, which dies before or after its n-th call to either."""

    def __init__(self, die_at: int) -> None:
        self.calls, self.die_at = 0, die_at

    def wrap(self, target: Any) -> Any:
        outer = self

        class Wrapped:
            def __getattr__(self, name: str) -> Any:
                return lambda *args, **named: outer.call(getattr(target, name), *args, **named)

        return Wrapped()

    def call(self, do: Callable[..., Any], *args: Any, **named: Any) -> Any:
        self.calls += 1
        if self.die_at and self.calls >= (self.die_at + 1) // 2:
            if self.die_at % 2 == 0 and self.calls == self.die_at // 2:
                do(*args, **named)
            raise Killed
        return do(*args, **named)


IDS = ["a", "b", "c", "d", "e"]
VERSIONS = st.lists(st.sets(st.sampled_from(IDS), min_size=1), min_size=1, max_size=5)


@given(
    st.lists(VERSIONS, min_size=1, max_size=3),
    st.lists(st.tuples(st.integers(0, 14), st.integers(0, 24)), max_size=25),
    st.integers(1, 4),
    st.randoms(use_true_random=False),
)
def test_the_rows_equal_the_newest_version(
    chapters: list[list[set[str]]], deaths: list[tuple[int, int]], batch: int, shuffle: random.Random
) -> None:
    now, store = [0.0], MemoryVectors()
    fence = MemoryFence(lambda: now[0])
    store.ensure_collection(NAME, 2)
    editions = [
        edition(version, *(f"{chapter}.{id_}" for id_ in sorted(ids)), chapter=f"c{chapter}")
        for chapter, versions in enumerate(chapters)
        for version, ids in enumerate(versions)
    ]
    queue = deque(shuffle.sample(editions + editions[::2], len(editions) + len(editions[::2])))
    fates = iter(deaths)
    while queue:
        jobs = [queue.popleft() for _ in range(min(batch, len(queue)))]
        mortal = Mortal(next(fates, (0, 0))[1])
        writer = VersionedWriter(
            mortal.wrap(store), mortal.wrap(fence), prefix="z_",
            mono_s=lambda: now[0], sleep=lambda s: now.__setitem__(0, now[0] + s),
        )  # fmt: skip
        try:
            writer.write(NAME, jobs)
        except (Killed, Contended):
            now[0] += LEASE_MS / 5000
            queue.extend(jobs)
    assert newest(store, chapters) == {
        f"{chapter}.{id_}": f"{chapter}.{id_} v{len(versions) - 1}"
        for chapter, versions in enumerate(chapters)
        for id_ in versions[-1]
    }


def newest(store: MemoryVectors, chapters: Sequence[Any]) -> dict[str, str]:
    return texts(store, *(f"{chapter}.{id_}" for chapter in range(len(chapters)) for id_ in IDS))


def test_writers_at_the_same_time_leave_the_newest_version(store: Any, fence: Any) -> None:
    """Threads, each with a writer of its own, as workers are; calls of the store take a moment each."""
    seed = random.randrange(2**32)
    shuffle = random.Random(seed)
    versions = {c: [shuffle.sample(IDS, shuffle.randint(1, 5)) for _ in range(12)] for c in range(4)}
    editions = [
        edition(version, *(f"{c}.{id_}" for id_ in ids), chapter=f"c{c}")
        for c, sets in versions.items()
        for version, ids in enumerate(sets)
    ] * 2
    shuffle.shuffle(editions)

    class Slow:
        def __getattr__(self, name: str) -> Any:
            time.sleep(0.0005)  # lets the others in between any two steps
            return getattr(store, name)

    def work(jobs: list[VersionedRows]) -> None:
        writer = VersionedWriter(Slow(), fence_of(fence), prefix="z_")  # type: ignore[arg-type]
        for start in range(0, len(jobs), 3):
            writer.write(NAME, jobs[start : start + 3])

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, [editions[i::4] for i in range(4)]))
    expected = {f"{c}.{id_}": f"{c}.{id_} v11" for c, sets in versions.items() for id_ in sets[-1]}
    assert newest(store, range(4)) == expected, f"seed {seed}"


def fence_of(fence: Any) -> Fence:
    """A fence for another thread: a connection serves one."""
    if isinstance(fence, MemoryFence):
        return fence
    return RedisFence(f"redis://127.0.0.1:{fence._endpoint._pool.connection_kwargs['port']}/0")
