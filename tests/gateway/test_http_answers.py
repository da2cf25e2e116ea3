"""Answers over HTTP: content, offsets, caches, deadlines, faults of the services."""

from __future__ import annotations

import asyncio
import json

import grpc
import httpx
import pytest
from grpc import aio

from gateway.calling import RETRIES, retried
from gateway.errors import GatewayError
from miaotui.v1 import shard_pb2 as shard_pb
from services.rpc.breaker import RetryBudget
from tests.gateway.conftest import Gateway, until
from tests.gateway.fakes import Fakes

# Combining marks, an emoji of two UTF-16 units and of several code points, right-to-left.
MIXED = "Le café 👩‍🚀 ואז 他在长沙 1925 年出生。"


async def test_answer_and_its_offsets_in_code_points(gateway: Gateway, fakes: Fakes) -> None:
    response = await gateway.ask("何时？", MIXED)
    assert response.status_code == 200
    body = response.json()
    (answer,) = body["answers"]
    assert answer["text"] == "1925" == MIXED[answer["start"] : answer["end"]]
    assert body["answerable"] is True
    assert 0.9 < answer["score"] <= 1
    assert answer["logit"] == 18.0
    assert body["no_answer_score"] == -18.0
    assert (body["model"], body["model_fingerprint"]) == ("fake", "model-1")
    hops = {hop["hop"]: hop["milliseconds"] for hop in body["timings"]}
    expected = ["cache", "tokenizer", "queue", "stage 0", "stage 1", "links", "read", "total"]
    assert list(hops) == expected
    assert hops["stage 1"] == pytest.approx(0.2)
    assert hops["total"] >= hops["tokenizer"]


async def test_answer_in_a_later_window_of_a_long_passage(gateway: Gateway, fakes: Fakes) -> None:
    context = "words without number " * 40 + "and then 1848." + " more words" * 10
    response = await gateway.ask("When?", context, no_cache=True)
    (answer,) = response.json()["answers"]
    assert context[answer["start"] : answer["end"]] == answer["text"] == "1848"


async def test_n_best_and_no_answer(gateway: Gateway, fakes: Fakes) -> None:
    body = (await gateway.ask("When?", "Perhaps 1925 or so.", top_k=5)).json()
    assert len(body["answers"]) == 5
    logits = [answer["logit"] for answer in body["answers"]]
    assert logits == sorted(logits, reverse=True)
    places = [(answer["start"], answer["end"]) for answer in body["answers"]]
    assert len(set(places)) == 5
    none = (await gateway.ask("When?", "No number at all.", no_answer_threshold=0.0)).json()
    assert none["answerable"] is False
    assert none["answers"] == []
    assert none["no_answer_score"] == 10.0


async def test_second_time_from_the_cache(gateway: Gateway, fakes: Fakes) -> None:
    first = (await gateway.ask("Q hit", "It was 1900.")).json()
    second = (await gateway.ask("Q hit", "It was 1900.")).json()
    assert (first["cache"], second["cache"]) == ("miss", "hit")
    assert first["answers"] == second["answers"]
    assert fakes.shard.faults.calls == 1
    third = (await gateway.ask("Q hit", "It was 1900.", no_cache=True)).json()
    assert third["cache"] == "bypass"
    assert fakes.shard.faults.calls == 2


async def test_passage_is_tokenised_once_for_many_questions(gateway: Gateway, fakes: Fakes) -> None:
    for question in ("Q1", "Q2", "Q3"):
        response = await gateway.ask(question, "A passage of 1901 for prompts.")
        assert response.json()["answers"][0]["text"] == "1901"
    assert (fakes.tokenizer.texts, fakes.tokenizer.prompts) == (1, 2)


async def test_prompt_that_the_tokenizer_refuses_is_sent_as_text(
    gateway: Gateway, fakes: Fakes
) -> None:
    await gateway.ask("P1", "A passage of 1902.")
    fakes.tokenizer.faults.codes = [grpc.StatusCode.FAILED_PRECONDITION]
    response = await gateway.ask("P2", "A passage of 1902.")
    assert response.json()["answers"][0]["text"] == "1902"
    assert fakes.tokenizer.texts == 2


async def test_equal_requests_in_flight_cost_one_computation(
    gateway: Gateway, fakes: Fakes
) -> None:
    gate = fakes.shard.faults.hold()
    asked = [asyncio.create_task(gateway.ask("same", "In 1903.")) for _ in range(20)]
    await gateway.until_asked(20)
    gate.set()
    responses = await asyncio.gather(*asked)
    assert {r.json()["answers"][0]["text"] for r in responses} == {"1903"}
    assert sorted(r.json()["cache"] for r in responses) == ["miss"] + ["shared"] * 19
    assert fakes.shard.faults.calls == 1
    assert len({r.json()["request_id"] for r in responses}) == 20


