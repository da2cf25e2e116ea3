"""The models that the gateway serves: those that find spans, write text, hear or see."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from gateway.replicas import Balanced, Replicas, choose
from gateway.served import Role, Served
from gateway.settings import GatewaySettings
from gateway.upstream import Head, Pair, Tokenizer
from miaotui.models.errors import CheckpointError
from miaotui.models.fingerprint import model_fingerprint, tokenizer_fingerprint
from miaotui.retrieval.encoder import (
    BUNDLED_NAME,
    LONGEST_TOKENS,
    EncoderError,
    EncoderTokenizer,
    bundled_folder,
)
from miaotui.v1 import explain_pb2 as explain_pb
from miaotui.v1 import explain_pb2_grpc
from miaotui.v1 import shard_pb2 as shard_pb
from miaotui.v1 import tokenizer_pb2 as tokenizer_pb
from services.rpc.calls import CallStream
from services.rpc.channel import UnaryMethod
from services.rpc.endpoints import split_addresses
from services.rpc.streaming import ServerStreamCalls

log = logging.getLogger(__name__)

Encode: TypeAlias = UnaryMethod[tokenizer_pb.EncodeRequest, tokenizer_pb.EncodeResponse]
Infer: TypeAlias = UnaryMethod[shard_pb.InferRequest, shard_pb.InferResponse]
Explain: TypeAlias = UnaryMethod[explain_pb.ExplainRequest, explain_pb.ExplainResponse]
EncodePrompt: TypeAlias = UnaryMethod[
    tokenizer_pb.EncodePromptRequest, tokenizer_pb.EncodePromptResponse
]
DecodeBatch: TypeAlias = UnaryMethod[
    tokenizer_pb.DecodeBatchRequest, tokenizer_pb.DecodeBatchResponse
]


class ExtractiveTokenizer(Tokenizer):
    """Tokenises questions. Calls go over a stream, which halves latency."""

    def __init__(self, address: str, lost: Callable[[], None]) -> None:
        super().__init__(address, lost)
        self.encode: CallStream[tokenizer_pb.EncodeRequest, tokenizer_pb.EncodeResponse]
        self.encode = CallStream(
            self.stub.EncodeStream,
            lambda call, request: tokenizer_pb.EncodeStreamRequest(call=call, request=request),
        )

    @property
    def outstanding(self) -> int:
        """Calls that it works on."""
        return self.encode.outstanding

    def drop(self) -> None:
        """Fails the calls that it works on, because it hangs: others are to do them."""
        super().drop()
        self.encode.close()

    async def close(self) -> None:
        """Ends the links."""
        self.encode.close()
        await super().close()


class ExtractiveHead(Head):
    """Stage 0 of a model that finds spans."""

    def __init__(self, address: str, lost: Callable[[], None]) -> None:
        super().__init__(address, lost)
        self.infer: CallStream[shard_pb.InferRequest, shard_pb.InferResponse]
        self.infer = CallStream(
            self.stub.InferStream,
            lambda call, request: shard_pb.InferStreamRequest(call=call, request=request),
        )
        # Rare and slow: a stream would save it nothing.
        self.explain = explain_pb2_grpc.ExplainServiceStub(self.channel).Explain

    @property
    def outstanding(self) -> int:
        """Calls that it works on."""
        return self.infer.outstanding

    def drop(self) -> None:
        """Fails the calls that it works on, because it hangs: others are to do them."""
        super().drop()
        self.infer.close()

    async def close(self) -> None:
        """Ends the links."""
        self.infer.close()
        await super().close()


class ExtractivePair(Pair[ExtractiveTokenizer, ExtractiveHead]):
    """The services of a model that finds spans."""

    def __init__(self, settings: GatewaySettings) -> None:
        super().__init__(
            shard_pb.MODEL_KIND_EXTRACTIVE,
            Replicas(
                split_addresses(settings.tokenizer), lambda at: ExtractiveTokenizer(at, self.lost)
            ),
            Replicas(split_addresses(settings.shard), lambda at: ExtractiveHead(at, self.lost)),
            settings.poll_seconds,
        )

    def encode(self, served: Served) -> Encode:
        """Encode, at a tokenizer of this model."""
        return Balanced(lambda: self.tokenizers_of(served), lambda one: one.encode, self.budget)

    def infer(self, served: Served) -> Infer:
        """Infer, at a stage 0 of this model."""
        return Balanced(lambda: self.heads_of(served), lambda one: one.infer, self.budget)

    def explain(self, served: Served) -> Explain:
        """Explain, at a stage 0 of this model."""
        return Balanced(lambda: self.heads_of(served), lambda one: one.explain, self.budget)


class GenerativeTokenizer(Tokenizer):
    """Makes prompts of texts and chats, and texts of tokens."""

    def __init__(self, address: str, lost: Callable[[], None]) -> None:
        super().__init__(address, lost)
        self.encode: CallStream[tokenizer_pb.EncodePromptRequest, tokenizer_pb.EncodePromptResponse]
        self.encode = CallStream(
            self.stub.EncodePromptStream,
            lambda call, request: tokenizer_pb.EncodePromptStreamRequest(
                call=call, request=request
            ),
        )
        self.decode: CallStream[tokenizer_pb.DecodeBatchRequest, tokenizer_pb.DecodeBatchResponse]
        self.decode = CallStream(
            self.stub.DecodeBatchStream,
            lambda call, request: tokenizer_pb.DecodeBatchStreamRequest(call=call, request=request),
        )

    @property
    def outstanding(self) -> int:
        """Calls that it works on."""
        return self.encode.outstanding + self.decode.outstanding

    def drop(self) -> None:
        """Fails the calls that it works on, because it hangs: others are to do them."""
        super().drop()
        self.encode.close()
        self.decode.close()

    async def close(self) -> None:
        """Ends the links."""
        self.encode.close()
        self.decode.close()
        await super().close()


class GenerativeHead(Head):
    """Stage 0 of a model that writes text."""

    def __init__(self, address: str, lost: Callable[[], None]) -> None:
        super().__init__(address, lost)
        self.generate: ServerStreamCalls[shard_pb.GenerateRequest, shard_pb.GenerateResponse]
        self.generate = ServerStreamCalls(
            self.stub.GenerateStream,
            lambda call, request: shard_pb.GenerateStreamRequest(call=call, request=request),
        )

    @property
    def outstanding(self) -> int:
        """Calls that it works on."""
        return self.generate.outstanding

    def drop(self) -> None:
        """Fails the calls that it works on, because it hangs: others are to do them."""
        super().drop()
        self.generate.close()

    async def close(self) -> None:
        """Ends the links."""
        self.generate.close()
        await super().close()


class GenerativePair(Pair[GenerativeTokenizer, GenerativeHead]):
    """The services of a model that writes text: after a prompt, or about sound or a picture."""

    def __init__(self, role: Role, tokenizers: str, heads: str, poll_seconds: float) -> None:
        """`tokenizers`, `heads`: addresses as the settings have them."""
        super().__init__(
            shard_pb.MODEL_KIND_GENERATIVE,
            Replicas(split_addresses(tokenizers), lambda at: GenerativeTokenizer(at, self.lost)),
            Replicas(split_addresses(heads), lambda at: GenerativeHead(at, self.lost)),
            poll_seconds,
            role=role,
        )

    def encode(self, served: Served) -> EncodePrompt:
        """EncodePrompt, at a tokenizer of this model."""
        return Balanced(lambda: self.tokenizers_of(served), lambda one: one.encode, self.budget)

    def decode(self, served: Served) -> DecodeBatch:
        """DecodeBatch, at a tokenizer of this model."""
        return Balanced(lambda: self.tokenizers_of(served), lambda one: one.decode, self.budget)

    def tokenizer(self, served: Served) -> GenerativeTokenizer:
        """A tokenizer of this model."""
        return choose(self.tokenizers_of(served))

    def head(self, served: Served) -> GenerativeHead:
        """The stage 0 of this model that is to write a text: its keys and values are there."""
        return choose(self.heads_of(served))


class EncoderPair(Pair[ExtractiveTokenizer, ExtractiveHead]):
    """The stages of the bundled encoder. There is no tokenizer service: the gateway has it."""

    def __init__(self, settings: GatewaySettings) -> None:
        super().__init__(
            shard_pb.MODEL_KIND_EMBEDDING,
            Replicas((), lambda at: ExtractiveTokenizer(at, self.lost)),
            Replicas(
                split_addresses(settings.encoder_stages), lambda at: ExtractiveHead(at, self.lost)
            ),
            settings.poll_seconds,
            BUNDLED_NAME,
        )
        self.tokenizer: EncoderTokenizer | None = None
        """None until it has been read."""
        self.serving = asyncio.Event()
        """Set while there are stages that serve."""
        self._own: tokenizer_pb.TokenizerServiceDescribeResponse | None = None

    async def look(self) -> None:
        """Looks at the stages; at the tokenizer, too, the first time."""
        if self._own is None:
            try:
                self.tokenizer, self._own = await asyncio.to_thread(_own_tokenizer)
            except (EncoderError, CheckpointError) as error:
                log.warning("documents are found by their words only: %s", error)
                self._own = tokenizer_pb.TokenizerServiceDescribeResponse()
        await super().look()

    def _judge(self) -> None:
        super()._judge()
        if self.served is None:
            self.serving.clear()
        else:
            self.serving.set()

    def told_tokenizers(
        self,
    ) -> Sequence[tuple[ExtractiveTokenizer | None, tokenizer_pb.TokenizerServiceDescribeResponse]]:
        """The gateway's own."""
        return [] if self._own is None else [(None, self._own)]

    def infer(self, served: Served) -> Infer:
        """Infer, at a stage 0 of the encoder."""
        return Balanced(lambda: self.heads_of(served), lambda one: one.infer, self.budget)


