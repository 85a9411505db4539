"""Three stages side by side: while one item is computed, the next is prepared and the last are finished."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Prepared = TypeVar("Prepared")
Done = TypeVar("Done")

# Computed items that may wait to be finished; where finishing is the slower stage, computing waits for it,
# so that memory stays bounded.
MOST_WAITING = 4


def flow(
    items: Sequence[Item],
    prepare: Callable[[Item], Prepared],
    compute: Callable[[Prepared], Done],
    finish: Callable[[list[Done]], None],
) -> None:
    """Take every item through all three stages, in order; `compute` runs in the caller's thread.

    Each stage runs once at a time. `finish` gets all that was computed while it was busy, in one call. It
    has seen every item when this returns. Raises what a stage raises; items behind that one may then be lost.
    """
    if len(items) == 1:
        finish([compute(prepare(items[0]))])
        return
    # Threads of this call alone: none is left over where a worker forks, ends or fails.
    with ThreadPoolExecutor(1, "prepare") as ahead, ThreadPoolExecutor(1, "finish") as behind:
        prepared = [ahead.submit(prepare, item) for item in items[:1]]
        finishing: Future[None] | None = None
        waiting: list[Done] = []
        for place in range(len(items)):
            current = prepared.pop().result()
            if place + 1 < len(items):
                prepared.append(ahead.submit(prepare, items[place + 1]))
            waiting.append(compute(current))
            if finishing is None or finishing.done() or len(waiting) >= MOST_WAITING:
                finishing = _next(behind, finishing, finish, waiting)
                waiting = []
        if waiting:
            finishing = _next(behind, finishing, finish, waiting)
        if finishing:
            finishing.result()


def _next(
    behind: ThreadPoolExecutor,
    before: "Future[None] | None",
    finish: Callable[[list[Done]], None],
    items: list[Done],
) -> "Future[None]":
    if before:
        before.result()
    return behind.submit(finish, items)
