"""A lane's link to the next stage, which the test plays."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio
from grpc import aio

from miaotui.v1 import shard_pb2 as pb
from services.shard.codec import Frame, decode
from services.shard.link import FORWARD, Link, LinkClock


class NextStage:
    """Reads Hello, and answers it when it is told to."""

    def __init__(self) -> None:
        self.greeted = asyncio.Event()
        self.may_answer = asyncio.Event()
        self.refuses = False
        self.batches: asyncio.Queue[int] = asyncio.Queue()
        self.server = aio.server()
        forward: Any = grpc.stream_stream_rpc_method_handler(
            self._forward, response_serializer=pb.ForwardResponse.SerializeToString
        )
        handler = grpc.method_handlers_generic_handler(FORWARD.split("/")[1], {"Forward": forward})
        self.server.add_generic_rpc_handlers((handler,))
        self.port = self.server.add_insecure_port("127.0.0.1:0")

    async def _forward(self, frames: AsyncIterator[bytes], context: Any) -> None:
        assert decode(await anext(frames)).message.WhichOneof("frame") == "hello"
        self.greeted.set()
        await self.may_answer.wait()
        if self.refuses:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "they do not fit")
        await context.write(pb.ForwardResponse(welcome=pb.Welcome(window=4)))
        async for data in frames:
            self.batches.put_nowait(decode(data).message.batch.batch_id)

    def link(self) -> Link:
        """A link to it."""
        return Link(
            f"127.0.0.1:{self.port}",
            pb.Hello(),
            part_bytes=1 << 20,
            clock=LinkClock(),
            up=lambda: None,
            draining=lambda _: None,
        )


@pytest_asyncio.fixture
async def following() -> AsyncIterator[NextStage]:
    stage = NextStage()
    await stage.server.start()
    try:
        yield stage
    finally:
        await stage.server.stop(0)


def _batch(number: int) -> Frame:
    return Frame(pb.ForwardRequest(batch=pb.Batch(batch_id=number)))


async def test_batches_that_come_before_the_welcome_wait_for_it(following: NextStage) -> None:
    link = following.link()
    running = asyncio.create_task(link.run())
    sending = [asyncio.create_task(link.send(_batch(number))) for number in (1, 2)]
    await following.greeted.wait()
    assert not link.connected
    assert not any(one.done() for one in sending)
    following.may_answer.set()
    await asyncio.gather(*sending)
    assert [await following.batches.get() for _ in range(2)] == [1, 2]
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    with pytest.raises(ConnectionError):
        await link.send(_batch(3))


async def test_batches_do_not_wait_where_no_welcome_comes(following: NextStage) -> None:
    following.refuses = True
    link = following.link()
    running = asyncio.create_task(link.run())
    sending = asyncio.create_task(link.send(_batch(1)))
    following.may_answer.set()
    with pytest.raises(ConnectionError):
        await sending
    assert (await running).code is grpc.StatusCode.FAILED_PRECONDITION
