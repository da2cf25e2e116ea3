"""Fakes of the tokenizer and shard services, for faults that the real ones do not offer.

A token is a character; the model finds digits. Both are real gRPC servers.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
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
from services.rpc.streaming_server import Outlet, SingleCall, StreamedCallServer
from tests.gateway.writer import CHINESE, END, ENGLISH, FakeWriter

ROOM = 64
STRIDE = 16
CONTEXT = 4096
MODALITIES = {
    "": shard_pb.INPUT_MODALITY_UNSPECIFIED,
    "audio": shard_pb.INPUT_MODALITY_AUDIO,
    "image": shard_pb.INPUT_MODALITY_IMAGE,
}
NAMED = {
    ("", False): "fake",
    ("", True): "fake-writer",
    ("audio", True): "fake-hearer",
    ("image", True): "fake-seer",
}
Context = aio.ServicerContext[Any, Any]


class Faults:
    """What the next calls of a fake do; counts what came."""

    def __init__(self) -> None:
        self.calls = 0
        self.cancelled = 0
        self.running = 0
        self.delay = 0.0
        self.gate: asyncio.Event | None = None
        self.codes: list[grpc.StatusCode] = []
        self.codes_after: list[grpc.StatusCode] = []
        self.detail = "the fake was told to fail"
        self.garbage = False
        self.shift = 0
        self.metadata: list[dict[str, Any]] = []
        self.remaining: list[float | None] = []
        self.request_ids: list[str] = []

    def hold(self) -> asyncio.Event:
        """Calls wait from now on, until the event that this returns is set."""
        self.gate = asyncio.Event()
        return self.gate

    def over(self) -> Faults:
        """Lets go what waits, which goes on counting here, and returns what comes instead."""
        if self.gate is not None:
            self.gate.set()
        return Faults()

    async def meet(self, context: Context, request_id: str) -> None:
        """Counts the call, waits and fails as told."""
        self.calls += 1
        self.request_ids.append(request_id)
        self.metadata.append(dict(context.invocation_metadata() or ()))
        self.remaining.append(context.time_remaining())
        if self.codes:
            await context.abort(self.codes.pop(0), self.detail)
        if self.delay or self.gate is not None:
            self.running += 1
            try:
                if self.gate is not None:
                    await self.gate.wait()
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
    """One token a character; windows of `ROOM` passage tokens. Of prompts, a token is a byte."""

    def __init__(
        self, fingerprint: str = "model-1", *, generative: bool = False, media: str = ""
    ) -> None:
        """`media`: "audio" or "image"; files are then bytes, and "|" ends a window."""
        self.faults = Faults()
        self.fingerprint = fingerprint
        self.tokenizer_fingerprint = "tokenizer-1"
        self.generative = generative
        self.media = media
        self.files: list[bytes] = []
        self.file_codes: list[grpc.StatusCode] = []
        self.asked: list[tokenizer_pb.EncodePromptRequest] = []
        self.batches: list[int] = []
        self.decode_codes: list[grpc.StatusCode] = []
        self.texts = 0
        self.prompts = 0

    async def Describe(self, request: Any, context: Context) -> Any:
        if self.media:
            return tokenizer_pb.TokenizerServiceDescribeResponse(
                model_fingerprint=self.fingerprint,
                tokenizer_fingerprint=self.tokenizer_fingerprint,
                vocab_size=CHINESE + 1,
                kind=shard_pb.MODEL_KIND_GENERATIVE,
                context_length=CONTEXT,
                stop_token_ids=[END],
                sampling=tokenizer_pb.SamplingDefaults(temperature=0),
                media=tokenizer_pb.MediaInput(
                    modality=MODALITIES[self.media],
                    max_file_bytes=100_000,
                    advised_tokens=40,
                    languages=[
                        tokenizer_pb.SpokenLanguage(code="en", name="english", token_id=ENGLISH),
                        tokenizer_pb.SpokenLanguage(code="zh", name="chinese", token_id=CHINESE),
                    ]
                    if self.media == "audio"
                    else [],
                ),
            )
        if self.generative:
            return tokenizer_pb.TokenizerServiceDescribeResponse(
                model_fingerprint=self.fingerprint,
                tokenizer_fingerprint=self.tokenizer_fingerprint,
                vocab_size=END + 1,
                kind=shard_pb.MODEL_KIND_GENERATIVE,
                context_length=CONTEXT,
                has_chat_template=True,
                stop_token_ids=[END],
                sampling=tokenizer_pb.SamplingDefaults(top_k=20),
            )
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

    async def EncodePrompt(self, request: Any, context: Context) -> Any:
        await self.faults.meet(context, request.request_id)
        self.asked.append(request)
        if request.WhichOneof("prompt") == "media":
            return tokenizer_pb.EncodePromptResponse(input_ids=_ints([1]))
        if request.WhichOneof("prompt") == "text":
            return tokenizer_pb.EncodePromptResponse(input_ids=_ints([*request.text.encode()]))
        if any(message.role == "refused" for message in request.chat.messages):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "chat: the template refuses it")
        text = "".join(f"<{m.role}>{m.content}\n" for m in request.chat.messages)
        return tokenizer_pb.EncodePromptResponse(input_ids=_ints([*f"{text}<assistant>".encode()]))

    async def EncodePromptStream(  # type: ignore[override]
        self, request_iterator: Any, context: Context
    ) -> None:
        server = CallServer(
            "miaotui.v1.TokenizerService/EncodePrompt",
            self.EncodePrompt,
            lambda status, response: tokenizer_pb.EncodePromptStreamResponse(
                call=status, response=response
            ),
        )
        await server.serve(request_iterator, context)

    async def DecodeBatch(self, request: Any, context: Context) -> Any:
        self.batches.append(len(request.items))
        if self.decode_codes:
            await context.abort(self.decode_codes.pop(0), "the fake was told to fail")
        response = tokenizer_pb.DecodeBatchResponse()
        for item in request.items:
            ids = np.frombuffer(item.token_ids, "<i4")
            before, text = (
                bytes(int(i) for i in run if i < END).decode("utf-8", "replace")
                for run in (ids[: item.read_offset], ids)
            )
            if item.flush or (len(text) > len(before) and not text.endswith("\ufffd")):
                response.items.add(
                    text=text[len(before) :], prefix_offset=item.read_offset, read_offset=len(ids)
                )
            else:
                response.items.add(read_offset=item.read_offset)
        names = {ENGLISH: b"<|en|>", CHINESE: b"<|zh|>"}
        response.pieces.extend(
            bytes((i,)) if i < END else names.get(i, b"<end>") for i in request.pieces
        )
        return response

    async def DecodeBatchStream(  # type: ignore[override]
        self, request_iterator: Any, context: Context
    ) -> None:
        server = CallServer(
            "miaotui.v1.TokenizerService/DecodeBatch",
            self.DecodeBatch,
            lambda status, response: tokenizer_pb.DecodeBatchStreamResponse(
                call=status, response=response
            ),
        )
        await server.serve(request_iterator, context)

    async def Decode(self, request: Any, context: Context) -> Any:
        text = bytes(i for i in request.ids if i < END).decode("utf-8", "replace")
        return tokenizer_pb.DecodeResponse(text=text)

    async def ExtractFeatures(
        self, request: Any, context: Context
    ) -> AsyncIterator[tokenizer_pb.ExtractFeaturesResponse]:
        self.files.append(request.file)
        if self.file_codes:
            await context.abort(self.file_codes.pop(0), "the fake was told to fail")
        for index, window in enumerate(request.file.split(b"|")):
            if window == b"broken":
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "file: is broken")
            yield tokenizer_pb.ExtractFeaturesResponse(
                features=shard_pb.Features(
                    header=tensor_pb.TensorHeader(
                        dtype=tensor_pb.DTYPE_FLOAT32, shape=[1, len(window) // 4]
                    ),
                    data=window,
                ),
                start_seconds=30.0 * index,
                end_seconds=30.0 * index + 28.5,
            )

    async def DecodeSpans(self, request: Any, context: Context) -> Any:
        raise NotImplementedError


class FakeShard(shard_pb2_grpc.ShardServiceServicer):
    """Stage 0 of two; finds the first run of digits after the separator."""

    def __init__(
        self, fingerprint: str = "model-1", *, generative: bool = False, media: str = ""
    ) -> None:
        self.faults = Faults()
        self.fingerprint = fingerprint
        self.generative = generative
        self.media = media
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
                model_name=NAMED[self.media, self.generative],
                input_modality=MODALITIES[self.media],
                model_type="qwen3" if self.generative else "bert",
                kind=(
                    shard_pb.MODEL_KIND_GENERATIVE
                    if self.generative
                    else shard_pb.MODEL_KIND_EXTRACTIVE
                ),
                vocab_size=(CHINESE if self.media else END) + 1 if self.generative else 0,
                compute_dtype=tensor_pb.DTYPE_FLOAT32,
                wire_dtype=tensor_pb.DTYPE_FLOAT16,
                max_sequence_length=CONTEXT if self.generative else 512,
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
        call.cancel = self._start(request, CallContext(CallHeader()), call)
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
            self._start,
            shard_pb.GenerateStreamResponse,
        )
        await server.serve(request_iterator, context)

    def _start(self, request: Any, context: Any, outlet: Outlet) -> Callable[[], None]:
        return self.writer.start(request, context, outlet)

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


NAMES = tuple(
    f"{model}{part}"
    for model in ("", "generator_", "transcriber_", "captioner_")
    for part in ("tokenizer", "shard")
)


class Fakes:
    """The services of all models, on ports of their own."""

    def __init__(self) -> None:
        self.tokenizer = FakeTokenizer()
        self.shard = FakeShard()
        self.generator_tokenizer = FakeTokenizer("writer-1", generative=True)
        self.generator_shard = FakeShard("writer-1", generative=True)
        self.transcriber_tokenizer = FakeTokenizer("hearer-1", generative=True, media="audio")
        self.transcriber_shard = FakeShard("hearer-1", generative=True, media="audio")
        self.captioner_tokenizer = FakeTokenizer("seer-1", generative=True, media="image")
        self.captioner_shard = FakeShard("seer-1", generative=True, media="image")
        self.servers: dict[str, RpcServer] = {}

    @property
    def writer(self) -> FakeWriter:
        """What the generator's shards write."""
        return self.generator_shard.writer

    async def start(self, name: str, listen: str = "127.0.0.1:0") -> RpcServer:
        """Starts, or restarts, one of them, by its name in `NAMES`."""
        if name.endswith("tokenizer"):
            server = RpcServer("miaotui.v1.TokenizerService")
            tokenizer_pb2_grpc.add_TokenizerServiceServicer_to_server(
                getattr(self, name), server.aio
            )
        else:
            server = RpcServer("miaotui.v1.ShardService")
            shard_pb2_grpc.add_ShardServiceServicer_to_server(getattr(self, name), server.aio)
        await server.start(listen)
        await server.set_serving(True)
        self.servers[name] = server
        return server

    def pace_writer(self) -> None:
        """The writer waits after each step until the tokenizer was asked for its text.

        So no step's text is joined with the next one's, however slow the gateway is.
        """
        self.writer.heard = lambda: len(self.generator_tokenizer.batches)

    def address(self, name: str) -> str:
        """host:port of one of them."""
        return f"127.0.0.1:{self.servers[name].port}"

    def reset(self) -> None:
        """Ends all faults and forgets the counts."""
        for tokenizer in (
            self.tokenizer,
            self.generator_tokenizer,
            self.transcriber_tokenizer,
            self.captioner_tokenizer,
        ):
            tokenizer.faults = tokenizer.faults.over()
            tokenizer.texts = tokenizer.prompts = 0
            tokenizer.asked, tokenizer.batches, tokenizer.decode_codes = [], [], []
            tokenizer.files, tokenizer.file_codes = [], []
        for shard in (
            self.shard,
            self.generator_shard,
            self.transcriber_shard,
            self.captioner_shard,
        ):
            shard.faults = shard.faults.over()
            shard.writer = FakeWriter()


@asynccontextmanager
async def running_fakes() -> AsyncIterator[Fakes]:
    """All services, running."""
    fakes = Fakes()
    for name in NAMES:
        await fakes.start(name)
    try:
        yield fakes
    finally:
        for server in fakes.servers.values():
            await server.stop(0)
