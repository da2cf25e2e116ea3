"""Many calls on one stream, over a real socket: answers, deadlines, cancellation, breaks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio
from grpc import aio

from miaotui.v1 import calls_pb2
from miaotui.v1 import tokenizer_pb2 as pb
from miaotui.v1 import tokenizer_pb2_grpc as pb_grpc
from services.rpc.calls import CallServer, CallStream
from services.rpc.channel import call, open_channel
from services.rpc.server import RpcServer


class Echo:
    """A service whose only handler answers, waits, refuses or fails, as the question says."""

    def __init__(self) -> None:
        self.running = 0
        self.cancelled = 0
        self.go = asyncio.Event()
        """Lets those go on that were asked to hold."""
        self.seen: list[tuple[float | None, dict[str, str]]] = []
        self.calls = CallServer(
            "miaotui.v1.TokenizerService/Encode",
            self.handle,
            lambda status, response: pb.EncodeStreamResponse(call=status, response=response),
        )
        self.server = RpcServer("miaotui.v1.TokenizerService")
        handler: Any = grpc.stream_stream_rpc_method_handler(
            self.calls.serve,
            request_deserializer=pb.EncodeStreamRequest.FromString,
            response_serializer=pb.EncodeStreamResponse.SerializeToString,
        )
        generic = grpc.method_handlers_generic_handler(
            "miaotui.v1.TokenizerService", {"EncodeStream": handler}
        )
        self.server.aio.add_generic_rpc_handlers((generic,))

    async def handle(self, request: pb.EncodeRequest, context: Any) -> pb.EncodeResponse:
        self.seen.append((context.time_remaining(), dict(context.invocation_metadata())))
        self.running += 1
        try:
            if request.question == "wait":
                await asyncio.sleep(300)
            if request.question == "hold":
                await self.go.wait()
            if request.question == "refuse":
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "question: not that one")
            if request.question == "fail":
                raise RuntimeError(request.text)
            await asyncio.sleep(len(request.question) / 1000)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        return pb.EncodeResponse(passage=pb.TokenizedText(fingerprint=request.question))


@pytest_asyncio.fixture
async def echo() -> AsyncIterator[Echo]:
    echo = Echo()
    await echo.server.start("127.0.0.1:0")
    yield echo
    await echo.calls.drain(0)
    await echo.server.stop(0)


@pytest_asyncio.fixture
async def stream(echo: Echo) -> AsyncIterator[CallStream[pb.EncodeRequest, pb.EncodeResponse]]:
    async with open_channel(f"127.0.0.1:{echo.server.port}") as channel:
        stub = pb_grpc.TokenizerServiceStub(channel)
        calls: CallStream[pb.EncodeRequest, pb.EncodeResponse] = CallStream(
            stub.EncodeStream,
            lambda header, request: pb.EncodeStreamRequest(call=header, request=request),
        )
        yield calls
        calls.close()


Stream = CallStream[pb.EncodeRequest, pb.EncodeResponse]


async def _until(condition: Any) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


async def test_answers_find_their_calls_in_any_order(echo: Echo, stream: Stream) -> None:
    questions = ["x" * (1 + (n * 7) % 40) for n in range(200)]
    answers = await asyncio.gather(
        *(stream(pb.EncodeRequest(question=q), timeout=60) for q in questions)
    )
    assert [answer.passage.fingerprint for answer in answers] == questions
    assert echo.running == 0


async def test_deadline_and_trace_travel_with_each_call(echo: Echo, stream: Stream) -> None:
    trace = f"00-{7:032x}-{9:016x}-00"
    await stream(pb.EncodeRequest(question="q"), timeout=50, metadata=(("traceparent", trace),))
    await stream(pb.EncodeRequest(question="q"))
    (left, metadata), (unlimited, nothing) = echo.seen
    assert left is not None
    assert 20 < left <= 50
    assert metadata == {"traceparent": trace}
    assert unlimited is None
    assert nothing == {}


async def test_refusals_and_failures_are_statuses(echo: Echo, stream: Stream) -> None:
    with pytest.raises(aio.AioRpcError) as refused:
        await call(stream, pb.EncodeRequest(question="refuse"), name="s/M", timeout=60)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.value.details() == "question: not that one"
    with pytest.raises(aio.AioRpcError) as failed:
        await stream(pb.EncodeRequest(question="fail", text="a secret"), timeout=60)
    assert failed.value.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in str(failed.value.details())
    assert (await stream(pb.EncodeRequest(question="on"), timeout=60)).passage.fingerprint == "on"


async def test_a_deadline_ends_the_work(echo: Echo, stream: Stream) -> None:
    for seconds in (0.1, 2.0, 8.0):  # on a busy machine the first may be over on its way
        with pytest.raises(aio.AioRpcError) as late:
            await stream(pb.EncodeRequest(question="wait"), timeout=seconds)
        assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        if echo.seen:
            break
    await _until(lambda: echo.cancelled == len(echo.seen) > 0 and echo.running == 0)


async def test_cancelling_one_call_leaves_the_others(echo: Echo, stream: Stream) -> None:
    waiting = asyncio.ensure_future(stream(pb.EncodeRequest(question="wait"), timeout=60))
    other = asyncio.ensure_future(stream(pb.EncodeRequest(question="hold"), timeout=60))
    await _until(lambda: echo.running == 2)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await _until(lambda: echo.cancelled == 1)
    echo.go.set()
    assert (await other).passage.fingerprint == "hold"


async def test_a_broken_stream_fails_its_calls_and_opens_anew(echo: Echo, stream: Stream) -> None:
    waiting = asyncio.ensure_future(stream(pb.EncodeRequest(question="wait"), timeout=60))
    await _until(lambda: echo.running == 1)
    stream.close()
    with pytest.raises(aio.AioRpcError) as broken:
        await waiting
    assert broken.value.code() is grpc.StatusCode.UNAVAILABLE
    await _until(lambda: echo.cancelled == 1)
    assert (await stream(pb.EncodeRequest(question="q"), timeout=60)).passage.fingerprint == "q"


async def test_draining_finishes_open_calls_and_refuses_new_ones(
    echo: Echo, stream: Stream
) -> None:
    open_call = asyncio.ensure_future(stream(pb.EncodeRequest(question="hold"), timeout=60))
    await _until(lambda: echo.running == 1)
    draining = asyncio.ensure_future(echo.calls.drain(60))
    await asyncio.sleep(0.02)
    with pytest.raises(aio.AioRpcError) as refused:
        await stream(pb.EncodeRequest(question="q"), timeout=60)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    echo.go.set()
    assert (await open_call).passage.fingerprint == "hold"
    await draining


async def test_nobody_there(stream: Stream) -> None:
    async with open_channel("127.0.0.1:1") as channel:
        stub = pb_grpc.TokenizerServiceStub(channel)
        lost: Stream = CallStream(
            stub.EncodeStream,
            lambda header, request: pb.EncodeStreamRequest(call=header, request=request),
        )
        with pytest.raises(aio.AioRpcError) as error:
            await lost(pb.EncodeRequest(question="q"), timeout=60)
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_call_id_may_not_be_used_twice(echo: Echo) -> None:
    async with open_channel(f"127.0.0.1:{echo.server.port}") as channel:
        opened = pb_grpc.TokenizerServiceStub(channel).EncodeStream()
        for _ in range(2):
            await opened.write(
                pb.EncodeStreamRequest(
                    call=calls_pb2.CallHeader(call_id=1), request=pb.EncodeRequest(question="wait")
                )
            )
        assert await opened.code() is grpc.StatusCode.INVALID_ARGUMENT
