"""Durations are scraped as OpenTelemetry's own histograms are, and exported as those."""

from __future__ import annotations

import pytest
from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import (
    HistogramDataPoint,
    InMemoryMetricReader,
    MetricsData,
)
from opentelemetry.sdk.metrics.view import ExplicitBucketHistogramAggregation, View
from prometheus_client import CollectorRegistry, generate_latest

from miaotui import durations
from miaotui.durations import SECONDS_BUCKETS, Durations, ScrapedReader

TAKEN = [0.0, 0.0004, 0.0005, 0.00051, 0.2, 0.2, 7.0, 31.0]


@pytest.fixture(autouse=True)
def scraped(monkeypatch: pytest.MonkeyPatch) -> dict[str, Durations]:
    """Those that are scraped, without any of other tests."""
    known: dict[str, Durations] = {}
    monkeypatch.setattr(durations, "_SCRAPED", known)
    return known


def provider(*readers: ScrapedReader | InMemoryMetricReader) -> MeterProvider:
    seconds = ExplicitBucketHistogramAggregation(boundaries=SECONDS_BUCKETS)
    view = View(instrument_unit="s", aggregation=seconds, instrument_name="*")
    return MeterProvider(readers, views=[view])


def scrape(registry: CollectorRegistry) -> list[str]:
    return sorted(generate_latest(registry).decode().splitlines())


@pytest.mark.parametrize("scope", ["one", "other"])
def test_they_are_scraped_as_histograms_of_opentelemetry_are(scope: str) -> None:
    theirs, ours = CollectorRegistry(), CollectorRegistry()
    meter = provider(ScrapedReader(registry=theirs)).get_meter("one")
    meter.create_counter("count").add(1)
    if scope == "other":
        meter = provider(ScrapedReader(registry=theirs)).get_meter("other")
    histogram = meter.create_histogram("some.time", "s", "Time")
    for seconds in TAKEN:
        histogram.record(seconds, {"http.route": "/a", "status": 200})
    histogram.record(0.3, {"http.route": "/b", "status": 404})
    expected = scrape(theirs)

    provider(ScrapedReader(registry=ours)).get_meter("one").create_counter("count").add(1)
    mine = Durations(scope, "some.time", "http.route", "status", description="Time", exported=False)
    for seconds in TAKEN:
        mine.record(seconds, "/a", 200)
    mine.record(0.3, "/b", 404)
    assert [line for line in scrape(ours) if "some_time" in line] == [
        line for line in expected if "some_time" in line
    ]
    assert any("some_time_seconds_bucket" in line for line in expected)
    assert [line for line in scrape(ours) if line.startswith("count_total")] == [
        line for line in expected if line.startswith("count_total")
    ]


def test_what_was_never_recorded_is_not_told(scraped: dict[str, Durations]) -> None:
    registry = CollectorRegistry()
    provider(ScrapedReader(registry=registry)).get_meter("one").create_counter("count").add(1)
    mine = Durations("one", "some.time", description="Time", exported=False)
    assert scraped == {"some.time": mine}
    assert not any("some_time" in line for line in scrape(registry))


def test_where_metrics_are_exported_they_are_opentelemetrys(
    scraped: dict[str, Durations], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = InMemoryMetricReader()
    monkeypatch.setattr(metrics, "get_meter", provider(reader).get_meter)
    mine = Durations("one", "some.time", "hop", description="Time", exported=True)
    for seconds in TAKEN:
        mine.record(seconds, "cache")
    assert not scraped
    data = reader.get_metrics_data()
    assert isinstance(data, MetricsData)
    (metric,) = data.resource_metrics[0].scope_metrics[0].metrics
    (point,) = metric.data.data_points
    assert isinstance(point, HistogramDataPoint)
    assert (point.count, dict(point.attributes or {})) == (len(TAKEN), {"hop": "cache"})


def test_the_shortest_and_the_longest_are_known() -> None:
    mine = Durations("one", "some.time", description="Time", exported=False)
    for seconds in TAKEN:
        mine.record(seconds)
    metric = mine.metric(0)
    assert metric is not None
    (point,) = metric.data.data_points
    assert isinstance(point, HistogramDataPoint)
    assert (point.min, point.max) == (0.0, 31.0)
    assert point.sum == pytest.approx(sum(TAKEN))
