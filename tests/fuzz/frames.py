"""Cases of the stream between stages: a stage 0 that sends wrong tensors, batches and frames."""

from __future__ import annotations

import asyncio
import random
import struct
from contextlib import suppress
from typing import Any

import grpc
from grpc import aio

from miaotui.v1 import shard_pb2 as pb
from miaotui.v1 import shard_pb2_grpc, tensor_pb2
from services.rpc.channel import open_channel
from services.shard.codec import Frame, decode, encode
from services.shard.link import FORWARD
from tests.fuzz import values
from tests.fuzz.cases import HANG_SECONDS, Entry, Finding
from tests.fuzz.messages import changed_message, random_message
from tests.fuzz.rpc import LOCAL

_SIZES = {
    tensor_pb2.DTYPE_FLOAT32: 4,
    tensor_pb2.DTYPE_FLOAT16: 2,
    tensor_pb2.DTYPE_BFLOAT16: 2,
    tensor_pb2.DTYPE_INT8: 1,
    tensor_pb2.DTYPE_UNSPECIFIED: 1,
}
_BORDERS = (-1, 0, 1, 2**31, 2**32, 2**62, 2**63 - 1, -(2**63), 10**9)
# A stage that takes a batch gives credit at once; one that does not ends the stream.
_ANSWER_SECONDS = 0.03


def _tensor_bytes(dtype: tensor_pb2.Dtype.ValueType, rows: int, columns: int) -> int:
    scales = 4 * rows if dtype == tensor_pb2.DTYPE_INT8 else 0
    return rows * columns * _SIZES[dtype] + scales


