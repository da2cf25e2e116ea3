"""The models that the gateway serves: one that finds spans, one that writes text, or both."""

from __future__ import annotations

import asyncio

from gateway.settings import GatewaySettings
from gateway.upstream import Pair
from miaotui.v1 import shard_pb2 as shard_pb
from miaotui.v1 import tokenizer_pb2 as tokenizer_pb
from services.rpc.calls import CallStream
from services.rpc.streaming import ServerStreamCalls


class ExtractivePair(Pair):
    """The services of a model that finds spans. Calls go over streams, which halves latency."""

    def __init__(self, settings: GatewaySettings) -> None:
        super().__init__(
            shard_pb.MODEL_KIND_EXTRACTIVE,
            settings.tokenizer,
            settings.shard,
            settings.poll_seconds,
        )
        self.encode: CallStream[tokenizer_pb.EncodeRequest, tokenizer_pb.EncodeResponse]
        self.encode = CallStream(
            self.tokenizer.EncodeStream,
            lambda call, request: tokenizer_pb.EncodeStreamRequest(call=call, request=request),
        )
        self.infer: CallStream[shard_pb.InferRequest, shard_pb.InferResponse]
        self.infer = CallStream(
            self.shard.InferStream,
            lambda call, request: shard_pb.InferStreamRequest(call=call, request=request),
        )

    async def close(self) -> None:
        """Stops watching and closes the links."""
        self.encode.close()
        self.infer.close()
        await super().close()


class GenerativePair(Pair):
    """The services of a model that writes text."""

    def __init__(self, settings: GatewaySettings) -> None:
        super().__init__(
            shard_pb.MODEL_KIND_GENERATIVE,
            settings.generator_tokenizer,
            settings.generator_shard,
            settings.poll_seconds,
        )
        self.encode: CallStream[tokenizer_pb.EncodePromptRequest, tokenizer_pb.EncodePromptResponse]
        self.encode = CallStream(
            self.tokenizer.EncodePromptStream,
            lambda call, request: tokenizer_pb.EncodePromptStreamRequest(
                call=call, request=request
            ),
        )
        self.decode: CallStream[tokenizer_pb.DecodeBatchRequest, tokenizer_pb.DecodeBatchResponse]
        self.decode = CallStream(
            self.tokenizer.DecodeBatchStream,
            lambda call, request: tokenizer_pb.DecodeBatchStreamRequest(call=call, request=request),
        )
        self.generate: ServerStreamCalls[shard_pb.GenerateRequest, shard_pb.GenerateResponse]
        self.generate = ServerStreamCalls(
            self.shard.GenerateStream,
            lambda call, request: shard_pb.GenerateStreamRequest(call=call, request=request),
        )

    async def close(self) -> None:
        """Stops watching and closes the links."""
        self.encode.close()
        self.decode.close()
        self.generate.close()
        await super().close()


class Models:
    """The pairs that the settings name; at least one."""

    def __init__(self, settings: GatewaySettings) -> None:
        self.extractive = ExtractivePair(settings) if settings.shard else None
        self.generative = GenerativePair(settings) if settings.generator_shard else None
        self.pairs: list[Pair] = [
            pair for pair in (self.extractive, self.generative) if pair is not None
        ]

    @property
    def ready(self) -> bool:
        """Whether every model is served."""
        return all(pair.served is not None for pair in self.pairs)

    @property
    def reason(self) -> str:
        """Why a model is not served; empty when all are."""
        if len(self.pairs) == 1:
            return self.pairs[0].reason
        return " ".join(f"{pair.role}: {pair.reason}" for pair in self.pairs if pair.reason)

    def start(self) -> None:
        """Begins to watch."""
        for pair in self.pairs:
            pair.start()

    async def close(self) -> None:
        """Stops watching and closes the links."""
        await asyncio.gather(*(pair.close() for pair in self.pairs))
