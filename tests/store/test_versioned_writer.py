"""Versioned writer: rows equal the newest version, in any order of arrival, with repeats and kills."""

import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobworker.handlers.jobstore.fence import LEASE_MS, Fence, WriteAdmission, WriteIntent
from jobworker.handlers.jobstore.memory_fence import MemoryFence
from jobworker.handlers.jobstore.open import open_fence
from jobworker.handlers.jobstore.redis_fence import RedisFence
from jobworker.handlers.vectors import versioned_writer
from jobworker.handlers.vectors.memory import MemoryVectors
from jobworker.handlers.vectors.ports import (
    CollectionUnavailable,
    PermanentStoreError,
    Row,
    TransientStoreError,
)
from jobworker.handlers.vectors.schema import MAX_REQUEST_ROWS
from jobworker.handlers.vectors.versioned_writer import Contended, LeaseLost, VersionedRows, VersionedWriter
from support.redis_servers import free_port

NAME = "story_segments"
SCOPE: dict[str, Any] = {"tenant_id": "t", "project_id": "p"}


def versioned(
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


def test_an_older_version_overwrites_and_restores_nothing(writer: Any, store: Any) -> None:
    writer.write(NAME, [versioned(1, "a", "b")])
    writer.write(NAME, [versioned(3, "a", "c")])
    writer.write(NAME, [versioned(2, "a", "b", "d")])
    assert texts(store, "a", "b", "c", "d") == {"a": "a v3", "c": "c v3"}


def test_without_replace_versions_are_compared_row_by_row(writer: Any, store: Any) -> None:
    writer.write(NAME, [versioned(5, "a", replace=False)])
    writer.write(NAME, [versioned(4, "a", "b", replace=False)])
    assert texts(store, "a", "b") == {"a": "a v5", "b": "b v4"}
    writer.write(NAME, [versioned(5, "c")])
    assert texts(store, "a", "b", "c") == {"a": "a v5", "c": "c v5"}
    writer.write(NAME, [versioned(4, "b", replace=False)])
    assert texts(store, "b") == {}


def test_a_chapter_may_be_replaced_in_parts_of_one_version(writer: Any, store: Any) -> None:
    writer.write(NAME, [versioned(1, "a", "b", "c", "d")])
    writer.write(NAME, [versioned(2, "a", job="part 1"), versioned(2, "c", job="part 2")])
    assert texts(store, "a", "b", "c", "d") == {"a": "a v2", "c": "c v2"}


def test_replace_keeps_other_chapters_projects_and_rows_without_chapter(writer: Any, store: Any) -> None:
    writer.write(NAME, [versioned(1, "a"), versioned(1, "x", chapter="other"), versioned(1, "y", chapter="")])
    foreign = versioned(1, "z")
    rows = [row._replace(project_id="q") for row in foreign.rows]
    writer.write(NAME, [foreign._replace(rows=rows, owner="q")])
    writer.write(NAME, [versioned(2, "b")])
    assert texts(store, "a", "b", "x", "y") == {"b": "b v2", "x": "x v1", "y": "y v1"}
    assert len(store.get(NAME, ["z"], tenant_id="t", project_id="q")) == 1


def test_replace_keeps_the_summary_of_the_chapter(writer: Any, store: Any) -> None:
    writer.write(NAME, [versioned(1, "a", "summary:c", replace=False)])
    writer.write(NAME, [versioned(2, "b")])
    assert set(texts(store, "a", "b", "summary:c")) == {"b", "summary:c"}


def test_without_a_version_the_last_write_wins(writer: Any, store: Any) -> None:
    writer.write(NAME, [versioned(None, "a", replace=False)])
    writer.write(NAME, [versioned(2, "a", replace=False)])
    writer.write(NAME, [versioned(None, "a", replace=False)])
    assert texts(store, "a") == {"a": "a vNone"}


def test_versions_in_one_call_leave_the_newest(writer: Any, store: Any) -> None:
    writes = [versioned(version, "a", f"b{version}") for version in (2, 7, 5, 7, 1)]
    writer.write(NAME, writes)
    assert texts(store, "a", "b1", "b2", "b5", "b7") == {"a": "a v7", "b7": "b7 v7"}


def test_readers_never_see_a_replaced_chapter_empty(store: Any, fence: Any) -> None:
    counts = []

    class Watched:
        def __getattr__(self, name: str) -> Any:
            counts.append(store.count(NAME))
            return getattr(store, name)

    writer = VersionedWriter(Watched(), fence, prefix="z_")  # type: ignore[arg-type]
    writer.write(NAME, [versioned(1, "a", "b")])
    counts.clear()
    writer.write(NAME, [versioned(2, "c", "d")])
    assert min(counts) == 2
    assert max(counts) == 4


def test_the_wait_for_held_rows_has_a_deadline_and_names_the_job(store: Any, fence: Any) -> None:
    now = [0.0]
    writer = VersionedWriter(
        store, fence, prefix="z_", mono_s=lambda: now[0], sleep=lambda s: now.__setitem__(0, now[0] + s)
    )
    fence.admit([WriteIntent("z_" + NAME, "x", "other", ("a",), ("i/a",))])
    with pytest.raises(Contended, match="c-1"):
        writer.write(NAME, [versioned(1, "a")])
    assert now[0] == pytest.approx(versioned_writer.WAIT_S, abs=1)
    writer.write(NAME, [versioned(1, "b")])


def test_a_write_behind_a_silent_holder_gives_the_worker_back(store: Any) -> None:
    now = [0.0]
    fence = MemoryFence(lambda: now[0])
    writer = VersionedWriter(store, fence, prefix="z_", mono_s=lambda: now[0])
    intent = WriteIntent("z_" + NAME, "x", "other", ("a",), ("i/a",))
    fence.admit([intent])
    now[0] = 3.0
    stuck, free = versioned(1, "a")._replace(delivery="1"), versioned(1, "b", chapter="d", job="free")
    free = free._replace(delivery="2")
    with pytest.raises(Contended) as raised:
        writer.write(NAME, [stuck, free])
    assert now[0] == 3.0
    assert (raised.value.key, raised.value.after_s) == ("job", 1.5)
    assert (raised.value.concerns(stuck), raised.value.concerns(free)) == (True, False)
    assert texts(store, "a", "b") == {"b": "b v1"}
    assert fence.admit([intent._replace(token="y")])[0].verdict == "in", "its next try goes on"


def test_a_refused_write_learns_for_how_long_the_holder_is_silent(fence: Any) -> None:
    holder = WriteIntent("z_" + NAME, "x", "one", ("a",), ("i/a",))
    fence.admit([holder])
    time.sleep(0.05)  # the clock is the server's
    (refused,) = fence.admit([holder._replace(token="y", owner="two")])
    assert refused.verdict == "held"
    assert 0.04 <= refused.silent_s < 10


def test_the_wait_for_a_closed_collection_has_a_deadline(store: Any, fence: Any) -> None:
    now = [0.0]
    writer = VersionedWriter(
        store, fence, prefix="z_", mono_s=lambda: now[0], sleep=lambda s: now.__setitem__(0, now[0] + s)
    )
    epoch = fence.begin("z_" + NAME, "one", 60_000).epoch
    fence.save("z_" + NAME, epoch, {}, lease_ms=60_000, shut_ms=60_000)
    with pytest.raises(TransientStoreError, match="rebuild"):
        writer.write(NAME, [versioned(None, "a", replace=False)])


def test_a_permanent_error_releases_the_rows_and_a_transient_one_does_not(store: Any, fence: Any) -> None:
    class Failing(MemoryVectors):
        def upsert(self, name: str, rows: Any) -> None:
            raise error

    failing = Failing()
    failing.ensure_collection(NAME, 2)
    writer = VersionedWriter(failing, fence, prefix="z_")
    error: Exception = PermanentStoreError("no")
    with pytest.raises(PermanentStoreError):
        writer.write(NAME, [versioned(1, "a")])
    assert fence.writers("z_" + NAME) == 0
    error = TransientStoreError("late")  # the store may still apply it
    with pytest.raises(TransientStoreError):
        writer.write(NAME, [versioned(2, "a")])
    assert fence.writers("z_" + NAME) == 1


@pytest.mark.parametrize(("collection", "fault_of_one"), [(NAME, False), ("notes", True)])
def test_a_collection_with_another_model_is_an_outage_only_if_it_is_everybodys(
    collection: str, fault_of_one: bool
) -> None:
    class Rebuilt(MemoryFence):
        def admit(self, intents: Any) -> Any:
            return [WriteAdmission("model", model="new") for _ in intents]

    with pytest.raises(TransientStoreError, match="--model new") as refused:
        VersionedWriter(MemoryVectors(), Rebuilt(), prefix="z_").write(collection, [versioned(1, "a")])
    assert isinstance(refused.value, CollectionUnavailable) is fault_of_one


class SlowStore(MemoryVectors):
    """Every upsert takes `upsert_s` of the test's clock, then `after_upsert` is called."""

    def __init__(self, now: list[float], upsert_s: float, after_upsert: Callable[[], None]) -> None:
        super().__init__()
        self.now, self.upsert_s, self.after_upsert = now, upsert_s, after_upsert
        self.ensure_collection(NAME, 2)

    def upsert(self, name: str, rows: Any) -> None:
        super().upsert(name, rows)
        self.now[0] += self.upsert_s
        self.after_upsert()


def rival(fence: MemoryFence) -> str:
    """Whether another job may now write a row of the test's write."""
    return fence.admit([WriteIntent("z_" + NAME, "x", "other", ("r0",), ("i/r0",))])[0].verdict


def test_a_write_of_several_requests_renews_its_lease() -> None:
    now, answers = [0.0], []
    fence = MemoryFence(lambda: now[0])
    store = SlowStore(now, LEASE_MS / 1000 / 2, lambda: answers.append(rival(fence)))
    writer = VersionedWriter(store, fence, prefix="z_", mono_s=lambda: now[0])
    writer.write(NAME, [versioned(1, *(f"r{number}" for number in range(2 * MAX_REQUEST_ROWS + 1)))])
    assert answers == ["held"] * 3
    assert store.count(NAME) == 2 * MAX_REQUEST_ROWS + 1
    assert rival(fence) == "in", "the write has released its rows"


def test_a_write_that_lost_its_lease_stops() -> None:
    now, answers = [0.0], []
    fence = MemoryFence(lambda: now[0])
    store = SlowStore(now, LEASE_MS / 1000 + 1, lambda: answers.append(rival(fence)))
    writer = VersionedWriter(store, fence, prefix="z_", mono_s=lambda: now[0])
    with pytest.raises(LeaseLost):
        writer.write(NAME, [versioned(1, *(f"r{number}" for number in range(MAX_REQUEST_ROWS + 1)))])
    assert answers == ["in"]
    assert store.count(NAME) == MAX_REQUEST_ROWS, "no request without a lease"


def test_an_unreachable_job_store_is_transient_and_writes_nothing(store: Any) -> None:
    writer = VersionedWriter(store, open_fence(f"redis://127.0.0.1:{free_port()}/0"), prefix="z_")
    with pytest.raises(TransientStoreError):
        writer.write(NAME, [versioned(1, "a")])
    assert store.count(NAME) == 0


# ---- any order of arrival, repeats, kills


class Killed(BaseException):
    """The worker was killed: it makes no further call."""


class KilledWorker:
    """Store and fence of a worker that is killed before or after its n-th call to either."""

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
    writes = [
        versioned(version, *(f"{chapter}.{id_}" for id_ in sorted(ids)), chapter=f"c{chapter}")
        for chapter, versions in enumerate(chapters)
        for version, ids in enumerate(versions)
    ]
    queue = deque(shuffle.sample(writes + writes[::2], len(writes) + len(writes[::2])))
    kills = iter(deaths)
    while queue:
        jobs = [queue.popleft() for _ in range(min(batch, len(queue)))]
        worker = KilledWorker(next(kills, (0, 0))[1])
        writer = VersionedWriter(
            worker.wrap(store), worker.wrap(fence), prefix="z_",
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


def test_concurrent_writers_leave_the_newest_version(store: Any, fence: Any) -> None:
    """Threads, each with a writer of its own, as workers are; calls of the store take a moment each."""
    seed = random.randrange(2**32)
    shuffle = random.Random(seed)
    versions = {c: [shuffle.sample(IDS, shuffle.randint(1, 5)) for _ in range(12)] for c in range(4)}
    writes = [
        versioned(version, *(f"{c}.{id_}" for id_ in ids), chapter=f"c{c}")
        for c, sets in versions.items()
        for version, ids in enumerate(sets)
    ] * 2
    shuffle.shuffle(writes)

    class Slow:
        def __getattr__(self, name: str) -> Any:
            time.sleep(0.0005)  # other threads run between any two steps
            return getattr(store, name)

    def work(jobs: list[VersionedRows]) -> None:
        writer = VersionedWriter(Slow(), fence_of(fence), prefix="z_")  # type: ignore[arg-type]
        for start in range(0, len(jobs), 3):
            writer.write(NAME, jobs[start : start + 3])

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, [writes[i::4] for i in range(4)]))
    expected = {f"{c}.{id_}": f"{c}.{id_} v11" for c, sets in versions.items() for id_ in sets[-1]}
    assert newest(store, range(4)) == expected, f"seed {seed}"


def fence_of(fence: Any) -> Fence:
    """A fence for another thread: a connection is not thread-safe."""
    if isinstance(fence, MemoryFence):
        return fence
    return RedisFence(f"redis://127.0.0.1:{fence._endpoint._pool.connection_kwargs['port']}/0")
