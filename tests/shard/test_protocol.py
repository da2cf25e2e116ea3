"""The stream protocol against a real last stage; the test plays stage 0 on both its sides."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import pytest_asyncio
import torch
from grpc import aio

from miaotui.engine.tensors import to_wire
from miaotui.models.layers import LayerRange
from miaotui.models.stage import StageBatch, StageModel
from miaotui.v1 import shard_pb2 as pb
from miaotui.v1 import shard_pb2_grpc, tensor_pb2
from services.rpc.channel import open_channel
from services.shard.codec import Assembler, Frame, decode, encode, split
from services.shard.link import FORWARD
from tests.checkpoints import make_checkpoint
from tests.processes import ServiceProcess, free_port

INBOX = 3
HIDDEN = 32


class Head:
    """Stage 0: streams frames to the stage under test, and receives its results."""

    def __init__(self, model: Path, directory: Path) -> None:
        self.targets = [f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"]
        self.layers = StageModel.load(model, LayerRange(0, 2), dtype="float32", device="cpu")
        self.reference = StageModel.load(model, dtype="float32", device="cpu")
        env = {
            "MIAOTUI_SHARD_MODEL": str(model),
            "MIAOTUI_SHARD_STAGE": "1",
            "MIAOTUI_SHARD_STAGES": ",".join(self.targets),
            "MIAOTUI_SHARD_LAYERS": "0-2,2-4",
            "MIAOTUI_SHARD_DTYPE": "float32",
            "MIAOTUI_SHARD_INBOX_BATCHES": str(INBOX),
        }
        argv = [sys.executable, "-m", "services.shard"]
        self.process = ServiceProcess("shard-1", argv, env, directory / "shard-1.log")
        self.results: asyncio.Queue[Frame] = asyncio.Queue()
        self.answers: asyncio.Queue[pb.ForwardResponse] = asyncio.Queue()
        self.server = aio.server()
        forward: Any = grpc.stream_stream_rpc_method_handler(
            self._forward, response_serializer=pb.ForwardResponse.SerializeToString
        )
        service = FORWARD.split("/")[1]
        handler = grpc.method_handlers_generic_handler(service, {"Forward": forward})
        self.server.add_generic_rpc_handlers((handler,))
        self.channel = open_channel(self.targets[1])
        self.stub = shard_pb2_grpc.ShardServiceStub(self.channel)

    async def _forward(self, frames: AsyncIterator[bytes], context: Any) -> None:
        assembler = Assembler(1 << 30)
        async for data in frames:
            frame = assembler.feed(decode(data))
            if frame is None:
                continue
            if frame.message.WhichOneof("frame") == "hello":
                await context.write(pb.ForwardResponse(welcome=pb.Welcome(window=100)))
            else:
                self.results.put_nowait(frame)

    async def start(self) -> None:
        self.server.add_insecure_port(self.targets[0])
        await self.server.start()
        await asyncio.to_thread(self.process.start)
        await self.channel.channel_ready()

    async def stop(self) -> None:
        await self.channel.close()
        await asyncio.to_thread(self.process.stop)
        await self.server.stop(0)

    def info(self, **changes: Any) -> pb.StageInfo:
        info = self.layers.info
        fields: dict[str, Any] = {
            "protocol_version": 1,
            "index": 0,
            "stages": 2,
            "first_layer": 0,
            "end_layer": 2,
            "model_layers": 4,
            "model_fingerprint": info.fingerprint,
            "compute_dtype": tensor_pb2.DTYPE_FLOAT32,
            "wire_dtype": tensor_pb2.DTYPE_FLOAT32,
            "address": self.targets[0],
            "kind": pb.MODEL_KIND_EXTRACTIVE,
        }
        return pb.StageInfo(**(fields | changes))

    def open(self) -> aio.StreamStreamCall[bytes, pb.ForwardResponse]:
        method: aio.StreamStreamMultiCallable[bytes, pb.ForwardResponse]
        method = self.channel.stream_stream(
            FORWARD, response_deserializer=pb.ForwardResponse.FromString
        )
        return method()

    async def greet(self) -> aio.StreamStreamCall[bytes, pb.ForwardResponse]:
        """Opens a verified stream; what comes back lands in `answers`."""
        call = self.open()
        await call.write(encode(Frame(pb.ForwardRequest(hello=pb.Hello(chain=[self.info()])))))
        welcome = await call.read()
        assert isinstance(welcome, pb.ForwardResponse)
        assert welcome.welcome.window == INBOX

        async def listen() -> None:
            while isinstance(answer := await call.read(), pb.ForwardResponse):
                self.answers.put_nowait(answer)

        self.listener = asyncio.ensure_future(listen())
        async with asyncio.timeout(60):
            while (await self.describe()).status != pb.STAGE_STATUS_SERVING:
                await asyncio.sleep(0.02)
        return call

    async def describe(self) -> pb.ShardServiceDescribeResponse:
        response: pb.ShardServiceDescribeResponse
        response = await self.stub.Describe(pb.ShardServiceDescribeRequest())
        return response

    def frame(self, batch_id: int, lengths: list[int], **meta: Any) -> tuple[Frame, torch.Tensor]:
        """A batch as stage 0 would send it, and the logits that an unsplit model gives."""
        generator = torch.Generator().manual_seed(batch_id)
        ids = torch.randint(5, self.layers.info.vocab_size, (sum(lengths),), generator=generator)
        wire = to_wire(self.layers.run(StageBatch(lengths, input_ids=ids)))
        batch = pb.Batch(
            batch_id=batch_id,
            hidden=tensor_pb2.TensorHeader(dtype=tensor_pb2.DTYPE_FLOAT32, shape=wire.shape),
            sequences=[
                pb.SequenceMeta(request_id=f"r{batch_id}", sequence=i, length=n, **meta)
                for i, n in enumerate(lengths)
            ],
            payload_bytes=wire.nbytes,
        )
        frame = Frame(pb.ForwardRequest(batch=batch), wire.data)
        return frame, self.reference.run(StageBatch(lengths, input_ids=ids))

    async def result(self) -> Frame:
        async with asyncio.timeout(60):
            return await self.results.get()


@pytest_asyncio.fixture(scope="module")
async def head(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Head]:
    directory = tmp_path_factory.mktemp("protocol")
    model = make_checkpoint(directory / "model", "bert", layers=4, hidden=HIDDEN)
    head = Head(model, directory)
    await head.start()
    try:
        yield head
    finally:
        await head.stop()


def _logits(frame: Frame) -> np.ndarray:
    assert frame.message.results.logits.dtype == tensor_pb2.DTYPE_FLOAT32
    return np.frombuffer(frame.payload, dtype="<f4").reshape(-1, 2)


async def test_batches_come_back_as_an_unsplit_model_computes_them(head: Head) -> None:
    call = await head.greet()
    expected = {}
    for batch_id in (1, 2, 3):
        frame, expected[batch_id] = head.frame(batch_id, [7, 1, 12])
        await call.write(encode(frame))
    for _ in range(3):
        frame = await head.result()
        results = frame.message.results
        assert [meta.length for meta in results.sequences] == [7, 1, 12]
        np.testing.assert_allclose(_logits(frame), expected[results.batch_id], atol=1e-4)
        assert results.timings[0].stage == 1
        assert results.timings[0].batch_tokens == 20
    credits = {(await head.answers.get()).credit.batch_id for _ in range(3)}
    assert credits == {1, 2, 3}
    call.cancel()


async def test_a_tensor_in_parts_arrives_whole(head: Head) -> None:
    call = await head.greet()
    frame, expected = head.frame(11, [40, 60])
    parts = list(split(frame, 1000))
    assert len(parts) > 10
    for part in parts:
        await call.write(encode(part))
    np.testing.assert_allclose(_logits(await head.result()), expected, atol=1e-4)
    call.cancel()


async def test_cancelled_and_overdue_sequences_are_dropped_and_named(head: Head) -> None:
    call = await head.greet()
    cancel = pb.ForwardRequest(cancel=pb.Cancel(request_ids=["r21"]))
    await call.write(encode(Frame(cancel)))
    computed = (await head.describe()).sequences_total
    await call.write(encode(head.frame(21, [5, 6])[0]))
    results = (await head.result()).message.results
    assert not results.sequences
    assert [(d.sequence, d.code) for d in results.dropped] == [(0, 1), (1, 1)]
    await call.write(encode(head.frame(22, [5], timeout_micros=1)[0]))
    results = (await head.result()).message.results
    assert [(d.request_id, d.code) for d in results.dropped] == [("r22", 4)]
    assert (await head.describe()).sequences_total == computed
    call.cancel()


async def test_more_than_the_window_is_refused_with_resource_exhausted(head: Head) -> None:
    call = await head.greet()
    sent = [encode(head.frame(30 + n, [400] * 3)[0]) for n in range(12)]
    head.process.process.send_signal(19)  # SIGSTOP: the batches arrive while nothing is taken
    for data in sent:
        await call.write(data)
    head.process.process.send_signal(18)
    answers: list[pb.ForwardResponse] = []
    async with asyncio.timeout(60):
        while len(answers) < len(sent):
            answers.append(await head.answers.get())
    refused = [answer.reject for answer in answers if answer.WhichOneof("frame") == "reject"]
    assert refused
    assert {reject.code for reject in refused} == {8}
    assert "wait for a Credit" in refused[0].message
    for _ in range(len(sent) - len(refused)):
        assert (await head.result()).message.results.batch_id >= 30
    call.cancel()


Change = Callable[[Head], bytes]


def _batch_with(**fields: Any) -> Change:
    def change(head: Head) -> bytes:
        frame, _ = head.frame(40, [4])
        header: dict[str, Any] = {"dtype": tensor_pb2.DTYPE_FLOAT32, "shape": [4, HIDDEN]}
        overridden = {name: fields[name] for name in header if name in fields}
        frame.message.batch.hidden.CopyFrom(tensor_pb2.TensorHeader(**(header | overridden)))
        if "length" in fields:
            frame.message.batch.sequences[0].length = fields["length"]
        if "cut" in fields:
            frame.payload = frame.payload[: -fields["cut"]]
            frame.message.batch.payload_bytes = frame.payload.nbytes
        if "payload_bytes" in fields:
            frame.message.batch.payload_bytes = fields["payload_bytes"]
        return encode(frame)

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda _: b"\xff\xff\xff\xff",
        lambda _: b"",
        lambda head: encode(head.frame(41, [4])[0])[:-9],
        lambda _: encode(Frame(pb.ForwardRequest(part=pb.Part(batch_id=1)), memoryview(b"x"))),
        lambda _: encode(Frame(pb.ForwardRequest(results=pb.Results(batch_id=1)))),
        _batch_with(dtype=tensor_pb2.DTYPE_UNSPECIFIED),
        _batch_with(dtype=tensor_pb2.DTYPE_FLOAT16),
        _batch_with(shape=[4, HIDDEN + 1]),
        _batch_with(shape=[-4, HIDDEN]),
        _batch_with(shape=[2**62, 2**62]),
        _batch_with(shape=[]),
        _batch_with(length=5),
        _batch_with(length=0),
        _batch_with(length=2**32 - 1),
        _batch_with(cut=3),
        _batch_with(payload_bytes=2**63),
    ],
    ids=[
        *("garbage", "empty", "truncated", "lone part", "results", "no dtype", "other dtype"),
        *("wide", "negative", "overflowing", "no shape", "too few tokens", "no tokens"),
        *("huge length", "cut payload", "huge payload"),
    ],
)
async def test_malformed_frames_end_the_stream_and_nothing_else(head: Head, change: Change) -> None:
    call = await head.greet()
    await call.write(change(head))
    async with asyncio.timeout(60):
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
    call = await head.greet()
    frame, expected = head.frame(42, [3])
    await call.write(encode(frame))
    np.testing.assert_allclose(_logits(await head.result()), expected, atol=1e-4)
    call.cancel()


async def test_a_stranger_is_refused_and_does_not_disturb(head: Head) -> None:
    call = await head.greet()
    stranger = head.open()
    hello = pb.Hello(chain=[head.info(model_fingerprint="0" * 64)])
    await stranger.write(encode(Frame(pb.ForwardRequest(hello=hello))))
    assert await stranger.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "another model" in (await stranger.details() or "")
    assert (await head.describe()).status == pb.STAGE_STATUS_SERVING
    frame, expected = head.frame(51, [9])
    await call.write(encode(frame))
    np.testing.assert_allclose(_logits(await head.result()), expected, atol=1e-4)
    call.cancel()


async def test_the_first_frame_must_be_hello(head: Head) -> None:
    call = head.open()
    await call.write(encode(head.frame(61, [2])[0]))
    assert await call.code() is grpc.StatusCode.FAILED_PRECONDITION


async def test_requests_go_to_stage_0(head: Head) -> None:
    with pytest.raises(aio.AioRpcError) as caught:
        await head.stub.Infer(pb.InferRequest(request_id="r"))
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "stage 0" in (caught.value.details() or "")
