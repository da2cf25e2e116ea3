"""Many streamed calls on one stream, over a real socket: order, merging, ends, breaks."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import grpc
import numpy as np
import pytest
import pytest_asyncio
from grpc import aio

from miaotui.v1 import calls_pb2
from miaotui.v1 import shard_pb2 as pb
from miaotui.v1 import shard_pb2_grpc as pb_grpc
from services.rpc import streaming
from services.rpc.calls import CallContext, CallError
from services.rpc.channel import open_channel
from services.rpc.server import RpcServer
from services.rpc.streaming import ServerStreamCalls
from services.rpc.streaming_server import Outlet, SingleCall, StreamedCallServer

SERVICE = "miaotui.v1.ShardService"
# A call for so many numbers fails after the last.
FAILS = 1013


def _response(*tokens: int, index: int = 0) -> pb.GenerateResponse:
    ids = np.asarray(tokens, "<i4").tobytes()
    return pb.GenerateResponse(deltas=[pb.TextDelta(index=index, token_ids=ids)])


def _tokens(responses: list[pb.GenerateResponse]) -> list[int]:
    deltas = [delta for response in responses for delta in response.deltas]
    return [int(token) for d in deltas for token in np.frombuffer(d.token_ids, "<i4")]


class Counter:
    """Counts up to `max_tokens`, a number every `tick`, for all of its calls at once."""

    def __init__(self) -> None:
        self.calls: dict[int, tuple[Outlet, int, int]] = {}
        self.seen: list[tuple[float | None, dict[str, str]]] = []
        self.cancelled: list[int] = []
        self.tick = 0.005
        self.ticks = math.inf
        """How many are still to come."""
        self._started = 0
        self.streamed = StreamedCallServer(
            f"{SERVICE}/Generate", self.start, pb.GenerateStreamResponse
        )
        self.messages = 0
        self.server = RpcServer(SERVICE)
        handlers: dict[str, Any] = {
            "GenerateStream": grpc.stream_stream_rpc_method_handler(
                self._stream,
                request_deserializer=pb.GenerateStreamRequest.FromString,
                response_serializer=pb.GenerateStreamResponse.SerializeToString,
            ),
            "Generate": grpc.unary_stream_rpc_method_handler(
                self._single,
                request_deserializer=pb.GenerateRequest.FromString,
                response_serializer=pb.GenerateResponse.SerializeToString,
            ),
        }
        generic = grpc.method_handlers_generic_handler(SERVICE, handlers)
        self.server.aio.add_generic_rpc_handlers((generic,))

    async def _stream(self, frames: Any, context: Any) -> None:
        write = context.write

        class Counted:
            async def write(_, message: Any) -> None:
                self.messages += 1
                await write(message)

            abort = context.abort

        await self.streamed.serve(frames, Counted())

    async def _single(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[Any]:
        call = SingleCall()
        call.cancel = self.start(request, CallContext(calls_pb2.CallHeader()), call)
        context.add_done_callback(lambda _: call.cancel())
        try:
            async for response in call:
                yield response
        except CallError as error:
            await context.abort(error.code, error.details)

    def start(
        self, request: pb.GenerateRequest, context: Any, outlet: Outlet
    ) -> Callable[[], None]:
        self.seen.append((context.time_remaining(), dict(context.invocation_metadata())))
        if request.request_id == "refuse":
            raise CallError(grpc.StatusCode.INVALID_ARGUMENT, "not that one")
        if request.request_id == "fail":
            raise RuntimeError("a secret")
        number = self._started
        self._started += 1
        if request.request_id == "flood":
            for n in range(streaming.MAX_WAITING + 2):
                outlet.send(_response(n))
        self.calls[number] = (outlet, 0, request.max_tokens)

        def cancel() -> None:
            if self.calls.pop(number, None) is not None:
                self.cancelled.append(number)

        return cancel

    async def run(self) -> None:
        while True:
            await asyncio.sleep(self.tick)
            if self.ticks <= 0:
                continue
            self.ticks -= 1
            for number, (outlet, count, most) in list(self.calls.items()):
                outlet.send(_response(count))
                self.calls[number] = (outlet, count + 1, most)
                if count + 1 == most:
                    del self.calls[number]
                    outlet.end(None if most != FAILS else CallError(grpc.StatusCode.INTERNAL, "!"))


@pytest_asyncio.fixture
async def counter() -> AsyncIterator[Counter]:
    counter = Counter()
    await counter.server.start("127.0.0.1:0")
    running = asyncio.create_task(counter.run())
    yield counter
    running.cancel()
    await counter.streamed.drain(0)
    await counter.server.stop(0)


Calls = ServerStreamCalls[pb.GenerateRequest, pb.GenerateResponse]


def _calls(channel: aio.Channel) -> Calls:
    return ServerStreamCalls(
        pb_grpc.ShardServiceStub(channel).GenerateStream,
        lambda header, request: pb.GenerateStreamRequest(call=header, request=request),
    )


@pytest_asyncio.fixture
async def calls(counter: Counter) -> AsyncIterator[Calls]:
    async with open_channel(f"127.0.0.1:{counter.server.port}") as channel:
        made = _calls(channel)
        yield made
        made.close()


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(120):
        while not condition():
            await asyncio.sleep(0.01)


def _request(tokens: int, request_id: str = "") -> pb.GenerateRequest:
    return pb.GenerateRequest(request_id=request_id, max_tokens=tokens)


async def _all(calls: Calls, tokens: int, request_id: str = "", **kwargs: Any) -> list[int]:
    call = calls(_request(tokens, request_id), **kwargs)
    return _tokens([response async for response in call])


async def _collect(
    call: AsyncIterator[pb.GenerateResponse], into: list[pb.GenerateResponse]
) -> None:
    """Keeps what came before an error, too."""
    async for response in call:
        into.append(response)  # noqa: PERF401


async def test_every_call_gets_its_own_responses_in_order(counter: Counter, calls: Calls) -> None:
    lengths = [1 + (n * 7) % 40 for n in range(100)]
    counter.ticks = 0
    reading = asyncio.gather(*(_all(calls, n, timeout=60) for n in lengths))
    await _until(lambda: len(counter.calls) == 100)
    counter.ticks = math.inf
    texts = await reading
    assert texts == [list(range(n)) for n in lengths]
    assert not counter.calls
    # What all calls got in one turn went out together.
    assert counter.messages <= 3 * 40 < sum(lengths) // 10


async def test_deadline_and_trace_travel_with_each_call(counter: Counter, calls: Calls) -> None:
    trace = f"00-{7:032x}-{9:016x}-00"
    await _all(calls, 1, timeout=50, metadata=(("traceparent", trace),))
    await _all(calls, 1)
    (left, metadata), (unlimited, nothing) = counter.seen
    assert left is not None
    assert 20 < left <= 50
    assert metadata == {"traceparent": trace}
    assert (unlimited, nothing) == (None, {})


@pytest.mark.parametrize(
    ("name", "tokens", "code"),
    [
        ("refuse", 1, grpc.StatusCode.INVALID_ARGUMENT),
        ("fail", 1, grpc.StatusCode.INTERNAL),
        ("flood", 1, grpc.StatusCode.RESOURCE_EXHAUSTED),
    ],
)
async def test_refusals_and_failures_are_statuses(
    name: str, tokens: int, code: grpc.StatusCode, counter: Counter, calls: Calls
) -> None:
    with pytest.raises(aio.AioRpcError) as caught:
        await _all(calls, tokens, name, timeout=60)
    assert caught.value.code() is code
    assert "secret" not in str(caught.value.details())
    await _until(lambda: not counter.calls)
    assert await _all(calls, 3, timeout=60) == [0, 1, 2]


async def test_what_came_before_an_error_is_not_lost(counter: Counter, calls: Calls) -> None:
    counter.tick = 0.0005
    got: list[pb.GenerateResponse] = []
    with pytest.raises(aio.AioRpcError) as caught:
        await _collect(calls(_request(FAILS), timeout=60), got)
    assert _tokens(got) == list(range(FAILS))
    assert caught.value.code() is grpc.StatusCode.INTERNAL


async def test_a_deadline_ends_the_work(counter: Counter, calls: Calls) -> None:
    for seconds in (0.2, 2.0, 8.0):  # on a busy machine the first may be over too early
        got: list[pb.GenerateResponse] = []
        with pytest.raises(aio.AioRpcError) as late:
            await _collect(calls(_request(0), timeout=seconds), got)
        assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        if len(_tokens(got)) >= 3:
            break
    assert _tokens(got)[:3] == [0, 1, 2]
    await _until(lambda: len(counter.cancelled) > 0 and not counter.calls)


@pytest.mark.parametrize("how", ["close", "task", "block"])
async def test_cancelling_one_call_leaves_the_others(
    how: str, counter: Counter, calls: Calls
) -> None:
    counter.ticks = 10  # so that the other one is not over before this one is cancelled
    other = asyncio.ensure_future(_all(calls, 60, timeout=60))
    if how == "task":
        task = asyncio.ensure_future(_all(calls, 0, timeout=60))
        await _until(lambda: len(counter.calls) == 2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    elif how == "close":
        call = calls(_request(0), timeout=60)
        await _until(lambda: len(counter.calls) == 2)
        counter.ticks = 10
        await anext(call)
        await call.aclose()
        with pytest.raises(aio.AioRpcError) as caught:
            await anext(call)
        assert caught.value.code() is grpc.StatusCode.CANCELLED
    else:
        async with calls(_request(0), timeout=60) as call:
            await _until(lambda: len(counter.calls) == 2)
            counter.ticks = 10
            async for _ in call:
                break
    await _until(lambda: len(counter.cancelled) == 1)
    counter.ticks = math.inf
    assert await other == list(range(60))
    assert not counter.calls


async def test_a_broken_stream_fails_its_calls_and_opens_anew(
    counter: Counter, calls: Calls
) -> None:
    waiting = [asyncio.ensure_future(_all(calls, 0, timeout=60)) for _ in range(3)]
    await _until(lambda: len(counter.calls) == 3)
    calls.close()
    for call in waiting:
        with pytest.raises(aio.AioRpcError) as broken:
            await call
        assert broken.value.code() is grpc.StatusCode.UNAVAILABLE
    await _until(lambda: sorted(counter.cancelled) == [0, 1, 2])
    assert await _all(calls, 2, timeout=60) == [0, 1]


async def test_draining_finishes_open_calls_and_refuses_new_ones(
    counter: Counter, calls: Calls
) -> None:
    counter.ticks = 0
    open_call = asyncio.ensure_future(_all(calls, 60, timeout=60))
    await _until(lambda: len(counter.calls) == 1)
    draining = asyncio.ensure_future(counter.streamed.drain(60))
    await asyncio.sleep(0.02)
    with pytest.raises(aio.AioRpcError) as refused:
        await _all(calls, 1, timeout=60)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    counter.ticks = math.inf
    assert await open_call == list(range(60))
    await draining


async def test_nobody_there() -> None:
    async with open_channel("127.0.0.1:1") as channel:
        with pytest.raises(aio.AioRpcError) as error:
            await _all(_calls(channel), 1, timeout=60)
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_reader_that_stands_still_gets_merged_news_and_holds_nobody_up(
    counter: Counter, calls: Calls
) -> None:
    counter.tick = 0.0005
    async with open_channel(f"127.0.0.1:{counter.server.port}") as channel:
        still = pb_grpc.ShardServiceStub(channel).GenerateStream()
        for call_id in range(1, 201):
            header = calls_pb2.CallHeader(call_id=call_id)
            await still.write(pb.GenerateStreamRequest(call=header, request=_request(1500)))
        await _until(lambda: len(counter.calls) == 200)
        # HTTP/2's window fills, and the server stops writing to the one that does not read.
        assert await _all(calls, 20, timeout=60) == list(range(20))
        await _until(lambda: not counter.calls)
        texts: dict[int, list[pb.GenerateResponse]] = {n: [] for n in range(1, 201)}
        ended = 0
        while ended < 200:
            message: Any = await still.read()
            for update in message.updates:
                texts[update.call_id].append(update.response)
                ended += update.HasField("ended")
    assert all(_tokens(text) == list(range(1500)) for text in texts.values())
    assert any(len(response.deltas) > 1 for text in texts.values() for response in text)


async def test_a_reader_that_takes_its_time_is_behind_by_one_response(
    counter: Counter, calls: Calls
) -> None:
    counter.ticks = 0
    call = calls(_request(30), timeout=60)
    await _until(lambda: len(counter.calls) == 1)
    counter.ticks = 1
    got = [await anext(call)]
    counter.ticks = math.inf
    await _until(lambda: not counter.calls)
    await _all(calls, 1, timeout=60)  # what the first call was sent is here, too
    await _collect(call, got)
    assert len(got) == 2
    assert _tokens(got) == list(range(30))


async def test_a_slow_reader_of_one_call_loses_only_that_call(
    counter: Counter, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter.ticks = 0
    slow = calls(_request(0), timeout=60)
    await _until(lambda: len(counter.calls) == 1)
    counter.ticks = 1
    first = await anext(slow)
    monkeypatch.setattr(streaming, "MAX_WAITING", 5)
    counter.ticks = math.inf
    await _until(lambda: counter.cancelled == [0])
    got: list[pb.GenerateResponse] = []
    with pytest.raises(aio.AioRpcError) as caught:
        await _collect(slow, got)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert len(got) == 1  # what waited is one, merged
    waited = len(got[0].deltas)  # of five responses, some of which may be merged already
    assert waited >= 5
    assert _tokens([first, *got]) == list(range(1 + waited))
    assert await _all(calls, 3, timeout=60) == [0, 1, 2]


async def test_a_client_that_sends_no_more_gets_the_rest(counter: Counter) -> None:
    async with open_channel(f"127.0.0.1:{counter.server.port}") as channel:
        opened = pb_grpc.ShardServiceStub(channel).GenerateStream()
        header = calls_pb2.CallHeader(call_id=4)
        await opened.write(pb.GenerateStreamRequest(call=header, request=_request(9)))
        await opened.done_writing()
        got = [update async for message in opened for update in message.updates]
        assert _tokens([update.response for update in got]) == list(range(9))
        assert got[-1].ended.call_id == 4
        assert await opened.code() is grpc.StatusCode.OK


async def test_a_call_id_may_not_be_used_twice(counter: Counter) -> None:
    async with open_channel(f"127.0.0.1:{counter.server.port}") as channel:
        opened = pb_grpc.ShardServiceStub(channel).GenerateStream()
        for _ in range(2):
            header = calls_pb2.CallHeader(call_id=1)
            await opened.write(pb.GenerateStreamRequest(call=header, request=_request(0)))
        # A stream's status comes after its messages: who does not read them waits for ever.
        with suppress(aio.AioRpcError):
            async for _ in opened:
                pass
        assert await opened.code() is grpc.StatusCode.INVALID_ARGUMENT
        await _until(lambda: not counter.calls)


async def test_the_plain_method_streams_fails_and_is_cancelled(counter: Counter) -> None:
    async with open_channel(f"127.0.0.1:{counter.server.port}") as channel:
        stub = pb_grpc.ShardServiceStub(channel)
        counter.tick = 0.0005
        assert _tokens([r async for r in stub.Generate(_request(30))]) == list(range(30))
        with pytest.raises(aio.AioRpcError) as caught:
            _ = [r async for r in stub.Generate(_request(FAILS))]
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        endless = stub.Generate(_request(0))
        async for _ in endless:
            break
        endless.cancel()
        await _until(lambda: not counter.calls)
