"""Fakes of the tokenizer and shard services, for faults that the real ones do not offer.

A token is a character; the model finds digits. Both are real gRPC servers.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import numpy as np
from grpc import aio

from miaotui.v1 import shard_pb2 as shard_pb
from miaotui.v1 import shard_pb2_grpc, tokenizer_pb2_grpc
from miaotui.v1 import tensor_pb2 as tensor_pb
from miaotui.v1 import tokenizer_pb2 as tokenizer_pb
from miaotui.v1.calls_pb2 import CallHeader
from services.rpc.calls import CallContext, CallError, CallServer
from services.rpc.server import RpcServer
from services.rpc.streaming import SingleCall, StreamedCallServer
from tests.gateway.writer import FakeWriter

ROOM = 64
STRIDE = 16
Context = aio.ServicerContext[Any, Any]


class Faults:
    """What the next calls of a fake do; counts what came."""

    def __init__(self) -> None:
        self.calls = 0
        self.cancelled = 0
        self.running = 0
        self.delay = 0.0
        self.codes: list[grpc.StatusCode] = []
        self.codes_after: list[grpc.StatusCode] = []
        self.detail = "the fake was told to fail"
        self.garbage = False
        self.shift = 0
        self.metadata: list[dict[str, Any]] = []
        self.remaining: list[float | None] = []
        self.request_ids: list[str] = []

    def reset(self) -> None:
        """Forgets everything."""
        self.__init__()  # type: ignore[misc]

    async def meet(self, context: Context, request_id: str) -> None:
        """Counts the call, waits and fails as told."""
        self.calls += 1
        self.request_ids.append(request_id)
        self.metadata.append(dict(context.invocation_metadata() or ()))
        self.remaining.append(context.time_remaining())
        if self.codes:
            await context.abort(self.codes.pop(0), self.detail)
        if self.delay:
            self.running += 1
            try:
                await asyncio.sleep(self.delay)
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
            finally:
                self.running -= 1
        if self.codes_after:
            await context.abort(self.codes_after.pop(0), self.detail)


def _ints(values: list[int]) -> bytes:
    return np.array(values, "<i4").tobytes()


class FakeTokenizer(tokenizer_pb2_grpc.TokenizerServiceServicer):
    """One token a character; windows of `ROOM` passage tokens."""

    def __init__(self) -> None:
        self.faults = Faults()
        self.fingerprint = "model-1"
        self.tokenizer_fingerprint = "tokenizer-1"
        self.texts = 0
        self.prompts = 0

    async def Describe(self, request: Any, context: Context) -> Any:
        return tokenizer_pb.TokenizerServiceDescribeResponse(
            model_fingerprint=self.fingerprint,
            tokenizer_fingerprint=self.tokenizer_fingerprint,
            vocab_size=0x110000,
            max_length=128,
            stride=STRIDE,
        )

    async def Encode(self, request: Any, context: Context) -> Any:
        await self.faults.meet(context, request.request_id)
        passage = None
        if request.WhichOneof("passage") == "text":
            self.texts += 1
            text = request.text
            passage = tokenizer_pb.TokenizedText(
                input_ids=_ints([ord(c) for c in text]),
                starts=_ints([i + self.faults.shift for i in range(len(text))]),
                ends=_ints([i + 1 + self.faults.shift for i in range(len(text))]),
                characters=len(text),
                fingerprint=self.tokenizer_fingerprint,
            )
        else:
            self.prompts += 1
            if request.tokenized.fingerprint != self.tokenizer_fingerprint:
                await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "another tokenizer")
        ids = np.frombuffer((passage or request.tokenized).input_ids, "<i4").tolist()
        question = [ord(c) for c in request.question][:20]
        windows = []
        first = 0
        while True:
            part = ids[first : first + ROOM]
            windows.append(
                tokenizer_pb.Window(
                    input_ids=_ints([1, *question, 2, *part, 2]),
                    passage_position=len(question) + 2,
                    passage_first=first,
                    passage_tokens=len(part),
                )
            )
            if first + ROOM >= len(ids):
                return tokenizer_pb.EncodeResponse(windows=windows, passage=passage)
            first += ROOM - STRIDE

    async def EncodeStream(  # type: ignore[override]
        self, request_iterator: Any, context: Context
    ) -> None:
        server = CallServer(
            "miaotui.v1.TokenizerService/Encode",
            self.Encode,
            lambda status, response: tokenizer_pb.EncodeStreamResponse(
                call=status, response=response
            ),
        )
        await server.serve(request_iterator, context)

    async def Decode(self, request: Any, context: Context) -> Any:
        raise NotImplementedError

    async def DecodeSpans(self, request: Any, context: Context) -> Any:
        raise NotImplementedError


class FakeShard(shard_pb2_grpc.ShardServiceServicer):
    """Stage 0 of two; finds the first run of digits after the separator."""

    def __init__(self) -> None:
        self.faults = Faults()
        self.fingerprint = "model-1"
        self.status = shard_pb.STAGE_STATUS_SERVING
        self.index = 0
        self.describe_delays: list[float] = []
        self.described = 0
        self.writer = FakeWriter()

    async def Describe(self, request: Any, context: Context) -> Any:
        self.described += 1
        if self.describe_delays:
            await asyncio.sleep(self.describe_delays.pop(0))
        stages = [
            shard_pb.StageInfo(
                index=self.index + i,
                stages=2,
                first_layer=i,
                end_layer=i + 1,
                model_layers=2,
                model_fingerprint=self.fingerprint,
                model_name="fake",
                model_type="bert",
                compute_dtype=tensor_pb.DTYPE_FLOAT32,
                wire_dtype=tensor_pb.DTYPE_FLOAT16,
                max_sequence_length=512,
                device="cpu",
                parameter_bytes=1000,
                model_parameter_bytes=2000,
            )
            for i in range(2)
        ]
        return shard_pb.ShardServiceDescribeResponse(
            stage=stages[0], status=self.status, reason="as told", pipeline=stages
        )

    async def Infer(self, request: Any, context: Context) -> Any:
        await self.faults.meet(context, request.request_id)
        if self.faults.garbage:
            return shard_pb.InferResponse(logits=[shard_pb.SpanLogits(start=b"\x01\x02")])
        logits = [self._logits(sequence.input_ids) for sequence in request.sequences]
        timings = [
            shard_pb.StageTiming(stage=i, queue_micros=10, compute_micros=200, batch_sequences=1)
            for i in range(2)
        ]
        return shard_pb.InferResponse(logits=logits, timings=timings)

    async def InferStream(  # type: ignore[override]
        self, request_iterator: Any, context: Context
    ) -> None:
        server = CallServer(
            "miaotui.v1.ShardService/Infer",
            self.Infer,
            lambda status, response: shard_pb.InferStreamResponse(call=status, response=response),
        )
        await server.serve(request_iterator, context)

    async def Generate(self, request: Any, context: Context) -> Any:
        call = SingleCall()
        call.cancel = self.writer.start(request, CallContext(CallHeader()), call)
        try:
            async for response in call:
                yield response
        except CallError as error:
            await context.abort(error.code, error.details)
        finally:
            call.cancel()

    async def GenerateStream(  # type: ignore[override]
        self, request_iterator: Any, context: Context
    ) -> None:
        server = StreamedCallServer(
            "miaotui.v1.ShardService/Generate",
            self.writer.start,
            shard_pb.GenerateStreamResponse,
        )
        await server.serve(request_iterator, context)

    def Forward(self, request_iterator: Any, context: Context) -> Any:
        raise NotImplementedError

    @staticmethod
    def _logits(input_ids: bytes) -> shard_pb.SpanLogits:
        ids = np.frombuffer(input_ids, "<i4")
        start, end = np.full(len(ids), -5, "<f4"), np.full(len(ids), -5, "<f4")
        start[0] = end[0] = 0.0
        passage = int(np.flatnonzero(ids == 2)[0]) + 1
        digits = [i for i in range(passage, len(ids)) if chr(ids[i]).isdecimal()]
        if digits:
            last = digits[0]
            while last + 1 in digits:
                last += 1
            start[digits[0]] = end[last] = 9.0
        return shard_pb.SpanLogits(start=start.tobytes(), end=end.tobytes())


class Fakes:
    """Both services on ports of their own."""

    def __init__(self) -> None:
        self.tokenizer = FakeTokenizer()
        self.shard = FakeShard()
        self.servers: dict[str, RpcServer] = {}

    async def start(self, name: str, listen: str = "127.0.0.1:0") -> RpcServer:
        """Starts, or restarts, one of them ("tokenizer", "shard")."""
        if name == "tokenizer":
            server = RpcServer("miaotui.v1.TokenizerService")
            tokenizer_pb2_grpc.add_TokenizerServiceServicer_to_server(self.tokenizer, server.aio)
        else:
            server = RpcServer("miaotui.v1.ShardService")
            shard_pb2_grpc.add_ShardServiceServicer_to_server(self.shard, server.aio)
        await server.start(listen)
        await server.set_serving(True)
        self.servers[name] = server
        return server

    def address(self, name: str) -> str:
        """host:port of one of them."""
        return f"127.0.0.1:{self.servers[name].port}"

    def reset(self) -> None:
        """Ends all faults and forgets the counts."""
        self.tokenizer.faults.reset()
        self.shard.faults.reset()
        self.tokenizer.texts = self.tokenizer.prompts = 0


@asynccontextmanager
async def running_fakes() -> AsyncIterator[Fakes]:
    """Both services, running."""
    fakes = Fakes()
    await fakes.start("tokenizer")
    await fakes.start("shard")
    try:
        yield fakes
    finally:
        for server in fakes.servers.values():
            await server.stop(0)
