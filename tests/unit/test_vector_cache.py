"""Vector cache: no fault of its file fails a call or changes a vector."""

import math
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobworker.handlers.embedding.cache_erasures import CacheErasures
from jobworker.handlers.embedding.vector_cache import (
    MIN_LIMIT_BYTES,
    PAUSE_S,
    WAL_BYTES,
    Key,
    Origin,
    VectorCache,
    cache_key,
)
from jobworker.handlers.jobstore.erasures import Published
from jobworker.handlers.jobstore.memory_fence import MemoryFence

DIM = 16


def vector(number: int, dim: int = DIM) -> np.ndarray:
    return np.random.default_rng(number).standard_normal(dim).astype(np.float32)


def keys(*texts: str, tenant: str = "t001") -> list[Key]:
    return [cache_key(tenant, "model", text) for text in texts]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "vectors.sqlite3"


@pytest.fixture
def cache(path: Path, clock: Clock) -> Iterator[VectorCache]:
    made = VectorCache(path, DIM, MIN_LIMIT_BYTES, {}, mono_s=clock)
    yield made
    made.close()


def edit(path: Path, sql: str, *values: object) -> None:
    """Change the file as another program does."""
    with sqlite3.connect(path) as db:
        db.execute(sql, values)
    db.close()


def test_vectors_are_read_back_bit_identical_and_lookups_are_counted(cache: VectorCache, path: Path) -> None:
    one, two, three = keys("one", "two", "three")
    cache.put([(one, vector(1)), (two, vector(2))])
    counters: dict[str, int] = {"embedded_tokens": 7}
    other = VectorCache(path, DIM, MIN_LIMIT_BYTES, counters)
    found = other.lookup([one, three, two, one])
    other.close()
    assert set(found) == {one, two}
    assert found[two].vector.tobytes() == vector(2).tobytes()
    assert counters == {"embedded_tokens": 7, "embedding_cache_hits": 3, "embedding_cache_misses": 1}


@given(
    st.lists(st.tuples(st.sampled_from(["t1", "t2"]), st.sampled_from(["m1", "m2"]), st.text()), unique=True)
)
def test_no_two_of_tenant_model_and_text_share_a_key(parts: list[tuple[str, str, str]]) -> None:
    assert len({cache_key(*part) for part in parts}) == len(parts)


def test_a_tenant_with_the_longest_name_has_keys() -> None:
    assert cache_key("t" * 64, "model", "text") != cache_key("t" * 63, "model", "text")


def test_a_later_vector_replaces_the_earlier(cache: VectorCache) -> None:
    (one,) = keys("one")
    cache.put([(one, vector(1))])
    cache.put([(one, vector(2))])
    assert np.array_equal(cache.lookup([one])[one].vector, vector(2))


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_vectors_with_nan_or_infinity_are_not_cached(cache: VectorCache, number: float) -> None:
    one, two = keys("one", "two")
    bad = vector(1)
    bad[3] = number
    cache.put([(one, bad), (two, vector(2))])
    assert list(cache.lookup([one, two])) == [two]


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE vectors SET value = substr(value, 1, 60) WHERE key = ?",
        "UPDATE vectors SET value = value || x'00000000' WHERE key = ?",
        "UPDATE vectors SET value = x'' WHERE key = ?",
        "UPDATE vectors SET value = 'text' WHERE key = ?",
        "UPDATE vectors SET value = 5 WHERE key = ?",
        "UPDATE vectors SET value = zeroblob(80) WHERE key = ?",
        "UPDATE vectors SET value = substr(value, 1, 16) || x'0000c07f' || substr(value, 21) WHERE key = ?",
        "UPDATE vectors SET value = (SELECT value FROM vectors ORDER BY id LIMIT 1 OFFSET 1) WHERE key = ?",
        "UPDATE vectors SET id = 9223372036854775807 WHERE key = ?",
    ],
)
def test_a_damaged_entry_is_a_miss_and_the_next_put_replaces_it(
    cache: VectorCache, path: Path, clock: Clock, sql: str
) -> None:
    one, two = keys("one", "two")
    cache.put([(one, vector(1)), (two, vector(2))])
    edit(path, sql, one)
    found = cache.lookup([one, two])
    assert np.array_equal(found[two].vector, vector(2))
    assert one not in found or np.array_equal(found[one].vector, vector(1))
    clock.now += PAUSE_S
    cache.put([(one, vector(3))])
    assert np.array_equal(cache.lookup([one])[one].vector, vector(3))


