"""What the gateway exports of a request: spans of one trace, without its content."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from grpc import aio
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as collector_pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as collector_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.gateway.conftest import run_gateway, until
from tests.gateway.fakes import Fakes
from tests.processes import RedisServer

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"


class Collector(collector_grpc.TraceServiceServicer):
    """A real OTLP endpoint that keeps what it gets."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.services: set[str] = set()

    async def Export(self, request: Any, context: Any) -> Any:
        for resource in request.resource_spans:
            attributes = {a.key: a.value.string_value for a in resource.resource.attributes}
            self.services.add(attributes["service.name"])
            for scope in resource.scope_spans:
                self.spans += scope.spans
        return collector_pb.ExportTraceServiceResponse()

    def of(self, trace_id: str) -> list[Span]:
        """The spans of a trace in the order in which they began."""
        spans = [span for span in self.spans if span.trace_id.hex() == trace_id]
        return sorted(spans, key=lambda span: span.start_time_unix_nano)


@pytest.fixture
async def collector() -> AsyncIterator[tuple[Collector, str]]:
    server = aio.server()
    collector = Collector()
    collector_grpc.add_TraceServiceServicer_to_server(  # type: ignore[no-untyped-call]
        collector, server
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield collector, f"127.0.0.1:{port}"
    await server.stop(0)


def values(span: Span) -> dict[str, Any]:
    return {a.key: getattr(a.value, str(a.value.WhichOneof("value"))) for a in span.attributes}


async def test_one_trace_by_the_conventions_and_without_content(
    all_fakes: Fakes,
    redis_server: RedisServer,
    collector: tuple[Collector, str],
    tmp_path: Path,
) -> None:
    all_fakes.reset()
    received, target = collector
    async with run_gateway(
        all_fakes,
        tmp_path,
        REDIS_URL=redis_server.url,
        CACHE_TIMEOUT="1",
        OTEL_EXPORTER_OTLP_ENDPOINT=f"http://{target}",
        OTEL_EXPORTER_OTLP_INSECURE="true",
        OTEL_METRICS_EXPORTER="none",
        OTEL_BSP_SCHEDULE_DELAY="100",
    ) as gateway:
        response = await gateway.http.post(
            "/v1/qa?secret-query",
            json={"question": "secret question?", "context": "secret passage of 1980"},
            headers={"traceparent": f"00-{TRACE}-{PARENT}-01", "User-Agent": "secret-agent"},
        )
        assert response.json()["trace_id"] == TRACE
        await gateway.http.get("/secret-path", headers={"traceparent": f"00-{TRACE}-{PARENT}-01"})
        await until(lambda: len(received.of(TRACE)) >= 9)
    spans = received.of(TRACE)
    names = [span.name for span in spans]
    assert names[:3] == ["POST /v1/qa", "GET answer cache", "GET prompt cache"]
    assert names[3] == "miaotui.v1.TokenizerService/Encode"
    # Keeping the tokenised passage does not hold up the model.
    assert set(names[4:6]) == {"SET prompt cache", "miaotui.v1.ShardService/Infer"}
    assert names[6:] == ["read spans", "SET answer cache", "GET"]
    root = spans[0]
    assert root.parent_span_id.hex() == PARENT
    assert root.kind == Span.SPAN_KIND_SERVER
    assert all(span.parent_span_id == root.span_id for span in spans[1:-1])
    attributes = values(root)
    assert attributes["http.request.method"] == "POST"
    assert attributes["http.route"] == attributes["url.path"] == "/v1/qa"
    assert attributes["http.response.status_code"] == 200
    assert attributes["miaotui.cache.status"] == "miss"
    cache = values(spans[1])
    assert (cache["db.system.name"], cache["db.operation.name"]) == ("redis", "GET")
    assert spans[1].kind == Span.SPAN_KIND_CLIENT
    # The services were told of the client span as their parent.
    sent = all_fakes.tokenizer.faults.metadata[0]["traceparent"]
    assert sent.split("-")[1:3] == [TRACE, spans[3].span_id.hex()]
    assert received.services == {"miaotui-gateway"}
    everything = b"".join(span.SerializeToString() for span in received.spans)
    assert b"secret" not in everything


async def test_content_is_traced_only_when_switched_on(
    all_fakes: Fakes, collector: tuple[Collector, str], tmp_path: Path
) -> None:
    all_fakes.reset()
    received, target = collector
    async with run_gateway(
        all_fakes,
        tmp_path,
        MIAOTUI_TRACE_CONTENT="1",
        OTEL_EXPORTER_OTLP_ENDPOINT=f"http://{target}",
        OTEL_EXPORTER_OTLP_INSECURE="true",
        OTEL_METRICS_EXPORTER="none",
        OTEL_BSP_SCHEDULE_DELAY="100",
    ) as gateway:
        await gateway.ask("open question?", "In 1981.")
        await until(lambda: any(span.name == "POST /v1/qa" for span in received.spans))
    (root,) = [span for span in received.spans if span.name == "POST /v1/qa"]
    assert values(root)["miaotui.question"] == "open question?"
