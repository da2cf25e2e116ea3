"""When a lane is up: a real stage 0; the test plays the last stage on both its sides."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import torch
from grpc import aio

from miaotui.v1 import shard_pb2 as pb
from miaotui.v1 import shard_pb2_grpc
from services.rpc.channel import open_channel
from services.shard.codec import Assembler, Frame, decode, encode
from services.shard.convert import batch_to_frame, frame_to_batch
from services.shard.link import FORWARD
from tests.checkpoints import make_checkpoint
from tests.processes import START_SECONDS, ServiceProcess, free_port

HIDDEN = 32
TOKENS = 5


class LastStage:
    """Stage 1 of 2, which closes the ring before it welcomes stage 0."""

    def __init__(self, channel: aio.Channel, address: str) -> None:
        """`channel`: to stage 0; `address`: this one's."""
        self._channel = channel
        self._address = address
        self.closed = asyncio.Event()
        self.welcome = asyncio.Event()
        self.tasks: list[asyncio.Task[None]] = []

    async def forward(self, frames: AsyncIterator[bytes], context: Any) -> None:
        """The way there: batches from stage 0, answered by the number of their tokens."""
        back: Any = None
        assembler = Assembler(1 << 30)
        async for data in frames:
            frame = assembler.feed(decode(data))
            if frame is None:
                continue
            if frame.message.WhichOneof("frame") == "hello":
                back = await self._close_ring(frame.message.hello)
                self.closed.set()
                await self.welcome.wait()
                await context.write(pb.ForwardResponse(welcome=pb.Welcome(window=4)))
                continue
            batch = frame_to_batch(frame, HIDDEN)
            batch.hidden = torch.full((batch.tokens, 2), float(batch.tokens))
            await back.write(encode(batch_to_frame(batch, "float32", results=True)))
            credit = pb.Credit(batch_id=batch.batch_id)
            await context.write(pb.ForwardResponse(credit=credit))

    async def _close_ring(self, hello: pb.Hello) -> Any:
        own = pb.StageInfo()
        own.CopyFrom(hello.chain[0])
        own.index, own.first_layer, own.end_layer, own.address = 1, 2, 4, self._address
        method: aio.StreamStreamMultiCallable[bytes, pb.ForwardResponse]
        method = self._channel.stream_stream(
            FORWARD, response_deserializer=pb.ForwardResponse.FromString
        )
        call: Any = method()
        closing = pb.Hello(chain=[hello.chain[0], own], lane=hello.lane, route=hello.route)
        await call.write(encode(Frame(pb.ForwardRequest(hello=closing))))
        answer = await call.read()
        assert answer.WhichOneof("frame") == "welcome"

        async def listen() -> None:
            while await call.read() is not aio.EOF:
                pass

        self.tasks.append(asyncio.create_task(listen()))
        return call


async def test_a_lane_is_up_when_both_of_its_ends_are(tmp_path: Path) -> None:
    """The ring may be closed before stage 0 has heard its welcome: nothing is to set out then."""
    targets = [f"127.0.0.1:{free_port()}" for _ in range(2)]
    model = make_checkpoint(tmp_path / "model", "bert", layers=4, hidden=HIDDEN)
    env = {
        "MIAOTUI_SHARD_MODEL": str(model),
        "MIAOTUI_SHARD_STAGE": "0",
        "MIAOTUI_SHARD_STAGES": ",".join(targets),
        "MIAOTUI_SHARD_LAYERS": "0-2,2-4",
        "MIAOTUI_SHARD_DTYPE": "float32",
    }
    argv = [sys.executable, "-m", "services.shard"]
    process = ServiceProcess("shard-0", argv, env, tmp_path / "shard-0.log")
    async with open_channel(targets[0]) as channel:
        last = LastStage(channel, targets[1])
        server = aio.server()
        forward: Any = grpc.stream_stream_rpc_method_handler(
            last.forward, response_serializer=pb.ForwardResponse.SerializeToString
        )
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(FORWARD.split("/")[1], {"Forward": forward}),)
        )
        server.add_insecure_port(targets[1])
        await server.start()
        stub: Any = shard_pb2_grpc.ShardServiceStub(channel)

        async def status() -> pb.StageStatus.ValueType:
            described = await stub.Describe(pb.ShardServiceDescribeRequest(), wait_for_ready=True)
            return described.status  # type: ignore[no-any-return]

        try:
            await asyncio.to_thread(process.start)
            async with asyncio.timeout(START_SECONDS):
                await last.closed.wait()
            # Each of these takes stage 0 some turns of its loop.
            assert pb.STAGE_STATUS_SERVING not in [await status() for _ in range(50)]
            last.welcome.set()
            async with asyncio.timeout(60):
                while await status() != pb.STAGE_STATUS_SERVING:
                    await asyncio.sleep(0.02)
            sequence = pb.TokenSequence(input_ids=np.full(TOKENS, 5, "<i4").tobytes())
            request = pb.InferRequest(request_id="r", sequences=[sequence])
            response = await stub.Infer(request, timeout=60)
            (logits,) = response.logits
            assert np.frombuffer(logits.start, "<f4").tolist() == [TOKENS] * TOKENS
        finally:
            for task in last.tasks:
                task.cancel()
            await asyncio.to_thread(process.stop)
            await server.stop(0)