async def test_deadline_reaches_the_services_and_gives_504(gateway: Gateway, fakes: Fakes) -> None:
    fakes.shard.faults.hold()
    for seconds in (0.4, 2.0, 8.0):  # on a busy machine the first may be over at the tokenizer
        response = await gateway.http.post(
            "/v1/qa",
            json={"question": "slow", "context": "In 1904."},
            headers={"X-Request-Timeout": str(seconds)},
        )
        assert response.status_code == 504
        assert response.json()["type"] == "/problems/timeout"
        if fakes.shard.faults.calls:
            break
    assert fakes.shard.faults.remaining[0] is not None
    assert 0 < fakes.shard.faults.remaining[0] < seconds
    await until(lambda: fakes.shard.faults.running == 0)


async def test_a_short_deadline_does_not_shorten_an_equal_request(
    gateway: Gateway, fakes: Fakes
) -> None:
    gate = fakes.shard.faults.hold()
    body = {"question": "patient", "context": "In 1905."}
    hasty, patient = (
        asyncio.create_task(gateway.http.post("/v1/qa", json=body, headers=headers))
        for headers in ({"X-Request-Timeout": "0.3"}, {})
    )
    assert (await hasty).status_code == 504
    gate.set()
    assert (await patient).status_code == 200
    assert (await patient).json()["answers"][0]["text"] == "1905"


async def test_caller_that_goes_away_frees_the_work(gateway: Gateway, fakes: Fakes) -> None:
    fakes.shard.faults.hold()
    leaving = asyncio.create_task(gateway.ask("gone", "In 1906."))
    await until(lambda: fakes.shard.faults.running == 1)
    leaving.cancel()
    await until(lambda: fakes.shard.faults.cancelled == 1)
    assert fakes.shard.faults.running == 0
    await gateway.until_asked(0)


@pytest.mark.parametrize(
    ("code", "status", "slug"),
    [
        (grpc.StatusCode.RESOURCE_EXHAUSTED, 503, "overloaded"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, 504, "timeout"),
        (grpc.StatusCode.INVALID_ARGUMENT, 422, "invalid-request"),
        (grpc.StatusCode.INTERNAL, 502, "service-failed"),
        (grpc.StatusCode.DATA_LOSS, 502, "service-failed"),
    ],
)
@pytest.mark.parametrize("service", ["tokenizer", "shard"])
async def test_failures_of_services_become_problems(
    gateway: Gateway, fakes: Fakes, service: str, code: grpc.StatusCode, status: int, slug: str
) -> None:
    faults = getattr(fakes, service).faults
    faults.codes = [code]
    response = await gateway.ask(f"{code.name} {service}", "In 1907.", no_cache=True)
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["type"] == f"/problems/{slug}"
    assert ("retry-after" in response.headers) == (status == 503)
    assert faults.calls == 1
    if code is grpc.StatusCode.INTERNAL:
        assert "told to fail" not in response.text


async def test_unavailable_is_tried_again(gateway: Gateway, fakes: Fakes) -> None:
    faults = fakes.shard.faults
    # The second time is free; more faults in one request are met while the budget lasts.
    for times in (1, RETRIES):
        faults.calls, faults.request_ids = 0, []
        faults.codes = [grpc.StatusCode.UNAVAILABLE] * times
        response = await gateway.ask(f"{times} times", "In 1908.", no_cache=True)
        assert response.status_code == 200
        assert faults.calls == len(set(faults.request_ids)) == times + 1
    faults.calls = 0
    faults.codes = [grpc.StatusCode.UNAVAILABLE] * (RETRIES + 1)
    response = await gateway.ask("too often", "In 1908.", no_cache=True)
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) >= 1
    assert faults.calls == RETRIES + 1


async def test_more_than_one_retry_takes_a_budget() -> None:
    budget = RetryBudget(reserve=1.0)
    tried: list[float] = []

    async def attempt() -> None:
        tried.append(budget.left)
        raise aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, aio.Metadata(), aio.Metadata())

    for expected in ([1.0, 1.0, 0.0], [0.0, 0.0]):
        with pytest.raises(GatewayError, match="tokenizer"):
            await retried(attempt, "tokenizer", budget=budget)
        assert tried == expected
        tried.clear()
    # Without one, a single retry.
    with pytest.raises(GatewayError):
        await retried(attempt, "tokenizer")
    assert len(tried) == 2


