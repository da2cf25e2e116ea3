"""Callers that go away free their work at every stage; a full queue pushes back."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Callable

import grpc
import httpx
import pytest
from grpc import aio

from miaotui.v1 import gateway_pb2, gateway_pb2_grpc
from services.rpc.channel import open_channel
from tests.checkpoints import EXAMPLES
from tests.e2e.asking import Question, ask_http, http_client
from tests.e2e.conftest import Checkpoints
from tests.processes import Cluster

QUEUE = 40
AT_ONCE = 100
# More windows than fit into the pipeline at once, fewer than the queue takes.
WINDOWS = 25
# So long a connection may be silent (services/rpc/channel.py), less what noticing it takes.
LOST_SECONDS = 2.5
LONG = Question("How long?", " ".join(passage for _, passage in EXAMPLES) * 20)
SHORT = Question("How short?", "It is a short passage.")


@pytest.fixture(scope="module")
async def cluster(checkpoint: Checkpoints) -> AsyncIterator[Cluster]:
    queue = {"MIAOTUI_SHARD_QUEUE_SEQUENCES": str(QUEUE), "MIAOTUI_SHARD_BATCH_TOKENS": "512"}
    async with Cluster(
        checkpoint("bert"),
        stages=3,
        shard_env=queue,
        gateway_env={
            "MIAOTUI_GATEWAY_REQUEST_TIMEOUT": "60",
            "MIAOTUI_GATEWAY_MAX_CONCURRENT_REQUESTS": str(AT_ONCE),
        },
    ) as cluster:
        yield cluster


@pytest.fixture
async def client(cluster: Cluster) -> AsyncIterator[httpx.AsyncClient]:
    async with http_client(cluster.url) as client:
        yield client


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.02)


async def _until_held(cluster: Cluster, least: int) -> None:
    """Waits until stage 0 holds so many sequences."""
    async with asyncio.timeout(60):
        while await _held(cluster) < least:
            await asyncio.sleep(0.02)


async def _held(cluster: Cluster) -> int:
    told = await cluster.describe(0)
    return int(told.queued_sequences + told.running_sequences)


async def _in_flight(client: httpx.AsyncClient) -> float:
    lines = (await client.get("/metrics")).text.splitlines()
    name = "miaotui_gateway_questions_in_flight"
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


@pytest.mark.parametrize("over", ["http", "grpc"])
async def test_a_caller_that_goes_away_frees_the_work_at_every_stage(
    over: str, cluster: Cluster, client: httpx.AsyncClient
) -> None:
    await ask_http(client, SHORT)
    before = [(await cluster.describe(stage)).sequences_total for stage in range(3)]
    long = Question(LONG.question, LONG.context + over)
    # The last stage stands still: the work stays where it is until it is cancelled.
    cluster.shards[2].signal(signal.SIGSTOP)
    stopped = time.monotonic()
    try:
        async with open_channel(cluster.grpc_target) as channel:
            stub = gateway_pb2_grpc.GatewayServiceStub(channel)
            request = gateway_pb2.AnswerRequest(**long.body)
            call = (
                asyncio.ensure_future(client.post("/v1/qa", json=long.body))
                if over == "http"
                else asyncio.ensure_future(_answer(stub, request))
            )
            await _until_held(cluster, WINDOWS)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            deadline = time.monotonic() + 60
            while True:
                told = await cluster.describe(0)
                if not told.queued_sequences and not await _in_flight(client):
                    break
                assert time.monotonic() < deadline, f"not freed: {told}"
                await asyncio.sleep(0.02)
    finally:
        cluster.shards[2].signal(signal.SIGCONT)
    stood = time.monotonic() - stopped
    await cluster.idle()
    after = [(await cluster.describe(stage)).sequences_total for stage in range(3)]
    computed = [new - old for new, old in zip(after, before, strict=True)]
    # Only what was in the pipeline already: stages + 1 batches, each of two windows at most.
    # A stage that stands still for longer counts as lost, and all of it is computed again.
    assert (computed[2] <= computed[1] <= computed[0] <= 8) or stood > LOST_SECONDS, computed
    assert (await ask_http(client, SHORT))["answers"]


async def _answer(
    stub: gateway_pb2_grpc.GatewayServiceAsyncStub,
    request: gateway_pb2.AnswerRequest,
    timeout: float = 60,
) -> gateway_pb2.AnswerResponse:
    return await stub.Answer(request, timeout=timeout)


async def test_a_full_queue_pushes_back_and_recovers(
    cluster: Cluster, client: httpx.AsyncClient
) -> None:
    count = 2 * QUEUE
    cluster.shards[1].signal(signal.SIGSTOP)
    stopped = time.monotonic()
    try:
        calls = [
            asyncio.ensure_future(
                client.post("/v1/qa", json={**SHORT.body, "context": f"It is short. ({n})"})
            )
            for n in range(count)
        ]
        # Those that found no room are told at once, while the others still wait.
        async with asyncio.timeout(60):
            while await _held(cluster) + sum(call.done() for call in calls) < count:
                await asyncio.sleep(0.02)
        done = [call for call in calls if call.done()]
        waiting = [call for call in calls if not call.done()]
        assert done
        assert waiting
        for call in done:
            response = call.result()
            assert response.status_code == 503, response.text
            overloaded = response.json()["type"] == "/problems/overloaded"
            assert overloaded or time.monotonic() - stopped > LOST_SECONDS, response.text
            assert int(response.headers["retry-after"]) >= 1
        async with open_channel(cluster.grpc_target) as channel:
            stub = gateway_pb2_grpc.GatewayServiceStub(channel)
            with pytest.raises(aio.AioRpcError) as caught:
                await _answer(stub, gateway_pb2.AnswerRequest(**{**SHORT.body, "top_k": 2}), 10)
            exhausted = caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert exhausted or time.monotonic() - stopped > LOST_SECONDS
    finally:
        cluster.shards[1].signal(signal.SIGCONT)
    statuses = [response.status_code for response in await asyncio.gather(*waiting)]
    assert set(statuses) == {200}, "what was accepted is answered"
    assert len(waiting) >= QUEUE
    await cluster.idle()
    for n in range(20):
        assert (await ask_http(client, Question("Again?", f"It works again. ({n})")))["answers"]


async def test_a_deadline_frees_the_work(cluster: Cluster, client: httpx.AsyncClient) -> None:
    cluster.shards[1].signal(signal.SIGSTOP)
    try:
        began = time.monotonic()
        response = await client.post(
            "/v1/qa",
            json={**SHORT.body, "no_cache": True},
            headers={"x-request-timeout": "0.5"},
        )
        assert response.status_code == 504, response.text
        assert 0.4 < time.monotonic() - began < 25
    finally:
        cluster.shards[1].signal(signal.SIGCONT)
    await cluster.idle()
    assert (await ask_http(client, SHORT))["answers"]


async def test_more_requests_than_the_gateway_takes(
    cluster: Cluster, client: httpx.AsyncClient
) -> None:
    cluster.tokenizer.signal(signal.SIGSTOP)
    try:
        calls = [
            asyncio.ensure_future(
                client.post("/v1/qa", json={**SHORT.body, "context": f"It is too much. ({n})"})
            )
            for n in range(AT_ONCE + 10)
        ]
        await _until(lambda: sum(call.done() for call in calls) >= 10)
        waiting = [call for call in calls if not call.done()]
    finally:
        cluster.tokenizer.signal(signal.SIGCONT)
    assert {call.result().status_code for call in calls if call not in waiting} == {503}
    assert len(waiting) == AT_ONCE
    # Now they meet the queue, which takes fewer.
    statuses = [response.status_code for response in await asyncio.gather(*waiting)]
    assert set(statuses) <= {200, 503}
    assert statuses.count(200) >= QUEUE
    await cluster.idle()
    assert (await ask_http(client, SHORT))["answers"]