def test_one_dimension_never_gets_the_others_vectors(cache: VectorCache, path: Path) -> None:
    (one,) = keys("one")
    cache.put([(one, vector(1))])
    wider = VectorCache(path, 2 * DIM, MIN_LIMIT_BYTES, {})
    assert wider.lookup([one]) == {}
    wider.close()


def _cut(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(20_000)


def _scribble(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"no database" * 500)


def _scribble_behind(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(16_384)
        file.write(b"\xff" * 60_000)


@pytest.mark.parametrize("damage", [_cut, _scribble, _scribble_behind])
@pytest.mark.parametrize("running", [True, False])
def test_a_damaged_file_is_replaced(
    cache: VectorCache, path: Path, clock: Clock, damage: object, running: bool
) -> None:
    many = keys(*map(str, range(500)))
    cache.put([(key, vector(1)) for key in many])
    cache.close()  # so that all entries are in the file and none in its log
    if running:
        cache.lookup(many[:1])
    damage(path)  # type: ignore[operator]
    for round_ in range(3):
        cache.lookup(many)
        cache.put([(key, vector(round_)) for key in many])
        clock.now += PAUSE_S
    cache.put([(many[0], vector(9))])
    assert np.array_equal(cache.lookup(many[:1])[many[0]].vector, vector(9))


@pytest.mark.parametrize("make", [lambda path: path.mkdir(parents=True), lambda path: path.parent.touch()])
def test_without_a_usable_file_lookups_miss_and_one_warning_is_logged(
    cache: VectorCache, path: Path, clock: Clock, make: object, caplog: pytest.LogCaptureFixture
) -> None:
    make(path)  # type: ignore[operator]
    (one,) = keys("one")
    for _ in range(5):
        cache.put([(one, vector(1))])
        assert cache.lookup([one]) == {}
    assert caplog.text.count("cache.paused") == 1
    clock.now += PAUSE_S
    cache.lookup([one])
    assert caplog.text.count("cache.paused") == 2


def test_a_full_file_of_an_earlier_layout_is_replaced(path: Path) -> None:
    path.parent.mkdir()
    pages = (MIN_LIMIT_BYTES - WAL_BYTES) // 16_384
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA page_size = 16384")
        db.execute("CREATE TABLE vectors (id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, value BLOB)")
        db.execute("INSERT INTO vectors (key, value) VALUES (x'00', zeroblob(?))", ((pages - 4) * 16_380,))
        db.execute("PRAGMA user_version = 1")
    db.close()
    cache = VectorCache(path, DIM, MIN_LIMIT_BYTES, {})
    (one,) = keys("one")
    cache.put([(one, vector(1))])
    assert one in cache.lookup([one])
    cache.close()


def test_a_file_with_another_layout_is_replaced(path: Path, cache: VectorCache) -> None:
    path.parent.mkdir()
    edit(path, "PRAGMA user_version = 99")
    (one,) = keys("one")
    cache.put([(one, vector(1))])
    assert one in cache.lookup([one])


def test_a_file_with_another_writer_is_read_without_waiting(cache: VectorCache, path: Path) -> None:
    one, two = keys("one", "two")
    cache.put([(one, vector(1))])
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("BEGIN IMMEDIATE")
    cache.put([(two, vector(2))])
    assert list(cache.lookup([one, two])) == [one]
    db.execute("ROLLBACK")
    db.close()
    cache.put([(two, vector(2))])
    assert set(cache.lookup([one, two])) == {one, two}


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.parent.iterdir())


def test_the_file_stays_within_its_limit_and_keeps_used_entries(path: Path) -> None:
    """Five times the limit is written, while one entry is looked up all the time."""
    dim, wide = 1024, {}
    cache = VectorCache(path, dim, 32 * 1024 * 1024, wide)
    used, *rest = keys("in use", *map(str, range(30_000)))
    cache.put([(used, vector(7, dim))])
    some = vector(1, dim)
    for start in range(0, len(rest), 300):
        assert used in cache.lookup([used])
        cache.put([(key, some) for key in rest[start : start + 300]])
        assert size(path) <= 32 * 1024 * 1024
    kept = cache.lookup(rest)
    assert set(rest[-1000:]) <= kept.keys(), "the newest are there"
    room = 24 * 1024 * 1024 // (4 * dim)
    assert room // 2 < len(kept) <= room
    cache.close()


@pytest.mark.parametrize(("dim", "share"), [(384, 0.05), (384, 1.0), (1024, 0.2), (4096, 0.5)])
def test_a_full_cache_takes_new_rows_whatever_is_looked_up(
    path: Path, caplog: pytest.LogCaptureFixture, dim: int, share: float
) -> None:
    """In each round a part of the entries, scattered over the file, is used and a few rows are new."""
    cache = VectorCache(path, dim, MIN_LIMIT_BYTES, {})
    some, choose = vector(1, dim), np.random.default_rng(1)
    count = 3 * (MIN_LIMIT_BYTES - WAL_BYTES) // (4 * dim + 90)
    stored = keys(*map(str, range(count)))
    for start in range(0, count, 1000):
        cache.put([(key, some) for key in stored[start : start + 1000]])
    stored = list(cache.lookup(stored))
    for round_ in range(12):
        used = choose.choice(len(stored), max(1, int(share * len(stored))), replace=False)
        hits = cache.lookup([stored[index] for index in used])
        new = keys(*(f"new {round_} {row}" for row in range((10, 1, 30)[round_ % 3])))
        cache.put([(key, some) for key in new])
        assert cache.lookup(new).keys() == set(new)
        assert len(cache.lookup(list(hits))) > 0.4 * len(hits), "entries in use are not evicted first"
        stored = [*cache.lookup(stored), *new]
        assert size(path) <= MIN_LIMIT_BYTES
    assert "cache.paused" not in caplog.text
    cache.close()


def test_a_smaller_limit_replaces_the_file(path: Path) -> None:
    large = VectorCache(path, 1024, 64 * 1024 * 1024, {})
    many = keys(*map(str, range(10_000)))
    large.put([(key, vector(1, 1024)) for key in many[:5000]])
    large.close()
    small = VectorCache(path, 1024, MIN_LIMIT_BYTES, {})
    small.put([(many[0], vector(2, 1024))])
    assert list(small.lookup(many)) == [many[0]]
    small.close()
    assert size(path) <= MIN_LIMIT_BYTES


def test_a_put_larger_than_the_limit_is_truncated(path: Path) -> None:
    cache = VectorCache(path, 1024, 1, {})
    many = keys(*map(str, range(5000)))
    cache.put([(key, vector(1, 1024)) for key in many])
    assert 500 < len(cache.lookup(many)) < 5000
    assert size(path) <= MIN_LIMIT_BYTES
    cache.close()


def test_the_file_is_for_its_user_only(cache: VectorCache, path: Path) -> None:
    cache.put([(keys("one")[0], vector(1))])
    files = [file for file in path.parent.iterdir() if not file.name.endswith(".lock")]
    assert len(files) == 3, "file, log and its index"
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}


