"""Live figures and recent traces, of running services."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc import aio
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as collector_pb
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import SpanKind

from gateway.live.counters import LiveCounters
from gateway.live.sampling import RateLimited, RequestSampler
from gateway.live.traces import MOST_SPANS, KeptSpan, TraceRing, kept_attributes
from services.shard.link import LinkClock
from tests.checkpoints import make_checkpoint
from tests.gateway.conftest import Gateway, run_gateway
from tests.gateway.fakes import Fakes
from tests.processes import Cluster

SECRET = "The zanzibarquartz was hid by Mrs Vexlompkin."
EXPORT = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
STAGES = 2


class Clock:
    """Time that tests set."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


# -- counters ---------------------------------------------------------------------------------


def test_counters_tell_rates_percentiles_and_hits_of_the_last_minute() -> None:
    clock = Clock()
    counters = LiveCounters(clock)
    for second in range(100):
        clock.now = 1000.5 + second
        for index in range(10):
            counters.began()
            # The first 40 s, out of sight at the end, were slow.
            slow = second < 40 or index == 9
            counters.ended(0.5 if slow else 0.02, failed=index == 0)
            counters.answered("hit" if index < 2 else "miss" if index < 8 else "bypass")
    clock.now = 1100.5
    last = counters.last(60)
    assert last.requests == 600
    assert last.errors == 60
    assert last.requests / last.seconds == pytest.approx(10)
    assert last.p50 == pytest.approx(0.02, rel=0.06)
    assert last.p99 == pytest.approx(0.5, rel=0.06)
    assert last.hit_rate == pytest.approx(0.25)
    points = counters.history(5)
    assert [figures.requests for _, figures in points] == [50] * 20
    assert points[0][1].p50 == pytest.approx(0.5, rel=0.06)
    assert points[-1][1].p50 == pytest.approx(0.02, rel=0.06)


def test_counters_forget_and_begin_anew() -> None:
    clock = Clock()
    counters = LiveCounters(clock)
    counters.began()
    assert counters.in_flight == 1
    counters.ended(0.1, failed=False)
    assert counters.in_flight == 0
    clock.now += 1
    # One request in a second since the start, not in a minute.
    assert counters.last(60).requests / counters.last(60).seconds == 1
    clock.now += 3600
    assert counters.last(60).requests == 0
    assert counters.last(60).p50 is None
    assert counters.last(60).hit_rate is None
    assert all(figures.requests == 0 for _, figures in counters.history(5))
    assert len(counters.history(5)) == 60


def test_any_duration_has_a_place() -> None:
    clock = Clock()
    counters = LiveCounters(clock)
    for seconds in (0.0, 1e-9, 1e-4, 599.0, 1e9):
        counters.began()
        counters.ended(seconds, failed=False)
    clock.now += 1
    assert counters.last(60).requests == 5


# -- sampling and the ring --------------------------------------------------------------------


def test_requests_are_sampled_at_a_rate_and_as_their_caller_says() -> None:
    tracer = TracerProvider(sampler=RequestSampler(0.001)).get_tracer("test")
    spans = [tracer.start_span("POST", kind=SpanKind.SERVER) for _ in range(100)]
    assert sum(span.is_recording() for span in spans) == 5
    assert not tracer.start_span("GET", kind=SpanKind.SERVER).is_recording()


def test_a_bucket_fills_with_time() -> None:
    clock = Clock()
    bucket = RateLimited(2.0, burst=1, clock=clock)
    assert bucket.take()
    assert not bucket.take()
    clock.now += 0.5
    assert bucket.take()
    assert not bucket.take()
    clock.now += 3600
    assert [bucket.take() for _ in range(3)] == [True, False, False]


def span(trace: int, number: int, **more: Any) -> KeptSpan:
    given: dict[str, Any] = {"name": "n", "start": trace, "end": trace + 1, "attributes": {}}
    return KeptSpan(
        trace_id=f"{trace:032x}",
        span_id=f"{number:016x}",
        parent_id=None,
        service="s",
        error=False,
        **{**given, **more},
    )


def test_the_ring_is_bounded_in_traces_spans_and_bytes() -> None:
    ring = TraceRing(10)
    for trace in range(1, 100):
        ring.add(span(trace, 1))
    assert [kept.start for kept in ring.newest(100)] == list(range(99, 89, -1))
    assert ring.get(f"{1:032x}") is None
    for number in range(2 * MOST_SPANS):
        ring.add(span(99, number))
    kept = ring.get(f"{99:032x}")
    assert kept is not None
    assert len(kept.spans) == MOST_SPANS
    ring = TraceRing(1_000_000)
    for trace in range(20_000):
        ring.add(span(trace, 1, attributes={"miaotui.x": "y" * 2000}))
    assert 5_000 < len(ring.newest(1_000_000)) < 10_000
    ring = TraceRing(0)
    ring.add(span(1, 1))
    assert ring.newest(10) == []


