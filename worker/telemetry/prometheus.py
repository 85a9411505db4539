"""Prometheus collector: totals over all processes. The only file that imports a metrics library."""

import math
import re
import threading
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from ..extension import Metric
from .metrics import Gauge, Labels, all_metrics

#: Content type of `PrometheusCollector.page`.
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

#: Definition of every counter of a user's handler. A counter whose name is not valid is left out.
_HANDLER_COUNTER = Metric("counter", "Counted by a handler")
_VALID_NAME = re.compile("[a-zA-Z_][a-zA-Z0-9_]*")
#: Most counters of handlers: a handler that invents names must not fill the memory of the supervisor.
MAX_HANDLER_COUNTERS = 5000


class PrometheusCollector(Collector):
    """Sums the deltas of all processes, so that totals survive restarts of every process.

    The supervisor's loop writes and its HTTP threads read, under a lock.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._metrics = all_metrics()
        self._values: dict[str, dict[Labels, float]] = {name: {} for name in self._metrics}
        self._buckets: dict[str, dict[Labels, list[int]]] = {name: {} for name in self._metrics}
        for name, metric in self._metrics.items():
            if metric.kind == "counter" and not metric.labels:
                # Not absent: an alert must not take a missing series for a healthy one.
                self._values[name][()] = 0.0
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def add(self, counts: Iterable[tuple[str, Labels, float]]) -> None:
        """Add to counters. What cannot be shown is left out: no report may stop the supervisor."""
        with self._lock:
            for name, labels, by in counts:
                if 0 <= by < math.inf and (
                    self._is(name, labels, "counter") or self._is_of_handler(name, labels)
                ):
                    self._add(name, tuple(labels), by)

    def _add(self, name: str, labels: Labels, by: float) -> None:
        values = self._values.setdefault(name, {})
        values[labels] = values.get(labels, 0.0) + by

    def _is(self, name: str, labels: Labels, kind: str) -> bool:
        metric = self._metrics.get(name)
        return metric is not None and metric.kind == kind and len(metric.labels) == len(labels)

    def _is_of_handler(self, name: str, labels: Labels) -> bool:
        if labels or name in self._metrics or not _VALID_NAME.fullmatch(name):
            return False
        return name in self._values or len(self._values) < len(self._metrics) + MAX_HANDLER_COUNTERS

    def put(self, gauges: Iterable[Gauge]) -> None:
        """Set gauges, or delete those without a value."""
        with self._lock:
            for name, labels, value in gauges:
                if value is None:
                    self._delete_gauges(name, tuple(labels))
                elif self._is(name, labels, "gauge"):
                    self._values[name][tuple(labels)] = value

    def _delete_gauges(self, name: str, prefix: Labels) -> None:
        metric = self._metrics.get(name)
        if metric is not None and metric.kind == "gauge":
            kept = {key: one for key, one in self._values[name].items() if key[: len(prefix)] != prefix}
            self._values[name] = kept

    def merge(self, histograms: Iterable[tuple[str, Labels, list[int], float]]) -> None:
        """Add to histograms: one count per bucket (the last is above all bounds) and the sum."""
        with self._lock:
            for name, labels, counts, total in histograms:
                if not self._is(name, labels, "histogram") or not math.isfinite(total):
                    continue
                if len(counts) != len(self._metrics[name].buckets) + 1:
                    continue
                self._add(name, tuple(labels), total)
                totals = self._buckets[name].setdefault(tuple(labels), [0] * len(counts))
                for i, n in enumerate(counts):
                    totals[i] += n

    def totals(self, *names: str) -> dict[str, list[dict[str, str | float]]]:
        """Samples of these counters and gauges (default: all), each with its labels and its ``value``."""
        with self._lock:
            return {
                name: [
                    {**dict(zip(self._metrics[name].labels, labels, strict=True)), "value": value}
                    for labels, value in self._values[name].items()
                ]
                for name in names or self._metrics
                if self._metrics[name].kind != "histogram"
            }

    def histograms(self) -> dict[str, dict[str, Any]]:
        """Every histogram: ``bounds`` of its buckets, and ``samples`` with labels and ``counts``.

        A sample has one count per bucket and a last one for values above all bounds. They are not cumulative.
        """
        with self._lock:
            return {
                name: {
                    "bounds": list(metric.buckets),
                    "samples": [
                        {**dict(zip(metric.labels, labels, strict=True)), "counts": list(counts)}
                        for labels, counts in self._buckets[name].items()
                    ],
                }
                for name, metric in self._metrics.items()
                if metric.kind == "histogram"
            }

    def page(self) -> bytes:
        """The body of /metrics in the text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Family]:
        """One family per metric (protocol of the registry)."""
        with self._lock:
            for name in self._values:
                metric = self._metrics.get(name, _HANDLER_COUNTER)
                yield self._family(name, metric.kind, metric.help, metric.labels, metric.buckets)

    def _family(self, name: str, kind: str, text: str, labels: Labels, bounds: tuple[float, ...]) -> Family:
        values = self._values[name]
        if kind == "histogram":
            histogram = HistogramMetricFamily(name, text, labels=labels)
            for key, counts in self._buckets[name].items():
                names = [*(f"{float(bound)}" for bound in bounds), "+Inf"]
                cumulative = [float(n) for n in accumulate(counts)]
                histogram.add_metric(key, list(zip(names, cumulative, strict=True)), values[key])
            return histogram
        family = CounterMetricFamily if kind == "counter" else GaugeMetricFamily
        simple = family(name, text, labels=labels)
        for key, value in values.items():
            simple.add_metric(key, value)
        return simple
