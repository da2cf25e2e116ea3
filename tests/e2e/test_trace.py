"""One trace, whole: from the HTTP request through cache, tokenizer and every stage."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest

from tests.e2e.asking import Question, ask_http, contents, http_client
from tests.e2e.collector import Collector, Span
from tests.e2e.conftest import Checkpoints
from tests.processes import Cluster, RedisServer

STAGES = 3
# Words that occur nowhere else, so that finding one anywhere means that content leaked.
SECRET = Question("Who hid the zanzibarquartz?", "The zanzibarquartz was hid by Mrs Vexlompkin.")
SENT = ("zanzibarquartz", "vexlompkin", "Who hid", "was hid by")


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector


@pytest.fixture(scope="module")
async def cluster(
    checkpoint: Checkpoints, collector: Collector, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Cluster]:
    redis = RedisServer(tmp_path_factory.mktemp("redis"))
    redis.start()
    # A busy machine may give no answer within the cache's 20 ms.
    patience = {"MIAOTUI_GATEWAY_CACHE_TIMEOUT": "1"}
    try:
        async with Cluster(
            checkpoint("bert"),
            stages=STAGES,
            redis_url=redis.url,
            otlp=collector.address,
            gateway_env=patience,
        ) as cluster:
            yield cluster
    finally:
        redis.stop()


def _is_whole(spans: list[Span]) -> bool:
    computed = {span.name for span in spans if span.name.endswith(" compute")}
    roots = [span for span in spans if span.kind == 2 and span.name == "POST /v1/qa"]
    known = {"", *(span.span_id for span in spans)}
    # The services export at times of their own: a parent may come after its children.
    orphans = [span for span in spans if span.parent_id not in known and span not in roots]
    return len(computed) == STAGES and len(roots) == 1 and not orphans


async def test_one_trace_of_one_request(cluster: Cluster, collector: Collector) -> None:
    async with http_client(cluster.url) as client:
        body = await ask_http(client, Question(SECRET.question, f"{SECRET.context} Once."))
    collector.trace(body["trace_id"], _is_whole)
    # The services export every 200 ms: what comes later than all the others is an orphan too.
    await asyncio.sleep(0.6)
    spans = collector.trace(body["trace_id"], _is_whole)
    by_id = {span.span_id: span for span in spans}

    roots = [span for span in spans if not span.parent_id]
    assert [root.name for root in roots] == ["POST /v1/qa"], "one tree has one root"
    root = roots[0]
    orphans = [span.name for span in spans if span.parent_id and span.parent_id not in by_id]
    assert not orphans

    assert root.attributes["http.request.method"] == "POST"
    assert root.attributes["http.route"] == "/v1/qa"
    assert root.attributes["http.response.status_code"] == 200
    services = {span.service for span in spans}
    assert services == {"miaotui-gateway", "miaotui-tokenizer", "miaotui-shard"}
    assert {s.instance for s in spans if s.service == "miaotui-shard"} == {
        f"shard-{stage}" for stage in range(STAGES)
    }

    encode = _calls(spans, "TokenizerService", "Encode")
    infer = _calls(spans, "ShardService", "Infer")
    for client_span, server_span in (encode, infer):
        assert server_span.parent_id == client_span.span_id
        assert client_span.start <= server_span.start <= server_span.end <= client_span.end
    assert encode[0].end <= infer[0].start
    assert any("cache" in span.name for span in spans if span.service == "miaotui-gateway")

    for stage in range(STAGES):
        queue = _one(spans, f"stage {stage} queue")
        compute = _one(spans, f"stage {stage} compute")
        assert queue.instance == compute.instance == f"shard-{stage}"
        assert queue.start <= queue.end == compute.start < compute.end
        for span in (queue, compute):
            assert span.attributes["miaotui.stage"] == stage
            assert span.attributes["miaotui.batch.sequences"] >= 1
            assert span.attributes["miaotui.batch.tokens"] >= 8
            assert _descends(span, infer[0], by_id)
        # What the whole batch did is a span of its own, to which the request's links.
        assert len(compute.links) == 1
        batch = next(s for s in collector.spans if s.span_id == compute.links[0])
        assert batch.name == f"stage {stage} batch"
        if stage:
            before = _one(spans, f"stage {stage - 1} compute")
            assert before.end <= queue.start, "a stage begins when the one before has finished"


async def test_a_callers_own_trace_goes_on(cluster: Cluster, collector: Collector) -> None:
    trace_id, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    async with http_client(cluster.url) as client:
        response = await client.post(
            "/v1/qa",
            json={**SECRET.body, "top_k": 2},
            headers={"traceparent": f"00-{trace_id}-{parent}-01"},
        )
    assert response.json()["trace_id"] == trace_id
    spans = collector.trace(trace_id, _is_whole)
    assert [span.name for span in spans if span.parent_id == parent] == ["POST /v1/qa"]


async def test_no_content_in_any_span_or_log(cluster: Cluster, collector: Collector) -> None:
    async with http_client(cluster.url) as client:
        first = await ask_http(client, SECRET)
        second = await ask_http(client, SECRET)
        refused = await client.post("/v1/qa", json={**SECRET.body, "top_k": "zanzibarquartz"})
    assert (first["cache"], second["cache"]) == ("miss", "hit")
    assert refused.status_code == 422
    collector.trace(first["trace_id"], _is_whole)
    collector.trace(second["trace_id"], lambda found: len(found) > 1)
    everything = "\n".join(span.text for span in collector.spans) + cluster.whole_logs()
    assert len(everything) > 5_000
    sent = [
        *SENT,
        *contents([SECRET]),
        *(a["text"] for a in first["answers"] if len(a["text"]) > 9),
    ]
    assert not [text for text in sent if text.lower() in everything.lower()]


def _one(spans: list[Span], name: str) -> Span:
    found = [span for span in spans if span.name == name]
    assert len(found) == 1, f"{len(found)} spans {name!r}"
    return found[0]


def _calls(spans: list[Span], service: str, method: str) -> tuple[Span, Span]:
    """The client's and the server's span of a gRPC call."""
    found = [
        span
        for span in spans
        if span.attributes.get("rpc.service", "").endswith(service)
        and span.attributes.get("rpc.method") == method
    ]
    assert sorted(span.kind for span in found) == [2, 3], [span.name for span in found]
    server, client = sorted(found, key=lambda span: span.kind)
    assert server.attributes["rpc.system"] == client.attributes["rpc.system"] == "grpc"
    return client, server


def _descends(span: Span, ancestor: Span, by_id: dict[str, Span]) -> bool:
    while span.parent_id:
        span = by_id[span.parent_id]
        if span is ancestor:
            return True
    return False