def test_attributes_hold_no_content() -> None:
    kept = kept_attributes(
        {
            "miaotui.question": "secret",
            "miaotui.prompt.tokens": 12,
            "miaotui.text.tokens": "secret",
            "http.route": "/v1/qa",
            "http.request.header.authorization": "secret",
            "url.query": "secret",
            "db.statement": "secret",
            "miaotui.list": ["secret"],
            "miaotui.infinite": float("inf"),
            "miaotui.long": "x" * 5000,
        }.items()
    )
    assert "secret" not in repr(kept)
    assert kept["miaotui.prompt.tokens"] == 12
    assert kept["http.route"] == "/v1/qa"
    assert len(str(kept["miaotui.long"])) == 200
    assert "miaotui.infinite" not in kept


def test_a_links_time_is_its_shortest_of_late() -> None:
    clock = LinkClock()
    assert clock.seconds == 0
    for took in (0.5, 0.02, 0.3):
        clock.took(took, 100.0)
    assert clock.seconds == pytest.approx(0.01)
    clock.took(0.4, 111.0)
    assert clock.seconds == pytest.approx(0.01), "the window before still counts"
    clock.took(0.4, 122.0)
    assert clock.seconds == pytest.approx(0.2)


# -- over fakes -------------------------------------------------------------------------------


async def test_failures_and_hits_show(fakes: Fakes, tmp_path: Path) -> None:
    async with run_gateway(fakes, tmp_path, TRACES_PER_SECOND="0.001") as gateway:
        for _ in range(4):
            assert (await gateway.ask("Who?", SECRET)).status_code == 200
        fakes.shard.faults.codes = [grpc.StatusCode.INTERNAL] * 20
        failed = await gateway.ask("Who?", f"{SECRET} Once.")
        assert failed.status_code >= 500
        trace_id = failed.headers["x-trace-id"]
        kept = (await gateway.http.get(f"/v1/traces/{trace_id}")).json()
        assert kept["spans"][0]["error"]
        # The sampler's burst is over soon; then failures are kept by their one span.
        for index in range(8):
            await gateway.ask("Who?", f"{SECRET} {index}")
        entries = (await gateway.http.get("/v1/traces")).json()["traces"]
        lone = [entry for entry in entries if entry["spans"] == 1]
        assert lone
        assert all(entry["name"] == "POST /v1/qa" for entry in lone)
        assert all(entry["error"] for entry in lone)
        live = await shown(
            gateway.http, "/v1/live", lambda live: live["gateway"]["errors_per_second"] > 0
        )
        assert live["gateway"]["cache_hit_rate"] == pytest.approx(3 / 4)
        assert live["gateway"]["in_flight"] == 0


async def test_spans_from_outside_are_taken_or_refused_clearly(gateway: Gateway) -> None:
    async with aio.insecure_channel(gateway.grpc_target) as channel:
        export: aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(EXPORT)
        with pytest.raises(aio.AioRpcError) as refused:
            await export(b"\xff\xff\xff", timeout=60)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        request = collector_pb.ExportTraceServiceRequest()
        scope = request.resource_spans.add().scope_spans.add()
        # Ids of wrong lengths, and times that are none.
        scope.spans.add(trace_id=b"1", span_id=b"2", name="bad")
        scope.spans.add(
            trace_id=b"\1" * 16,
            span_id=b"\2" * 8,
            parent_span_id=b"\3" * 8,
            start_time_unix_nano=2**64 - 1,
            name="odd",
        )
        await export(request.SerializeToString(), timeout=60)
    found = (await gateway.http.get(f"/v1/traces/{'01' * 16}")).json()
    assert [s["name"] for s in found["spans"]] == ["odd"]
    assert (await gateway.http.get("/v1/traces")).status_code == 200


async def test_unknown_traces_are_not_found(gateway: Gateway) -> None:
    for trace_id in ("0" * 32, "x", "%00", "a" * 5000):
        response = await gateway.http.get(f"/v1/traces/{trace_id}")
        assert response.status_code == 404
        assert response.json()["type"] == "/problems/not-found"


# -- real services ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    model = make_checkpoint(tmp_path_factory.mktemp("model") / "bert", "bert", layers=2, hidden=32)
    cluster = Cluster(
        model,
        stages=STAGES,
        # Content in spans is for collectors, never for the page.
        gateway_env={"MIAOTUI_TRACE_CONTENT": "1"},
    )
    for process in (cluster.tokenizer, *cluster.shards):
        process.env["MIAOTUI_TRACES_TO"] = cluster.grpc_target
    async with cluster:
        yield cluster


