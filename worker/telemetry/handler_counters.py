"""Counters of handlers: what they have grown by since the last report. Bad ones are left out."""

import logging
import math
import re
from collections.abc import Mapping
from itertools import islice
from numbers import Real

from ..extension import extension
from .metrics import METRICS

log = logging.getLogger("jobworker.handler_counters")

#: Most counters of one handler, and of all handlers of a worker: their report is one message of bounded size.
MAX_COUNTERS, MAX_COUNTERS_OF_WORKER = 200, 500
#: Longest name, in characters.
MAX_NAME_CHARS = 100

_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")


def metric_name(counter: str) -> str:
    """The metric that a counter is exported as."""
    return f"z_novel_{counter}_total"


def is_taken(counter: object) -> bool:
    """Whether the engine has a metric of this name."""
    if not isinstance(counter, str):
        return False
    name = metric_name(counter)
    known = METRICS.get(name) or extension().metrics.get(name)
    # Built-in handlers have counters without labels, which others may count in too.
    return known is not None and (name in METRICS or known.kind != "counter" or bool(known.labels))


class HandlerCounters:
    """Counters of all handlers of a worker. A handler may change its mapping at any time, in any thread.

    ``counters`` maps a type to the mapping of its handler.
    """

    def __init__(self, counters: Mapping[str, Mapping[str, float]]) -> None:
        #: One handler may serve several types.
        self._sources = {id(source): (type_name, source) for type_name, source in counters.items()}
        self._totals: dict[tuple[int, str], float] = {}
        self._warned: set[int] = set()

    def take(self) -> list[tuple[str, float]]:
        """Each counter's metric with its growth since the last call; a new one also with 0."""
        grown: list[tuple[str, float]] = []
        for key, (type_name, source) in self._sources.items():
            try:
                items = list(islice(source.items(), MAX_COUNTERS + 1))
                if len(items) > MAX_COUNTERS:
                    self._warn(key, type_name, f"it has more than {MAX_COUNTERS} counters")
                for name, total in items[:MAX_COUNTERS]:
                    self._take_one(key, type_name, name, total, grown)
            except (
                Exception
            ) as error:  # another thread adds one at this moment, or the mapping is its own class
                self._warn(key, type_name, f"they cannot be read: {type(error).__name__}")
        return grown

    def _take_one(
        self, key: int, type_name: str, name: object, total: object, grown: list[tuple[str, float]]
    ) -> None:
        known = (key, name) in self._totals
        if fault := _fault_of(name, total) or (not known and self._fault_of_new(name)):
            self._warn(key, type_name, fault)
            return
        assert isinstance(name, str)
        assert isinstance(total, Real)
        before = self._totals.get((key, name), 0.0)
        self._totals[key, name] = after = float(total)
        if after < before:
            self._warn(key, type_name, f"{name} fell from {before} to {after}")
        elif after > before or not known:
            grown.append((metric_name(name), after - before))

    def _fault_of_new(self, name: object) -> str:
        if is_taken(name):
            return f"{name} is a counter of the service: give it another name"
        if len(self._totals) >= MAX_COUNTERS_OF_WORKER:
            return f"the handlers of a worker have more than {MAX_COUNTERS_OF_WORKER} counters"
        return ""

    def _warn(self, key: int, type_name: str, fault: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            log.warning("handler.counter_dropped", extra={"task_type": type_name, "error": fault})


def _fault_of(name: object, total: object) -> str:
    if not isinstance(name, str) or len(name) > MAX_NAME_CHARS or not _NAME.fullmatch(name):
        return f"the name {name!r:.120} is not of letters, digits and _, at most {MAX_NAME_CHARS}"
    if isinstance(total, bool) or not isinstance(total, Real):
        return f"{name} is {total!r:.80}: a number is needed"
    try:
        finite = math.isfinite(float(total))
    except (ValueError, OverflowError):
        finite = False
    return "" if finite else f"{name} is no finite number"
