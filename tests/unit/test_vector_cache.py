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

from jobworker.handlers.embedding.vector_cache import (
    MIN_LIMIT_BYTES,
    PAUSE_S,
    WAL_BYTES,
    Key,
    VectorCache,
    cache_key,
)

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
    assert found[two].tobytes() == vector(2).tobytes()
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
    assert np.array_equal(cache.lookup([one])[one], vector(2))


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
    assert np.array_equal(found[two], vector(2))
    assert one not in found or np.array_equal(found[one], vector(1))
    clock.now += PAUSE_S
    cache.put([(one, vector(3))])
    assert np.array_equal(cache.lookup([one])[one], vector(3))


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
    assert np.array_equal(cache.lookup(many[:1])[many[0]], vector(9))


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
            if not np.array_equal(cache.lookup([key])[key], vector(start)):
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
