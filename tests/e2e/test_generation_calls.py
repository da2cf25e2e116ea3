"""Calls for text that are refused, late, cancelled, drawn by chance, or open at a shutdown."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import pytest
from grpc import aio

from miaotui.v1 import shard_pb2 as pb
from miaotui.v1 import shard_pb2_grpc as pb_grpc
from miaotui.v1.tensor_pb2 import DTYPE_FLOAT32, TensorHeader
from services.rpc.channel import open_channel
from tests.decoder_checkpoints import make_decoder
from tests.e2e.conftest import Checkpoints
from tests.e2e.generating import (
    Client,
    Prompt,
    client_of,
    collect,
    until_free,
    until_serving,
)
from tests.processes import Cluster

PROMPT = Prompt((1, 20, 30, 40), 60, stops=())


@pytest.fixture(scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    model = make_decoder(tmp_path_factory.mktemp("calls") / "qwen3", "qwen3", layers=2)
    async with Cluster(model, stages=2, only_shards=True) as cluster:
        yield cluster


@pytest.fixture
async def client(cluster: Cluster) -> AsyncIterator[Client]:
    async with client_of(cluster) as client:
        yield client


async def _refused(call: Any) -> aio.AioRpcError:
    with pytest.raises(aio.AioRpcError) as caught:
        await call
    return caught.value


async def test_requests_that_cannot_be_are_refused(client: Client) -> None:
    ids = np.asarray([1, 5], "<i4").tobytes()
    for request, field in (
        (pb.GenerateRequest(), "input_ids"),
        (pb.GenerateRequest(input_ids=b"abc"), "input_ids"),
        (pb.GenerateRequest(input_ids=np.asarray([640], "<i4").tobytes()), "input_ids"),
        (pb.GenerateRequest(input_ids=np.ones(512, "<i4").tobytes()), "input_ids"),
        (pb.GenerateRequest(input_ids=ids, sampling=pb.SamplingParams(min_p=2)), "sampling.min_p"),
        (
            pb.GenerateRequest(
                input_ids=ids,
                features=pb.Features(
                    header=TensorHeader(dtype=DTYPE_FLOAT32, shape=[1]), data=bytes(4)
                ),
            ),
            "features",
        ),
    ):
        for ask in (client.plain, client.streamed):
            error = await _refused(ask(request))
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert (error.details() or "").startswith(f"{field}: ")


async def test_the_wrong_kind_of_call_says_which_is_right(
    cluster: Cluster, client: Client, checkpoint: Checkpoints
) -> None:
    error = await _refused(client.stub.Infer(pb.InferRequest(request_id="r")))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "Generate" in (error.details() or "")
    async with open_channel(cluster.stage_targets[1]) as channel:
        stub: Any = pb_grpc.ShardServiceStub(channel)
        error = await _refused(collect(stub.Generate(PROMPT.request())))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "stage 0" in (error.details() or "")
    async with (
        Cluster(checkpoint("bert"), stages=1, only_shards=True) as bert,
        client_of(bert) as other,
    ):
        for ask in (other.plain, other.streamed):
            error = await _refused(ask(PROMPT.request()))
            assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert "Infer" in (error.details() or "")


@pytest.mark.parametrize("how", ["plain", "streamed"])
async def test_a_deadline_or_a_cancel_frees_everything_at_once(
    how: str, cluster: Cluster, client: Client
) -> None:
    def start(timeout: float) -> Any:
        call = client.stub.Generate if how == "plain" else client.calls
        return call(PROMPT.request(), timeout=timeout)

    async def deadline() -> None:
        error = await _refused(collect(start(0.4)))
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED

    async def cancel() -> None:
        call = start(60)
        reading = asyncio.ensure_future(collect(call))
        try:
            async with asyncio.timeout(5):
                while not (await cluster.describe(0)).kv_blocks_used:
                    await asyncio.sleep(0.01)
        finally:
            reading.cancel()
            await asyncio.wait([reading])
            call.cancel()

    for end in (deadline, cancel):
        # At once: before the stage that stands still counts as lost. A busy machine may take too
        # long a few times.
        for left in reversed(range(5)):
            await until_serving(cluster)
            cluster.shards[1].signal(signal.SIGSTOP)
            try:
                await end()
                await until_free(cluster, timeout=1.0)
                break
            except (AssertionError, TimeoutError):
                if not left:
                    raise
            finally:
                cluster.shards[1].signal(signal.SIGCONT)
    assert len((await client.streamed(PROMPT.request())).tokens) == 60


async def test_text_i_of_n_is_drawn_with_seed_plus_i(client: Client) -> None:
    def request(seed: int, n: int) -> pb.GenerateRequest:
        sampling = pb.SamplingParams(temperature=1.0, seed=seed, logprobs=2)
        return PROMPT.request(sampling=sampling, n=n)

    texts: dict[int, list[int]] = {}
    logprobs: dict[int, int] = {}
    usage = None
    async for response in client.calls(request(7, 3), timeout=60):
        for delta in response.deltas:
            texts.setdefault(delta.index, []).extend(np.frombuffer(delta.token_ids, "<i4").tolist())
            logprobs[delta.index] = logprobs.get(delta.index, 0) + len(delta.logprobs)
        usage = response.usage
    assert sorted(texts) == [0, 1, 2]
    assert len({tuple(text) for text in texts.values()}) == 3
    for index in range(3):
        alone = await client.plain(request(7 + index, 1))
        assert alone.tokens == texts[index]
        assert logprobs[index] == len(texts[index])
    assert usage is not None
    assert usage.completion_tokens == 180


async def test_a_shutdown_lets_open_texts_end_and_takes_no_new_ones(
    cluster: Cluster, client: Client
) -> None:
    long = Prompt((1, 9), 400, stops=())
    call = client.calls(long.request(), timeout=120)
    first = await anext(call)
    # So that the text is not over before all of this is.
    cluster.shards[1].signal(signal.SIGSTOP)
    try:
        cluster.shards[0].ask_to_stop()
        while (await cluster.describe(0)).status != pb.STAGE_STATUS_DRAINING:
            await asyncio.sleep(0.005)
        error = await _refused(client.streamed(PROMPT.request()))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
    finally:
        cluster.shards[1].signal(signal.SIGCONT)

    async def responses() -> AsyncIterator[pb.GenerateResponse]:
        yield first
        async for response in call:
            yield response

    assert len((await collect(responses())).tokens) == 400
    assert await asyncio.to_thread(cluster.shards[0].wait) == 0