def test_threads_share_a_cache(cache: VectorCache) -> None:
    texts = keys(*map(str, range(200)))
    wrong: list[Key] = []

    def work(first: int) -> None:
        for start in range(first, 200, 4):
            key = texts[start]
            cache.put([(key, vector(start))])
            if not np.array_equal(cache.lookup([key])[key].vector, vector(start)):
                wrong.append(key)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not wrong
    assert len(cache.lookup(texts)) == 200


WRITER = """
import sys, numpy as np
from pathlib import Path
from jobworker.handlers.embedding.vector_cache import VectorCache, cache_key
cache = VectorCache(Path(sys.argv[1]), 16, 2**24, {})
for number in range(10**9):
    keys = [cache_key("t", "m", f"{number}/{row}") for row in range(50)]
    cache.put([(key, np.full(16, number, np.float32)) for key in keys])
    if number == 5:
        print("going", flush=True)
"""


def test_killed_while_writing_it_leaves_a_file_that_is_read(path: Path) -> None:
    for _ in range(3):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, env=dict(os.environ)
        )
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"going\n"
        writer.send_signal(signal.SIGKILL)
        writer.wait(20)
        writer.stdout.close()
        cache = VectorCache(path, DIM, MIN_LIMIT_BYTES, {})
        written = [cache_key("t", "m", f"5/{row}") for row in range(50)]
        assert len(cache.lookup(written)) == 50
        (one,) = keys("one")
        cache.put([(one, vector(1))])
        assert one in cache.lookup([one])
        cache.close()


def test_the_log_is_within_the_limit() -> None:
    assert WAL_BYTES < MIN_LIMIT_BYTES


def stored(path: Path) -> int:
    with sqlite3.connect(path) as db:
        return int(db.execute("SELECT count(*) FROM vectors").fetchone()[0])


#: Tenant, project, chapter, row of each entry, by the name of its text.
ORIGINS = {
    "a": Origin("t", "p", "c1", "r1", 10),
    "b": Origin("t", "p", "c2", "r2", 10),
    "no chapter": Origin("t", "p", "", "r3", 10),
    "q": Origin("t", "q", "c1", "r4", 10),
    "u": Origin("u", "p", "c1", "r5", 10),
}


