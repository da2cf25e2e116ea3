"""What keeps an answer from the cache cheap: work that need not wait, counts, spans, routes."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader, NumberDataPoint
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from gateway.begun import Begun, within
from gateway.counts import Counts, Level
from gateway.errors import GatewayError
from gateway.http.exchange import json_response, unless_gone
from gateway.http.middleware import RequestScope
from gateway.http.routing import Routing
from gateway.live.sampling import RequestSampler
from gateway.metrics import GatewayMetrics
from miaotui.telemetry import (
    current_span,
    current_trace_id,
    inject_context,
    span_within,
    traceparent,
)

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


async def at_once(value: int) -> int:
    return value


class Connection:
    """A caller that stays until it is told to go."""

    def __init__(self) -> None:
        self.asked = 0
        self.gone = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        self.asked += 1
        await self.gone.wait()
        return {"type": "http.disconnect"}


async def test_work_that_waits_for_nothing_is_done_when_begun() -> None:
    begun = Begun(at_once(7))
    assert (begun.done, begun.result) == (True, 7)


async def test_begun_work_goes_on_through_several_waits() -> None:
    loop = asyncio.get_running_loop()
    first, second = loop.create_future(), loop.create_future()

    async def work() -> list[str]:
        seen = [await first]
        await asyncio.sleep(0)
        try:
            await second
        except LookupError:
            seen.append("caught")
        return seen

    begun = Begun(work())
    assert not begun.done
    loop.call_soon(first.set_result, "one")
    loop.call_soon(second.set_exception, LookupError())
    assert await begun == ["one", "caught"]


async def test_what_work_raises_before_it_waits_comes_at_once() -> None:
    async def work() -> None:
        raise LookupError

    with pytest.raises(LookupError):
        Begun(work())


async def test_within_ends_work_that_waits_too_long() -> None:
    ended = False

    async def work() -> None:
        nonlocal ended
        try:
            await asyncio.Event().wait()
        finally:
            ended = True

    with pytest.raises(TimeoutError):
        await within(0.01, work())
    assert ended
    assert await within(60, at_once(3)) == 3


async def test_nobody_watches_the_connection_of_work_that_does_not_wait() -> None:
    connection = Connection()
    assert await unless_gone(connection.receive, at_once(1)) == 1
    assert connection.asked == 0


async def test_work_is_cancelled_when_its_caller_goes() -> None:
    connection = Connection()
    cancelled = False

    async def work() -> None:
        nonlocal cancelled
        try:
            connection.gone.set()
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled = True
            raise

    with pytest.raises(GatewayError) as gone:
        await unless_gone(connection.receive, work())
    assert gone.value.kind.slug == "client-closed"
    assert cancelled
    task = asyncio.current_task()
    assert task is not None
    assert not task.cancelling()


async def test_an_answer_in_spite_of_cancellation_does_not_count() -> None:
    connection = Connection()

    async def stubborn() -> str:
        connection.gone.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return "too late"
        return "never"

    with pytest.raises(GatewayError):
        await unless_gone(connection.receive, stubborn())


async def test_who_cancels_the_request_itself_is_heard() -> None:
    connection = Connection()
    waiting = asyncio.Event()

    async def work() -> None:
        waiting.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(unless_gone(connection.receive, work()))
    await waiting.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_work_that_ends_leaves_no_watcher_behind() -> None:
    connection = Connection()
    assert await unless_gone(connection.receive, asyncio.sleep(0, "done")) == "done"
    assert connection.asked == 1  # it was watched
    for _ in range(100):
        await asyncio.sleep(0)
    # Tests before this one may have left tasks of other kinds.
    left = [repr(task) for task in asyncio.all_tasks() if "coro=<_gone()" in repr(task)]
    assert not left


def read(reader: InMemoryMetricReader) -> dict[str, dict[tuple[str, ...], Any]]:
    """The points' values by metric and by the attributes' values."""
    data = reader.get_metrics_data()
    if data is None:
        return {}
    return {
        metric.name: {
            tuple(str(value) for value in (point.attributes or {}).values()): point.value
            for point in metric.data.data_points
            if isinstance(point, NumberDataPoint)
        }
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
    }


def test_counts_and_levels_are_told_to_whoever_asks() -> None:
    reader = InMemoryMetricReader()
    meter = MeterProvider([reader]).get_meter("test")
    counts = Counts(meter, "looks", "cache", "result", description="Looks")
    level = Level(meter, "level", unit="{request}", description="Requests")
    assert read(reader) == {}
    counts.add(1, "answer", "hit")
    counts.add(2, "answer", "hit")
    counts.add(1, "prompt", "miss")
    level.add(1)
    level.add(1)
    level.add(-1)
    assert read(reader) == {
        "looks": {("answer", "hit"): 3, ("prompt", "miss"): 1},
        "level": {(): 1},
    }


@pytest.mark.parametrize("sampled", [True, False])
def test_spans_are_made_where_the_one_around_them_is_recorded(sampled: bool) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(sampler=ALWAYS_ON if sampled else ALWAYS_OFF)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("test")
    with tracer.start_as_current_span("request") as around:
        with span_within(tracer, "look", attributes={"a": 1}) as span:
            assert trace.get_current_span() is span
            assert (span is around) is not sampled
        assert inject_context()["traceparent"] == traceparent(around.get_span_context()).decode()
        assert (len(exporter.get_finished_spans()) == 1) is sampled


def test_a_span_outside_of_any_is_one_of_its_own() -> None:
    tracer = TracerProvider().get_tracer("test")
    with span_within(tracer, "alone") as span:
        assert span.is_recording()


@pytest.mark.parametrize("caller", ["", "00", "01"])
async def test_requests_that_nobody_samples_have_ids_and_the_caller_decides_for_his(
    caller: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter = InMemorySpanExporter()
    sampler = RequestSampler(1e-9)
    provider = TracerProvider(sampler=sampler)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    seen: list[str] = []

    async def look(_: Request) -> Response:
        seen.append(current_trace_id())
        assert current_span() is trace.get_current_span()
        return PlainTextResponse("")

    app = RequestScope(Routing([Route("/ask", look, methods=["POST"])]), GatewayMetrics(), {})
    headers = {"traceparent": f"00-{TRACE}-{SPAN}-{caller}"} if caller else {}
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
        while not sampler.drops_next():
            await client.post("/ask")
        assert exporter.get_finished_spans()
        exporter.clear()
        seen.clear()
        answers = [await client.post("/ask", headers=headers) for _ in range(3)]
    assert len(exporter.get_finished_spans()) == (3 if caller == "01" else 0)
    assert [answer.headers["x-trace-id"] for answer in answers] == seen
    for answer in answers:
        version, trace_id, span_id, flags = answer.headers["traceparent"].split("-")
        assert (version, trace_id) == ("00", answer.headers["x-trace-id"])
        assert int(span_id, 16)
        assert int(flags, 16) & 1 == (caller == "01")
    assert set(seen) == {TRACE} if caller else len(set(seen)) == 3


async def named(request: Request) -> Response:
    return PlainTextResponse(f"named {request.path_params['name']}")


async def plain(request: Request) -> Response:
    return PlainTextResponse(f"plain {dict(request.path_params)}")


async def refusing(_: Request) -> Response:
    raise GatewayError("not-found", "Not here.")


async def late(_: Request) -> Response:
    class Late(Response):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            raise GatewayError("internal", "Too late.")

    return Late()


@pytest.fixture
def app() -> RequestScope:
    routes = [
        Route("/plain", plain, methods=["GET"]),
        Route("/refusing", refusing, methods=["POST"]),
        Route("/late", late),
        Route("/{name}", named),
        Route("/exact", plain),
    ]
    return RequestScope(Routing(routes), GatewayMetrics(), {})


@pytest.mark.parametrize(
    ("method", "path", "status", "text"),
    [
        ("GET", "/plain", 200, "plain {}"),
        ("HEAD", "/plain", 200, ""),
        ("GET", "/other", 200, "named other"),
        ("GET", "/exact", 200, "plain {}"),
        ("POST", "/plain", 405, "method-not-allowed"),
        ("POST", "/refusing", 404, "Not here."),
        ("GET", "/none/of/these", 404, "not-found"),
    ],
)
async def test_paths_find_their_endpoints(
    app: RequestScope, method: str, path: str, status: int, text: str
) -> None:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
        response = await client.request(method, path)
    assert response.status_code == status
    assert text in response.text
    if status == 405:
        assert set(response.headers["allow"].split(", ")) == {"GET", "HEAD"}


async def test_a_refusal_after_the_response_began_cuts_the_connection(
    app: RequestScope, caplog: pytest.LogCaptureFixture
) -> None:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
        with pytest.raises(ConnectionAbortedError):
            await client.get("/late")
    assert "RuntimeError" in caplog.text


def test_a_json_response_has_its_own_headers_and_those_given() -> None:
    response = json_response(b"{}", {"X-One": "1"})
    assert dict(response.headers) == {
        "cache-control": "no-store",
        "content-type": "application/json",
        "content-length": "2",
        "x-one": "1",
    }
    assert "x-one" not in json_response(b"{}").headers