class FrameCases:
    """Plays stage 0 towards a stage 1 that nobody else uses."""

    def __init__(self, name: str, target: str, own: str) -> None:
        """`target`: stage 1's host:port; `own`: where it sends its results."""
        self._name = name
        self._target = target
        self._own = own
        self._server: aio.Server | None = None
        self._channel: aio.Channel | None = None
        self._chain: tuple[pb.StageInfo, ...] = ()
        self._turn = asyncio.Lock()

    def entries(self) -> list[Entry]:
        """Tensor headers, and frames of every kind."""
        return [
            Entry(f"Forward {self._name}, tensor headers", self._tensors, 6.0),
            Entry(f"Forward {self._name}, frames", self._frames, 4.0),
        ]

    async def close(self) -> None:
        """Closes the channel."""
        if self._channel is not None:
            await self._channel.close()
        if self._server is not None:
            await self._server.stop(0)

    async def _results(self, frames: Any, context: Any) -> None:
        """The other side of the ring: takes whatever comes."""
        async for data in frames:
            kind = decode(data).message.WhichOneof("frame")
            if kind == "hello":
                await context.write(pb.ForwardResponse(welcome=pb.Welcome(window=100)))
            elif kind == "results":
                number = decode(data).message.results.batch_id
                await context.write(pb.ForwardResponse(credit=pb.Credit(batch_id=number)))

    async def _ready(self) -> pb.StageInfo:
        async with self._turn:
            return await self._opened()

    async def _opened(self) -> pb.StageInfo:
        if self._channel is None:
            forward: Any = grpc.stream_stream_rpc_method_handler(
                self._results, response_serializer=pb.ForwardResponse.SerializeToString
            )
            service = FORWARD.split("/")[1]
            handler = grpc.method_handlers_generic_handler(service, {"Forward": forward})
            self._server = aio.server()
            self._server.add_generic_rpc_handlers((handler,))
            self._server.add_insecure_port(self._own)
            await self._server.start()
            self._channel = open_channel(self._target)
            stub = shard_pb2_grpc.ShardServiceStub(self._channel)
            told = await stub.Describe(pb.ShardServiceDescribeRequest(), timeout=HANG_SECONDS)
            first = pb.StageInfo()
            first.CopyFrom(told.stage)
            first.index, first.first_layer, first.end_layer = 0, 0, told.stage.first_layer
            first.address = self._own
            self._chain = (first, told.stage)
        return self._chain[1]

    def _hello(self) -> bytes:
        hello = pb.Hello(chain=self._chain[:1])
        return encode(Frame(pb.ForwardRequest(hello=hello)))

    def _batch(self, chance: random.Random, info: pb.StageInfo, number: int) -> pb.ForwardRequest:
        lengths = [chance.choice((1, 2, 5)) for _ in range(chance.choice((1, 1, 2, 4)))]
        # Behind an encoder's last layer: the rows that it made, and the ids of the tokens.
        rows = 0 if info.source_rows else sum(lengths)
        sequences = []
        for index, length in enumerate(lengths):
            meta = pb.SequenceMeta(request_id=f"f{number}", sequence=index, length=length)
            if info.kind == pb.MODEL_KIND_GENERATIVE:
                meta.decode.sequence_id = number + index + 1
                meta.decode.samples = chance.choice((0, 1))
                blocks = 1
                if info.source_rows:
                    rows += info.source_rows
                    blocks += -(-info.source_rows // info.kv_block_tokens)
                    meta.decode.begin.sampling.temperature = 0.0
                    meta.decode.tokens = struct.pack(f"<{length}i", *range(3, 3 + length))
                first = chance.randrange(max(1, info.kv_blocks - blocks))
                meta.decode.blocks = struct.pack(f"<{blocks}i", *range(first, first + blocks))
            sequences.append(meta)
        shape = [rows, info.hidden_size]
        batch = pb.Batch(batch_id=number, sequences=sequences, in_flight=1)
        batch.hidden.dtype = info.wire_dtype
        batch.hidden.shape.extend(shape)
        return pb.ForwardRequest(batch=batch)

    async def _tensors(self, chance: random.Random) -> str:
        """Shape and element type against the number of bytes."""
        info = await self._ready()
        request = self._batch(chance, info, chance.randrange(1, 2**32))
        header = request.batch.hidden
        right = _tensor_bytes(info.wire_dtype, *header.shape)
        act = chance.randrange(8)
        if act == 1:
            header.dtype = chance.choice((*_SIZES, 99))  # type: ignore[assignment]
        elif act == 2:
            header.shape[chance.randrange(2)] = chance.choice(_BORDERS)
        elif act == 3:
            del header.shape[:]
            header.shape.extend(chance.choice(_BORDERS) for _ in range(chance.randrange(6)))
        elif act == 4:
            # Their product overflows to the right number of bytes.
            del header.shape[:]
            header.shape.extend(
                chance.choice(([2**32, 2**32, right], [-right, -1], [2**63 - 1] * 3))
            )
        elif act == 5:
            header.shape.append(chance.choice((1, 0, 2)))
        elif act == 6:
            request.batch.ClearField("hidden")
        size = (
            right if chance.random() < 0.6 else max(0, right + chance.choice((-4, -1, 1, 4, 999)))
        )
        claimed = size if chance.random() < 0.7 else chance.choice((0, right, 1, 2**31, 2**64 - 1))
        request.batch.payload_bytes = claimed
        payload = chance.choice((bytes(size), chance.randbytes(size), b"\xff" * size))
        return await self._send([encode(Frame(request, memoryview(payload)))])

    async def _frames(self, chance: random.Random) -> str:
        """Batches with wrong contents, parts, cancellations, second greetings, and noise."""
        info = await self._ready()
        frames = []
        for _ in range(chance.choice((1, 2, 4))):
            request = self._batch(chance, info, chance.randrange(1, 2**32))
            shape = request.batch.hidden.shape
            payload = chance.randbytes(_tensor_bytes(info.wire_dtype, *shape))
            request.batch.payload_bytes = len(payload)
            act = chance.randrange(7)
            if act <= 2:
                changed: Any = changed_message(chance, request)
                request = changed
            elif act == 3:
                made: Any = random_message(chance, pb.ForwardRequest.DESCRIPTOR)
                request = made
            elif act == 4:
                part = pb.Part(batch_id=1, offset=chance.choice((0, 5, 2**63)))
                request = pb.ForwardRequest(part=part)
            elif act == 5:
                # The first of several parts, the others of which never come.
                request.batch.payload_bytes = len(payload) * 2
            data = encode(Frame(request, memoryview(payload)))
            frames.append(values.mutated(chance, data) if chance.random() < 0.4 else data)
        greeted = chance.random() < 0.9
        return await self._send(frames, greeted=greeted)

    async def _send(self, frames: list[bytes], *, greeted: bool = True) -> str:
        """Greets, sends, and says how the stream went on."""
        assert self._channel is not None
        # A second stage 0 would take the first one's place.
        async with self._turn:
            call: Any = self._channel.stream_stream(FORWARD)(timeout=HANG_SECONDS)
            try:
                if greeted:
                    await call.write(self._hello())
                    welcome = await call.read()
                    if welcome is aio.EOF:
                        return await self._ended(call, "at Hello")
                with suppress(asyncio.InvalidStateError, aio.AioRpcError):
                    for frame in frames:
                        await call.write(frame)
                return await self._answer(call)
            except aio.AioRpcError:
                return await self._ended(call, "")
            finally:
                call.cancel()

    async def _answer(self, call: Any) -> str:
        got = "taken"
        for _ in range(8):
            try:
                async with asyncio.timeout(_ANSWER_SECONDS):
                    answer = await call.read()
            except TimeoutError:
                return got
            if answer is aio.EOF:
                return await self._ended(call, "")
            kind = pb.ForwardResponse.FromString(answer).WhichOneof("frame")
            got = "rejected" if kind == "reject" else got
        return got

    async def _ended(self, call: Any, where: str) -> str:
        code = await call.code()
        if code is grpc.StatusCode.INTERNAL and await call.details() == LOCAL:
            return "ended while sending"
        if code in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE):
            raise Finding(f"{code.name} {where}: {await call.details()}")
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            raise Finding("no answer to Hello")
        return str(code.name)