@pytest.mark.parametrize(
    ("name", "gone"),
    [
        ("t/t", {"a", "b", "no chapter", "q"}),
        ("p/t/p", {"a", "b", "no chapter"}),
        ("c/t/p/c1", {"a"}),
        ("k/t/p/c1", {"a"}),
        ("k/t/p/", {"no chapter"}),
        ("i/t/p/r1", set()),
    ],
)
def test_a_deletion_takes_the_vectors_of_its_scope_and_keeps_older_jobs_out(
    cache: VectorCache, path: Path, name: str, gone: set[str]
) -> None:
    by_text = dict(zip(ORIGINS, keys(*ORIGINS), strict=True))

    def put(created_us: int) -> None:
        cache.put(
            [(by_text[text], vector(1), o._replace(created_us=created_us), 3) for text, o in ORIGINS.items()]
        )

    def left() -> set[str]:
        found = cache.lookup(list(by_text.values()))
        return {text for text, key in by_text.items() if key in found}

    put(10)
    assert cache.erase([name], 20)
    assert left() == set(ORIGINS) - gone
    assert stored(path) == len(left())
    put(20)
    assert left() == set(ORIGINS) - gone, "a late retry of an older job"
    put(21)
    assert left() == set(ORIGINS)
    assert cache.erase([name], 20)
    assert left() == set(ORIGINS), "newer work stays, when the deletion is applied again"


@pytest.mark.parametrize(
    ("name", "gone"), [("c/t/p/c1", True), ("c/t/p/c9", True), ("p/t/other", True), ("p/u/p", False)]
)
def test_a_vector_that_several_chapters_share_goes_with_each_of_them(
    cache: VectorCache, name: str, gone: bool
) -> None:
    shared, other = keys("shared", "other")
    cache.put([(shared, vector(1), Origin("t", "p", "c1", "r", 20), 3), (other, vector(2))])
    cache.lookup([shared], [Origin("t", "p", "c9", "r9")])
    cache.put([])
    if name.startswith("p/"):
        cache.lookup([shared], [Origin("t", "other", "c9", "r9")])
        cache.put([])
    cache.erase([name], 20)
    assert set(cache.lookup([shared, other])) == ({other} if gone else {shared, other})


def test_a_cache_follows_the_log_of_deletions_from_where_any_worker_stopped(
    cache: VectorCache, path: Path
) -> None:
    fence, now = MemoryFence(), [1000.0]
    follower = CacheErasures(cache, fence, kept_s=100.0, wall_s=lambda: now[0])
    entries = [
        (key, vector(1), origin, 3) for key, origin in zip(keys(*ORIGINS), ORIGINS.values(), strict=True)
    ]
    follower.apply()
    cache.put(entries)
    fence.publish(Published(("c/t/p/c1",), 20, ("*",)), 1)
    follower.apply()
    assert stored(path) == 4
    other = VectorCache(path, DIM, MIN_LIMIT_BYTES, {})
    fence.publish(Published(("p/t/p",), 20, ("*",)), 1)
    CacheErasures(other, fence, kept_s=100.0, wall_s=lambda: now[0]).apply()
    assert stored(path) == 2
    assert [one.position() for one in (cache, other)] == [("2", 1000.0)] * 2
    other.close()
    now[0] += 95
    follower.apply()
    assert stored(path) == 0, "the log may have lost deletions meanwhile"


def test_deleted_vectors_are_no_longer_in_the_file(cache: VectorCache, path: Path) -> None:
    (key,) = keys("secret")
    cache.put([(key, vector(1), ORIGINS["a"], 3), (keys("x")[0], vector(2))])
    assert cache.erase(["c/t/p/c1"], 20)
    files = b"".join(file.read_bytes() for file in path.parent.iterdir() if file.is_file())
    assert np.asarray(vector(1), "<f4").tobytes() not in files


def test_a_second_cache_of_a_process_keeps_the_locks_of_the_first(cache: VectorCache, path: Path) -> None:
    """Without them a process that ends takes itself for the last one and deletes the log under the others."""
    one, two = keys("one", "two")
    cache.put([(one, vector(1))])
    second = VectorCache(path, DIM, MIN_LIMIT_BYTES, {})
    second.put([(two, vector(2))])
    second.close()
    read = (
        "import sqlite3, sys; db = sqlite3.connect(sys.argv[1]); db.execute('SELECT 1 FROM used'); db.close()"
    )
    subprocess.run([sys.executable, "-c", read, str(path)], check=True)
    assert path.with_name(f"{path.name}-wal").exists()
    cache.put([(one, vector(3))])
    assert stored(path) == 2