@pytest.fixture
async def http(cluster: Cluster) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=cluster.url, trust_env=False, timeout=60) as client:
        yield client


async def ask(http: httpx.AsyncClient, context: str, **headers: str) -> httpx.Response:
    body = {"question": "Who hid it?", "context": context}
    response = await http.post("/v1/qa", json=body, headers=headers)
    assert response.status_code == 200, response.text
    return response


async def shown(http: httpx.AsyncClient, path: str, holds: Callable[[Any], bool]) -> Any:
    """What a path shows, once that holds."""
    deadline = time.monotonic() + 60
    while True:
        response = await http.get(path)
        if response.status_code == 200 and holds(response.json()):
            return response.json()
        assert time.monotonic() < deadline, response.text
        await asyncio.sleep(0.1)


async def test_a_sampled_request_shows_its_way_through_every_stage(
    cluster: Cluster, http: httpx.AsyncClient
) -> None:
    trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
    await ask(http, SECRET, traceparent=f"00-{trace_id}-00f067aa0ba902b7-01")

    def whole(trace: Any) -> bool:
        names = {found["name"] for found in trace["spans"]}
        services = {found["service"] for found in trace["spans"]}
        computed = {"stage 0 compute", "stage 1 compute", "POST /v1/qa"} <= names
        return computed and "miaotui-tokenizer" in services

    trace = await shown(http, f"/v1/traces/{trace_id}", whole)
    spans = {found["span_id"]: found for found in trace["spans"]}
    tops = [found for found in spans.values() if found["parent_id"] is None]
    assert [top["name"] for top in tops] == ["POST /v1/qa"]
    assert all(s["parent_id"] in spans for s in spans.values() if s["parent_id"])
    assert {s["service"] for s in spans.values()} == {
        *("miaotui-gateway", "miaotui-tokenizer", "shard-0", "shard-1")
    }
    assert all(s["start_milliseconds"] >= 0 for s in spans.values())
    assert not any(word in str(trace).lower() for word in ("zanzibar", "vexlomp", "hid it"))
    entry = (await http.get("/v1/traces")).json()["traces"][0]
    assert (entry["trace_id"], entry["name"]) == (trace_id, "POST /v1/qa")
    assert entry["spans"] == len(spans)
    assert not entry["error"]


async def test_stages_tell_what_they_do(cluster: Cluster, http: httpx.AsyncClient) -> None:
    def seen(live: Any) -> bool:
        return all(s["batches_per_second"] is not None for s in live["models"][0]["stages"])

    await shown(http, "/v1/live", seen)

    def worked(live: Any) -> bool:
        return bool(live["gateway"]["requests_per_second"]) and all(
            stage["batches_per_second"] and stage["busy"] for stage in live["models"][0]["stages"]
        )

    live: Any = {}
    for index in range(2000):  # until one look has work of every stage in it
        await ask(http, f"{SECRET} {index}")
        live = (await http.get("/v1/live")).json()
        if worked(live):
            break
    assert worked(live), live
    assert 0 < live["gateway"]["p50_milliseconds"] <= live["gateway"]["p99_milliseconds"]
    model = live["models"][0]
    assert (model["kind"], model["ready"], model["generation"]) == ("extractive", True, None)
    assert [stage["layers"] for stage in model["stages"]] == [[0, 1], [1, 2]]
    for index, stage in enumerate(model["stages"]):
        assert (stage["index"], stage["replica"], stage["state"]) == (index, 0, "serving")
        assert stage["address"] == cluster.stage_targets[index]
        assert stage["memory_bytes"] > stage["parameter_bytes"] > 0
        assert stage["batch_size"] >= 1
        assert stage["tokens_per_second"] > 0
        assert 0 < stage["busy"] <= 1
        assert 0 < stage["link_milliseconds"] < 10_000


async def test_a_dead_and_a_hung_stage_show_and_the_other_still_does(
    cluster: Cluster, http: httpx.AsyncClient
) -> None:
    def states(live: Any) -> list[str]:
        return [stage["state"] for stage in live["models"][0]["stages"]]

    await shown(http, "/v1/live", lambda live: states(live) == ["serving"] * STAGES)
    cluster.shards[1].signal(signal.SIGSTOP)
    try:
        live = await shown(http, "/v1/live", lambda live: states(live)[1] == "unreachable")
        stages = live["models"][0]["stages"]
        assert stages[0]["memory_bytes"] > 0
        assert stages[1]["memory_bytes"] is None
    finally:
        cluster.shards[1].signal(signal.SIGCONT)
    await shown(http, "/v1/live", lambda live: states(live)[1] == "serving")
    cluster.shards[1].kill()
    live = await shown(http, "/v1/live", lambda live: states(live)[1] == "unreachable")
    assert live["models"][0]["stages"][0]["state"] in ("serving", "starting")
