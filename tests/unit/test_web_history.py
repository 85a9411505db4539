"""History of the charts: the latest snapshot, and the samples that a browser does not have yet."""

import threading
from typing import Any

from jobworker.worker.admin.overview import Overview
from jobworker.worker.admin.status_client import Service
from jobworker.worker.keys import Source
from jobworker.worker.store.ports import Depths
from jobworker.worker.web.history import History, sample_of

#: How long a thread may take to poll, on a busy machine.
POLLED_WITHIN_S = 30.0


def test_only_samples_that_the_browser_lacks_are_sent() -> None:
    history = History(lambda: Overview(0.0), 60.0)
    for wall_s in (1.0, 2.0, 3.0):
        history.add(Overview(wall_s))
    assert history.since(0)["wall_s"] == [1.0, 2.0, 3.0]
    answer = history.since(2)
    assert (answer["last"], answer["whole"], answer["wall_s"]) == (3, False, [3.0])
    assert history.since(3)["wall_s"] == []
    assert history.since(99)["wall_s"] == [1.0, 2.0, 3.0], "a number from before a restart"
    assert history.latest.wall_s == 3.0


def test_polling_survives_an_error_and_is_woken_by_a_change() -> None:
    calls: list[int] = []
    polled = threading.Semaphore(0)

    def take_snapshot() -> Overview:
        calls.append(1)
        polled.release()
        if len(calls) == 1:
            raise KeyError("an invalid status page")
        return Overview(float(len(calls)))

    history = History(take_snapshot, POLLED_WITHIN_S * 10)
    history.start()
    assert polled.acquire(timeout=POLLED_WITHIN_S)
    history.refresh()
    assert polled.acquire(timeout=POLLED_WITHIN_S), "it did not wait for the interval"
    assert history.latest.wall_s == 2.0
    history.close()


def test_missing_numbers_are_gaps_and_not_zeros() -> None:
    """A chart that falls to 0 while a store does not answer would mislead."""
    assert sample_of(Overview(1.0))[1:] == (*(None,) * 7, {})
    up: dict[str, Any] = {
        "rates": {"audit": {"done": 2.0, "failed": 1.0}},
        "p95_s": {"audit": {"run": 0.25}},
        "services": [Service("u", {"pid": 1})],
    }
    depths = [(Source("a", "g"), Depths(1, 2, 3, 4, 5.0, 0)), (Source("b", "g"), Depths(1, 1, 1, 1, 9.0, 0))]
    assert sample_of(Overview(1.0, streams=depths, **up)) == (
        *(1.0, 2.0, 1.0, 2, 3, 4, 5, 9.0),
        {"audit": (2.0, 1.0, 0.25, None)},
    )


def test_a_type_has_gaps_where_no_service_reported_it() -> None:
    history = History(lambda: Overview(0.0), 60.0)
    history.add(Overview(1.0))
    history.add(Overview(2.0, rates={"audit": {"done": 2.0, "failed": 0.0}}))
    assert history.since(0)["types"]["audit"]["done"] == [None, 2.0]
    assert history.since(1)["types"]["audit"]["failed"] == [0.0]
    assert history.since(2)["types"] == {}
