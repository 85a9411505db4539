"""Counters of handlers: what is reported, and what is left out with one warning."""

import logging
import math
from collections import UserDict
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pytest

from jobworker.worker.ipc.control import ControlSocket
from jobworker.worker.telemetry.handler_counters import (
    MAX_COUNTERS,
    MAX_COUNTERS_OF_WORKER,
    MAX_NAME_CHARS,
    HandlerCounters,
)
from jobworker.worker.telemetry.metrics import METRICS, MetricsBuffer


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    assert all(record.message == "handler.counter_dropped" for record in caplog.records)
    return [vars(record)["error"] for record in caplog.records]


def test_growth_is_reported_once_and_a_new_counter_with_0() -> None:
    mine: dict[str, Any] = {"words": 0, "share": Fraction(1, 2)}
    counters = HandlerCounters({"a": mine, "same": mine, "b": {"words": 2}})
    first = [("z_novel_words_total", 0.0), ("z_novel_share_total", 0.5), ("z_novel_words_total", 2.0)]
    assert counters.take() == first
    mine.update(words=5, late=1)
    assert counters.take() == [("z_novel_words_total", 5.0), ("z_novel_late_total", 1.0)]
    assert counters.take() == []


BAD: list[tuple[Any, Any]] = [
    ("a", "x"),
    ("a", None),
    ("a", True),
    ("a", math.nan),
    ("a", math.inf),
    ("a", 10**400),
    ("a", -1),
    (7, 5),
    ("", 5),
    ("bad name", 5),
    ("x 1\n", 5),
    ("\ud800", 5),
    ("\u00e9", 5),
    ("n" * (MAX_NAME_CHARS + 1), 5),
]


@pytest.mark.parametrize(("name", "total"), BAD)
def test_a_bad_counter_is_left_out_with_one_warning(
    caplog: pytest.LogCaptureFixture, name: Any, total: Any
) -> None:
    source = {name: total, "good": 1}
    counters = HandlerCounters({"a": source})
    assert counters.take() == [("z_novel_good_total", 1.0)]
    source["good"] = 2
    assert counters.take() == [("z_novel_good_total", 1.0)]
    assert len(warnings(caplog)) == 1


def test_no_name_of_the_services_metrics_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    names = [name.removeprefix("z_novel_").removesuffix("_total") for name in METRICS if "_total" in name]
    assert "jobs_completed" in names
    assert HandlerCounters({"a": dict.fromkeys(names, 5)}).take() == []
    assert len(warnings(caplog)) == 1


def test_a_counter_that_falls_is_reported_from_there_on(caplog: pytest.LogCaptureFixture) -> None:
    source = {"a": 5.0}
    counters = HandlerCounters({"a": source})
    found = []
    for total in (5, 2, 4):
        source["a"] = total
        found += counters.take()
    assert found == [("z_novel_a_total", 5.0), ("z_novel_a_total", 2.0)]
    assert warnings(caplog) == ["a fell from 5.0 to 2.0"]


def test_the_number_of_counters_is_bounded_and_so_is_the_report(caplog: pytest.LogCaptureFixture) -> None:
    """A report is one message of at most 128 KiB: a longer one would end the worker."""
    sources = {
        f"t{t}": {f"{t}_{n}".ljust(MAX_NAME_CHARS, "x"): float(n) for n in range(20_000)} for t in "abcd"
    }
    grown = HandlerCounters(sources).take()
    assert len(grown) == MAX_COUNTERS_OF_WORKER
    assert sum(name.startswith("z_novel_a_") for name, _ in grown) == MAX_COUNTERS
    assert len(warnings(caplog)) == 4
    ours, theirs = ControlSocket.pair()
    buffer = MetricsBuffer()
    for name, by in grown:
        buffer.count(name, (), by)
    ours.report(buffer, None)
    assert len(theirs.recv(1 << 20)) < 128 * 1024
    theirs.close()
    ours.close()


class Growing(UserDict[str, float]):
    """Changed by another thread while it is read."""

    def __iter__(self) -> Iterator[str]:
        raise RuntimeError("dictionary changed size during iteration")


def test_counters_that_cannot_be_read_do_not_end_the_worker(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    assert HandlerCounters({"a": Growing(), "b": {"good": 1}}).take() == [("z_novel_good_total", 1.0)]
    assert warnings(caplog) == ["they cannot be read: RuntimeError"]
