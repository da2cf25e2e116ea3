"""Histograms of durations that take a microsecond a duration, for what every request records.

OpenTelemetry's own takes a dozen, mostly to hash the attributes. Where metrics are exported over
OTLP (with exemplars, and perhaps as differences), it is used nevertheless.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from opentelemetry import metrics
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Histogram,
    HistogramDataPoint,
    Metric,
    MetricsData,
    ScopeMetrics,
)
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.util.types import AttributeValue

# Latencies here start at a fraction of a millisecond; the SDK's default buckets do not.
SECONDS_BUCKETS: Sequence[float] = [
    *(0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.075),
    *(0.1, 0.15, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 30.0),
]


class _Buckets:
    """The durations with the same attributes."""

    __slots__ = ("counts", "longest", "seconds", "shortest", "since")

    def __init__(self) -> None:
        self.since = time.time_ns()
        self.counts = [0] * (len(SECONDS_BUCKETS) + 1)
        self.seconds = 0.0
        self.shortest, self.longest = math.inf, 0.0


class Durations:
    """A histogram in seconds. Not thread-safe: of one thread, and read by any."""

    def __init__(
        self, scope: str, name: str, *attributes: str, description: str, exported: bool
    ) -> None:
        """`scope`: the meter's name; `exported`: leave it to OpenTelemetry."""
        self.scope, self.name, self.description = scope, name, description
        self._names = attributes
        self._kept: dict[tuple[AttributeValue, ...], _Buckets] = {}
        self._histogram: metrics.Histogram | None = None
        if exported:
            meter = metrics.get_meter(scope)
            self._histogram = meter.create_histogram(name, "s", description)
        else:
            _SCRAPED[name] = self

    def record(self, seconds: float, *values: AttributeValue) -> None:
        """Records a duration with these values of the attributes, in their order."""
        if self._histogram is not None:
            named = dict(zip(self._names, values, strict=True))
            self._histogram.record(seconds, named)
            return
        kept = self._kept.get(values)
        if kept is None:
            kept = self._kept[values] = _Buckets()
        kept.counts[bisect_left(SECONDS_BUCKETS, seconds)] += 1
        kept.seconds += seconds
        if seconds < kept.shortest:
            kept.shortest = seconds
        if seconds > kept.longest:
            kept.longest = seconds

    def metric(self, now: int) -> Metric | None:
        """All that was recorded; `None` where nothing was. `now` in ns since the epoch."""
        points = [
            HistogramDataPoint(
                attributes=dict(zip(self._names, values, strict=True)),
                start_time_unix_nano=kept.since,
                time_unix_nano=now,
                count=sum(kept.counts),
                sum=kept.seconds,
                bucket_counts=list(kept.counts),
                explicit_bounds=SECONDS_BUCKETS,
                min=kept.shortest,
                max=kept.longest,
            )
            # A copy, because who asks may be another thread.
            for values, kept in self._kept.copy().items()
        ]
        if not points:
            return None
        data = Histogram(points, AggregationTemporality.CUMULATIVE)
        return Metric(self.name, self.description, "s", data)


# By name: one process makes each once, and tests the newest.
_SCRAPED: dict[str, Durations] = {}


class ScrapedReader(PrometheusMetricReader):
    """Adds the `Durations` to what is scraped by Prometheus."""

    def _receive_metrics(
        self, metrics_data: MetricsData, timeout_millis: float = 10_000, **kwargs: Any
    ) -> None:
        added = _with_durations(metrics_data, list(_SCRAPED.values()))
        super()._receive_metrics(added, timeout_millis, **kwargs)


def _with_durations(data: MetricsData, durations: Iterable[Durations]) -> MetricsData:
    by_scope: dict[str, list[Metric]] = {}
    now = time.time_ns()
    for one in durations:
        if (metric := one.metric(now)) is not None:
            by_scope.setdefault(one.scope, []).append(metric)
    first, *others = data.resource_metrics
    scopes = [
        replace(known, metrics=[*known.metrics, *by_scope.pop(known.scope.name, [])])
        for known in first.scope_metrics
    ]
    scopes += [
        ScopeMetrics(InstrumentationScope(name), found, "") for name, found in by_scope.items()
    ]
    return MetricsData([replace(first, scope_metrics=scopes), *others])