def _own_tokenizer() -> tuple[EncoderTokenizer, tokenizer_pb.TokenizerServiceDescribeResponse]:
    folder = bundled_folder()
    tokenizer = EncoderTokenizer(folder)
    return tokenizer, tokenizer_pb.TokenizerServiceDescribeResponse(
        model_fingerprint=model_fingerprint(folder),
        tokenizer_fingerprint=tokenizer_fingerprint(folder),
        kind=shard_pb.MODEL_KIND_EMBEDDING,
        max_length=LONGEST_TOKENS,
    )


def _writing(
    role: Role, tokenizers: str, heads: str, settings: GatewaySettings
) -> GenerativePair | None:
    if not heads:
        return None
    return GenerativePair(role, tokenizers, heads, settings.poll_seconds)


class Models:
    """The pairs that the settings name; at least one that answers."""

    def __init__(self, settings: GatewaySettings) -> None:
        self.extractive = ExtractivePair(settings) if settings.shard else None
        self.generative = _writing(
            "generative", settings.generator_tokenizer, settings.generator_shard, settings
        )
        self.transcribing = _writing(
            "transcribing", settings.transcriber_tokenizer, settings.transcriber_shard, settings
        )
        self.captioning = _writing(
            "captioning", settings.captioner_tokenizer, settings.captioner_shard, settings
        )
        self.encoder = EncoderPair(settings) if settings.encoder_stages else None
        self.pairs: list[Pair[Any, Any]] = [
            pair
            for pair in (self.extractive, self.generative, self.transcribing, self.captioning)
            if pair is not None
        ]
        """Of the models that answer."""
        self.all: list[Pair[Any, Any]] = [*self.pairs]
        """The encoder, too, without which the gateway is ready as well."""
        if self.encoder is not None:
            self.all.append(self.encoder)

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
        for pair in self.all:
            pair.start()

    async def close(self) -> None:
        """Stops watching and closes the links."""
        await asyncio.gather(*(pair.close() for pair in self.all))
