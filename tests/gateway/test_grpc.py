"""GatewayService over a real channel."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, TypeAlias

import grpc
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from miaotui.v1 import gateway_pb2 as pb
from miaotui.v1 import gateway_pb2_grpc
from miaotui.v1 import tokenizer_pb2 as tokenizer_pb
from services.rpc.channel import open_channel
from tests.gateway.conftest import Gateway, until
from tests.gateway.fakes import Fakes


@pytest.fixture
async def channel(gateway: Gateway) -> AsyncIterator[aio.Channel]:
    async with open_channel(gateway.grpc_target) as channel:
        yield channel


@pytest.fixture
def stub(channel: aio.Channel) -> gateway_pb2_grpc.GatewayServiceAsyncStub:
    return gateway_pb2_grpc.GatewayServiceStub(channel)


Stub: TypeAlias = "gateway_pb2_grpc.GatewayServiceAsyncStub"


async def test_answer(stub: Stub, gateway: Gateway, fakes: Fakes) -> None:
    request = pb.AnswerRequest(question="When, by gRPC?", context="在1940年。", top_k=2)
    first = await stub.Answer(request)
    assert first.answers[0].text == "1940"
    assert (first.answers[0].start, first.answers[0].end) == (1, 5)
    assert len(first.answers) == 2
    assert first.cache == pb.CACHE_STATUS_MISS
    assert first.timings[0].hop == "cache"
    assert len(first.trace_id) == 32
    # The cache is the one that HTTP uses.
    over_http = await gateway.ask("When, by gRPC?", "在1940年。", top_k=2)
    assert over_http.json()["cache"] == "hit"
    assert (await stub.Answer(request)).cache == pb.CACHE_STATUS_HIT


@pytest.mark.parametrize(
    ("request_", "place"),
    [
        (pb.AnswerRequest(question="", context="In 1941."), "/question"),
        (pb.AnswerRequest(question="q", context=" "), "/context"),
        (pb.AnswerRequest(question="q\0", context="c"), "/question"),
        (pb.AnswerRequest(question="q", context="c", top_k=51), "/top_k"),
        (pb.AnswerRequest(question="q", context="c", max_answer_length=600), "/max_answer_length"),
        (
            pb.AnswerRequest(question="q", context="c", no_answer_threshold=float("nan")),
            "/no_answer_threshold",
        ),
        (
            pb.AnswerRequest(
                question="q",
                context="c",
                text_options=tokenizer_pb.TextOptions(normalization=9),  # type: ignore[arg-type]
            ),
            "/text_options/normalization",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_requests_that_are_not_valid(
    stub: Stub, request_: pb.AnswerRequest, place: str
) -> None:
    with pytest.raises(aio.AioRpcError) as caught:
        await stub.Answer(request_)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert f"{place}:" in (caught.value.details() or "")


@pytest.mark.parametrize("method", ["Answer", "AnswerBatch"])
@pytest.mark.parametrize("data", [b"\xff" * 64, b"\x0a\x05ab", b"\x0a\x02\xff\xfe"])
async def test_bytes_that_are_no_message(
    channel: aio.Channel, gateway: Gateway, method: str, data: bytes
) -> None:
    path = f"/miaotui.v1.GatewayService/{method}"
    untyped: Any = channel
    with pytest.raises(aio.AioRpcError) as caught:
        if method == "Answer":
            await untyped.unary_unary(path)(data)
        else:
            _ = [item async for item in untyped.unary_stream(path)(data)]
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "Traceback" not in gateway.process.log


async def test_deadline_and_cancellation_reach_the_shard(stub: Stub, fakes: Fakes) -> None:
    faults = fakes.shard.faults
    faults.hold()
    request = pb.AnswerRequest(question="slow by gRPC", context="In 1942.")
    for seconds in (0.3, 2.0, 8.0):  # on a busy machine the first may be over at the tokenizer
        with pytest.raises(aio.AioRpcError) as caught:
            await stub.Answer(request, timeout=seconds)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        if faults.calls:
            break
    await until(lambda: faults.cancelled == 1)
    call = stub.Answer(request)
    await until(lambda: faults.running == 1)
    call.cancel()
    await until(lambda: faults.cancelled == 2)
    assert (faults.calls, faults.running) == (2, 0)


async def test_overload_names_a_pause(stub: Stub, fakes: Fakes) -> None:
    fakes.shard.faults.codes = [grpc.StatusCode.RESOURCE_EXHAUSTED]
    with pytest.raises(aio.AioRpcError) as caught:
        await stub.Answer(pb.AnswerRequest(question="full", context="In 1943."))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    trailing = dict(caught.value.trailing_metadata())
    assert int(trailing["grpc-retry-pushback-ms"]) >= 1000


async def test_batch(stub: Stub, fakes: Fakes) -> None:
    requests = [pb.AnswerRequest(question=f"g{i}", context="In 1944.") for i in range(5)]
    requests[3].top_k = 99
    seen = {}
    async for item in stub.AnswerBatch(pb.AnswerBatchRequest(requests=requests)):
        seen[item.index] = item
    assert sorted(seen) == [0, 1, 2, 3, 4]
    assert seen[3].error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert "/requests/3/top_k" in seen[3].error.message
    assert seen[4].response.answers[0].text == "1944"
    with pytest.raises(aio.AioRpcError) as caught:
        async for _ in stub.AnswerBatch(pb.AnswerBatchRequest()):
            pass
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_models_health_and_reflection(stub: Stub, channel: aio.Channel, fakes: Fakes) -> None:
    (model,) = (await stub.ListModels(pb.ListModelsRequest())).models
    assert (model.name, model.stages, model.ready) == ("fake", 2, True)
    health: Any = health_pb2_grpc.HealthStub(channel)
    reply = await health.Check(health_pb2.HealthCheckRequest(service="miaotui.v1.GatewayService"))
    assert reply.status == health_pb2.HealthCheckResponse.SERVING
    reflection: Any = reflection_pb2_grpc
    reflect = reflection.ServerReflectionStub(channel).ServerReflectionInfo
    asked = reflection_pb2.ServerReflectionRequest(list_services="")
    async for answer in reflect(iter([asked])):
        names = {service.name for service in answer.list_services_response.service}
        assert "miaotui.v1.GatewayService" in names
        break
