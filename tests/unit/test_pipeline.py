"""Every item passes all stages once and in order, whichever stage is slow, and a failure is not lost."""

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobworker.handlers.embedding.pipeline import MAX_WAITING, run_pipeline

PAUSES_MS = st.lists(st.tuples(*[st.sampled_from([0, 0, 0, 1, 3])] * 3), max_size=12)


def pause(ms: int) -> None:
    if ms:
        time.sleep(ms / 1000)  # a stage at work


@given(PAUSES_MS)
def test_order_and_one_call_of_a_stage_at_a_time(pauses: list[tuple[int, int, int]]) -> None:
    busy = {name: threading.Lock() for name in ("prepare", "compute", "finish")}
    finished: list[int] = []
    ahead = computed = 0

    def prepare(item: int) -> int:
        nonlocal ahead
        with busy["prepare"]:
            ahead += 1
            assert ahead <= computed + 2, "at most one item is prepared ahead"
            pause(pauses[item][0])
            return item

    def compute(item: int) -> int:
        nonlocal computed
        with busy["compute"]:
            pause(pauses[item][1])
            computed += 1
            return item

    def finish(items: list[int]) -> None:
        assert busy["finish"].acquire(blocking=False)
        assert 1 <= len(items) <= MAX_WAITING
        pause(pauses[items[0]][2])
        finished.extend(items)
        busy["finish"].release()

    run_pipeline(range(len(pauses)), prepare, compute, finish)
    assert finished == list(range(len(pauses)))


def test_what_was_computed_while_the_last_stage_was_busy_is_finished_together() -> None:
    slow, calls = threading.Event(), []

    def compute(item: int) -> int:
        if item == 3:
            slow.set()
        return item

    def finish(items: list[int]) -> None:
        calls.append(items)
        assert slow.wait(20)

    run_pipeline(range(4), int, compute, finish)
    assert calls == [[0], [1, 2, 3]]


@pytest.mark.parametrize("stage", ["prepare", "compute", "finish"])
@pytest.mark.parametrize("count", [1, 2, 9])
def test_what_a_stage_raises_is_raised_and_no_thread_is_left(stage: str, count: int) -> None:
    def fail(at: str) -> None:
        if at == stage:
            raise ValueError(at)

    before = threading.active_count()
    with pytest.raises(ValueError, match=stage):
        run_pipeline(
            range(count),
            lambda item: fail("prepare") or item,  # type: ignore[func-returns-value]
            lambda item: fail("compute") or item,  # type: ignore[func-returns-value]
            lambda items: fail("finish"),
        )
    assert threading.active_count() == before


def test_one_item_needs_no_thread() -> None:
    here = threading.current_thread()
    seen = []
    run_pipeline(
        [1], lambda item: seen.append(threading.current_thread()), lambda item: item, lambda items: None
    )
    assert seen == [here]


def test_nothing_to_do() -> None:
    run_pipeline([], int, int, lambda items: pytest.fail("called"))
