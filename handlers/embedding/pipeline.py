"""Three-stage pipeline: one item is computed while the next is prepared and earlier ones are finished."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Prepared = TypeVar("Prepared")
Computed = TypeVar("Computed")

# Computed items that may wait for `finish`. If `finish` is the slowest stage, computing blocks here, which
# bounds the memory.
MAX_WAITING = 4


def run_pipeline(
    items: Sequence[Item],
    prepare: Callable[[Item], Prepared],
    compute: Callable[[Prepared], Computed],
    finish: Callable[[list[Computed]], None],
) -> None:
    """Pass every item through the stages, in order; `compute` runs in the caller's thread.

    No stage runs twice at once. One call of `finish` gets all items that were computed during the last one.
    On return `finish` has had every item. Raises the error of a stage; later items may then be lost.
    """
    if len(items) == 1:
        finish([compute(prepare(items[0]))])
        return
    # Threads of this call only: none is left when a worker forks, exits or fails.
    with ThreadPoolExecutor(1, "prepare") as preparer, ThreadPoolExecutor(1, "finish") as finisher:
        prepared = [preparer.submit(prepare, item) for item in items[:1]]
        finishing: Future[None] | None = None
        waiting: list[Computed] = []
        for index in range(len(items)):
            current = prepared.pop().result()
            if index + 1 < len(items):
                prepared.append(preparer.submit(prepare, items[index + 1]))
            waiting.append(compute(current))
            if finishing is None or finishing.done() or len(waiting) >= MAX_WAITING:
                finishing = _submit(finisher, finishing, finish, waiting)
                waiting = []
        if waiting:
            finishing = _submit(finisher, finishing, finish, waiting)
        if finishing:
            finishing.result()


def _submit(
    finisher: ThreadPoolExecutor,
    previous: "Future[None] | None",
    finish: Callable[[list[Computed]], None],
    items: list[Computed],
) -> "Future[None]":
    if previous:
        previous.result()
    return finisher.submit(finish, items)