async def test_garbage_from_the_shards_is_no_answer(gateway: Gateway, fakes: Fakes) -> None:
    fakes.shard.faults.garbage = True
    response = await gateway.ask("garbage", "In 1909.")
    assert response.status_code == 502
    fakes.shard.faults.garbage = False
    assert (await gateway.ask("garbage", "In 1909.")).json()["cache"] == "miss"


async def test_ids_and_trace_context_travel(gateway: Gateway, fakes: Fakes) -> None:
    trace = "0af7651916cd43dd8448eb211c80319c"
    response = await gateway.http.post(
        "/v1/qa",
        json={"question": "ids", "context": "In 1910."},
        headers={"X-Request-ID": "mine-1", "traceparent": f"00-{trace}-b7ad6b7169203331-01"},
    )
    assert response.headers["x-request-id"] == response.json()["request_id"] == "mine-1"
    assert response.headers["x-trace-id"] == response.json()["trace_id"] == trace
    assert response.headers["traceparent"].split("-")[1] == trace
    for faults in (fakes.tokenizer.faults, fakes.shard.faults):
        assert faults.metadata[0]["traceparent"].split("-")[1] == trace
        assert faults.request_ids[0].startswith("mine-1~")
    odd = await gateway.http.get("/healthz", headers={"X-Request-ID": "a b<script>"})
    assert odd.headers["x-request-id"].isalnum()


def batch(*questions: str) -> dict[str, object]:
    return {"requests": [{"question": q, "context": "In 1911."} for q in questions]}


async def test_batch_streams_each_result_as_it_is_done(gateway: Gateway, fakes: Fakes) -> None:
    body = batch(*(f"b{i}" for i in range(6)))
    body["requests"][2] = {"question": "", "context": "In 1911.", "top_k": 0}  # type: ignore[index]
    gate = fakes.shard.faults.hold()
    lines = []
    async with gateway.http.stream("POST", "/v1/qa/batch", json=body) as response:
        assert response.headers["content-type"].startswith("application/x-ndjson")
        async for line in response.aiter_lines():
            # The refusal needs no model and is there before any answer.
            lines.append(json.loads(line))
            gate.set()
    assert sorted(line["index"] for line in lines) == list(range(6))
    failed = {line["index"]: line["error"] for line in lines if "error" in line}
    assert list(failed) == [2]
    assert failed[2]["status"] == 422
    pointers = {fault["pointer"] for fault in failed[2]["errors"]}
    assert pointers == {"/requests/2/question", "/requests/2/top_k"}
    assert all(x["response"]["answers"][0]["text"] == "1911" for x in lines if "response" in x)
    assert lines[0]["index"] == 2


async def test_batch_as_server_sent_events(gateway: Gateway, fakes: Fakes) -> None:
    response = await gateway.http.post(
        "/v1/qa/batch", json=batch("s1", "s2"), headers={"Accept": "text/event-stream"}
    )
    assert response.headers["content-type"].startswith("text/event-stream")
    events = [
        dict(line.split(": ", 1) for line in event.splitlines())
        for event in response.text.strip().split("\n\n")
    ]
    assert [event["event"] for event in events] == ["result", "result", "done"]
    assert sorted(json.loads(event["data"])["index"] for event in events[:2]) == [0, 1]


async def test_caller_that_leaves_a_batch_frees_its_work(gateway: Gateway, fakes: Fakes) -> None:
    fakes.shard.faults.hold()
    body = batch(*(f"leave{i}" for i in range(30)))
    leaving = asyncio.create_task(gateway.http.post("/v1/qa/batch", json=body))
    await until(lambda: fakes.shard.faults.running > 0)
    leaving.cancel()
    await until(lambda: not fakes.shard.faults.running)
    await gateway.until_asked(0)
    await asyncio.sleep(0.3)
    # Of what began, all was cancelled, and nothing more begins: it would wait for the gate.
    assert fakes.shard.faults.cancelled > 0
    assert not fakes.shard.faults.running


async def test_too_many_at_once_are_refused_at_once(gateway: Gateway, fakes: Fakes) -> None:
    gate = fakes.shard.faults.hold()
    limits = httpx.Limits(max_connections=100)
    async with httpx.AsyncClient(
        base_url=gateway.url, trust_env=False, limits=limits, timeout=60
    ) as many:
        asked = [
            asyncio.create_task(
                many.post("/v1/qa", json={"question": f"m{i}", "context": "In 1912."})
            )
            for i in range(90)
        ]
        await until(lambda: sum(one.done() for one in asked) >= 90 - 64)
        gate.set()
        responses = await asyncio.gather(*asked)
    refused = [r for r in responses if r.status_code == 503]
    assert {r.status_code for r in responses} == {200, 503}
    assert len(refused) == 90 - 64
    assert all(r.json()["type"] == "/problems/overloaded" for r in refused)
    assert all("retry-after" in r.headers for r in refused)


async def test_readiness_tells_why_not(gateway: Gateway, fakes: Fakes) -> None:
    fakes.shard.fingerprint = "model-2"
    try:
        response = await gateway.ready(False)
        assert response.status_code == 503
        assert "another model" in response.json()["detail"]
        refused = await gateway.ask("unready", "In 1913.")
        assert refused.status_code == 503
        assert (await gateway.http.get("/healthz")).status_code == 200
        (model,) = (await gateway.http.get("/v1/models")).json()["models"]
        assert model["ready"] is False
    finally:
        fakes.shard.fingerprint = "model-1"
        await gateway.ready()
    fakes.shard.status = shard_pb.STAGE_STATUS_WAITING
    try:
        assert "as told" in (await gateway.ready(False)).json()["detail"]
    finally:
        fakes.shard.status = shard_pb.STAGE_STATUS_SERVING
        await gateway.ready()


async def test_a_service_that_is_late_once_stays_in_use(gateway: Gateway, fakes: Fakes) -> None:
    looks = fakes.shard.described
    fakes.shard.describe_delays = [2.0]
    await until(lambda: not fakes.shard.describe_delays)
    for number in range(20):
        assert (await gateway.ask(f"late {number}", "In 1915.")).status_code == 200
        await asyncio.sleep(0.1)
    await until(lambda: fakes.shard.described >= looks + 2)


async def test_a_service_that_stays_silent_is_given_up(gateway: Gateway, fakes: Fakes) -> None:
    fakes.shard.describe_delays = [30.0] * 50
    try:
        response = await gateway.ready(False)
        assert "does not answer in time" in response.json()["detail"]
        # Requests do not queue up behind each other's looks: all but the first would be late each
        # time, and get a 504. Each waits for the service's return as long as its deadline lets it;
        # a busy machine may be late once.
        for _ in range(4):
            responses = await asyncio.gather(
                *(
                    gateway.http.post(
                        "/v1/qa",
                        json={"question": f"s{i}", "context": "In 1916."},
                        headers={"X-Request-Timeout": "4"},
                    )
                    for i in range(10)
                )
            )
            if {r.status_code for r in responses} == {503}:
                break
        assert {r.status_code for r in responses} == {503}
    finally:
        fakes.shard.describe_delays = []
        await gateway.ready()


async def test_models_and_stages(gateway: Gateway, fakes: Fakes) -> None:
    (model,) = (await gateway.http.get("/v1/models")).json()["models"]
    assert model == {
        "name": "fake",
        "fingerprint": "model-1",
        "model_type": "bert",
        "stages": 2,
        "layers": 2,
        "max_length": 128,
        "ready": True,
        "kind": "extractive",
    }
    view = (await gateway.http.get("/v1/pipeline")).json()
    assert view["ready"] is True
    assert [(s["first_layer"], s["end_layer"]) for s in view["stages"]] == [(0, 1), (1, 2)]
    assert view["stages"][0]["wire_dtype"] == "float16"


async def test_metrics_count_routes_answers_and_caches(gateway: Gateway, fakes: Fakes) -> None:
    async def now() -> list[float]:
        return [
            await gateway.metric("http_server_request_duration_seconds_count", http_route="/v1/qa"),
            await gateway.metric("miaotui_gateway_answers_total", outcome="ok", cache="miss"),
            await gateway.metric("miaotui_gateway_answers_total", outcome="ok", cache="hit"),
            await gateway.metric(
                "miaotui_gateway_cache_lookups_total", cache="answer", result="hit"
            ),
            await gateway.metric("miaotui_gateway_hop_duration_seconds_count", hop="stage 1"),
        ]

    before = await now()
    for _ in range(3):
        await gateway.ask("metrics", "In 1914.")
    assert [b - a for a, b in zip(before, await now(), strict=True)] == [3, 1, 2, 2, 1]
    text = (await gateway.http.get("/metrics")).text
    assert "1914" not in text
