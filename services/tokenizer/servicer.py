"""The gRPC face of the tokenizer: transport only, the work is `miaotui.text`'s."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, NoReturn

import grpc
import numpy as np
from grpc import aio
from opentelemetry import metrics, trace

from miaotui.media.tokenizer import MediaTokenizer
from miaotui.text.detokenize import Detokenizer
from miaotui.text.errors import (
    FingerprintMismatchError,
    TextError,
    TextTooLargeError,
    TokenRangeError,
    WrongModelError,
)
from miaotui.text.prompts import PromptTokenizer
from miaotui.text.tokenizer import TextTokenizer
from miaotui.text.tokens import character_spans
from miaotui.v1 import shard_pb2 as shard_pb
from miaotui.v1 import tokenizer_pb2 as pb
from miaotui.v1 import tokenizer_pb2_grpc
from services.rpc.calls import CallServer
from services.tokenizer.convert import (
    chat_from_proto,
    growth_from_proto,
    ids_to_bytes,
    options_from_proto,
    prompt_options_from_proto,
    sampling_to_proto,
    tokens_from_proto,
    tokens_to_proto,
    window_to_proto,
)
from services.tokenizer.media import MediaReader, features_to_proto, media_to_proto
from services.tokenizer.workers import BusyError, Workers

log = logging.getLogger(__name__)

Context = aio.ServicerContext[Any, Any]

# Of TextError's kinds; the others are INVALID_ARGUMENT.
_STATUSES = (
    (FingerprintMismatchError, grpc.StatusCode.FAILED_PRECONDITION),
    (WrongModelError, grpc.StatusCode.FAILED_PRECONDITION),
    (TokenRangeError, grpc.StatusCode.OUT_OF_RANGE),
    (TextTooLargeError, grpc.StatusCode.RESOURCE_EXHAUSTED),
)


_GENERATIVE_ONLY = "this model finds spans and continues no prompts; ask Encode instead"
_TEXT_ONLY = "this model reads text only; ask the tokenizer of one that hears or sees"
_MEDIA_ONLY = "this model tells of sound or pictures and continues no prompts; set media instead"
_EXTRACTIVE_ONLY = "this model continues prompts and finds no spans; ask EncodePrompt instead"


class TokenizerServicer(tokenizer_pb2_grpc.TokenizerServiceServicer):
    """Implements `miaotui.v1.TokenizerService`."""

    def __init__(
        self,
        tokenizer: TextTokenizer | PromptTokenizer | MediaTokenizer,
        model_fingerprint: str,
        workers: Workers,
        *,
        max_spans: int,
        media: MediaReader | None = None,
    ) -> None:
        """`model_fingerprint`: the one that the shards report; `media`: reads the files for a
        `MediaTokenizer`."""
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer.backend)
        self._workers = workers
        self._media = media
        self._max_spans = max_spans
        self._description = pb.TokenizerServiceDescribeResponse(
            model_fingerprint=model_fingerprint,
            tokenizer_fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
        )
        if isinstance(tokenizer, TextTokenizer):
            self._description.kind = shard_pb.MODEL_KIND_EXTRACTIVE
            self._description.max_length = tokenizer.max_length
            self._description.stride = tokenizer.stride
            self._description.no_answer_thresholds.update(tokenizer.no_answer_thresholds)
            self._description.scripts.update(tokenizer.script_pieces())
        else:
            self._description.kind = shard_pb.MODEL_KIND_GENERATIVE
            self._description.context_length = tokenizer.context_length
            self._description.stop_token_ids.extend(tokenizer.stop_token_ids)
        if isinstance(tokenizer, MediaTokenizer):
            # Whoever asks what is said wants to know the likeliest.
            self._description.sampling.temperature = 0.0
            self._description.media.CopyFrom(media_to_proto(tokenizer))
        elif isinstance(tokenizer, PromptTokenizer):
            self._description.has_chat_template = tokenizer.has_chat_template
            self._description.sampling.CopyFrom(sampling_to_proto(tokenizer.sampling))
        self.calls = {
            "Encode": CallServer(
                "miaotui.v1.TokenizerService/Encode",
                self.Encode,
                lambda status, response: pb.EncodeStreamResponse(call=status, response=response),
            ),
            "EncodePrompt": CallServer(
                "miaotui.v1.TokenizerService/EncodePrompt",
                self.EncodePrompt,
                lambda status, response: pb.EncodePromptStreamResponse(
                    call=status, response=response
                ),
            ),
            "DecodeBatch": CallServer(
                "miaotui.v1.TokenizerService/DecodeBatch",
                self.DecodeBatch,
                lambda status, response: pb.DecodeBatchStreamResponse(
                    call=status, response=response
                ),
            ),
        }
        meter = metrics.get_meter("miaotui.tokenizer")
        self._tokens = meter.create_counter(
            "miaotui.tokenizer.tokens", "{token}", "Passage tokens made"
        )
        self._windows = meter.create_counter(
            "miaotui.tokenizer.windows", "{window}", "Windows made"
        )
        self._refused = meter.create_counter(
            "miaotui.tokenizer.refused", "{request}", "Requests refused, by status"
        )

    async def Describe(
        self, request: pb.TokenizerServiceDescribeRequest, context: Context
    ) -> pb.TokenizerServiceDescribeResponse:
        """What this service tokenises for."""
        return self._description

    async def EncodeStream(  # type: ignore[override]
        self, request_iterator: AsyncIterator[pb.EncodeStreamRequest], context: Context
    ) -> None:
        """Encode, many times on one stream."""
        await self.calls["Encode"].serve(request_iterator, context)

    async def EncodePromptStream(  # type: ignore[override]
        self, request_iterator: AsyncIterator[pb.EncodePromptStreamRequest], context: Context
    ) -> None:
        """EncodePrompt, many times on one stream."""
        await self.calls["EncodePrompt"].serve(request_iterator, context)

    async def DecodeBatchStream(  # type: ignore[override]
        self, request_iterator: AsyncIterator[pb.DecodeBatchStreamRequest], context: Context
    ) -> None:
        """DecodeBatch, many times on one stream."""
        await self.calls["DecodeBatch"].serve(request_iterator, context)

    async def drain(self, seconds: float) -> None:
        """Refuses new calls on streams, and lets open ones finish for so many seconds."""
        await asyncio.gather(*(calls.drain(seconds) for calls in self.calls.values()))

    async def Encode(self, request: pb.EncodeRequest, context: Context) -> pb.EncodeResponse:
        """A question and a passage to the model's inputs."""
        # Bytes of int32 ids, so that the size is in tokens, like characters of cost.
        size = len(request.question) + max(len(request.text), len(request.tokenized.input_ids) // 4)
        try:
            return await self._workers.run(size, lambda: self._encode(request))
        except (TextError, BusyError) as error:
            await self._refuse(context, error)

    def _encode(self, request: pb.EncodeRequest) -> pb.EncodeResponse:
        tokenizer = self._tokenizer
        if not isinstance(tokenizer, TextTokenizer):
            raise WrongModelError("question", _EXTRACTIVE_ONLY)
        options = options_from_proto(request.options)
        kind = request.WhichOneof("passage")
        if kind is None:
            raise TextError("passage", "neither text nor tokenized is set; send one of them")
        if kind == "tokenized":
            passage = tokens_from_proto(request.tokenized, "tokenized")
            tokenizer.check_passage(passage, options, field="tokenized")
        else:
            passage = tokenizer.tokenize(request.text, options, field="text")
            self._tokens.add(len(passage))
        question = tokenizer.tokenize(request.question, options, field="question")
        windows = tokenizer.windows(
            question,
            passage,
            max_length=request.max_length or None,
            stride=request.stride if request.HasField("stride") else None,
        )
        self._windows.add(len(windows))
        trace.get_current_span().set_attributes(
            {
                "miaotui.passage.characters": passage.characters,
                "miaotui.passage.tokens": len(passage),
                "miaotui.passage.reused": kind == "tokenized",
                "miaotui.question.tokens": len(question),
                "miaotui.windows": len(windows),
            }
        )
        layout = None
        if request.explain:
            layout = pb.WindowLayout(
                question=tokens_to_proto(question),
                question_position=len(tokenizer.template.before),
                special_tokens=tokenizer.special_tokens,
            )
        return pb.EncodeResponse(
            windows=[window_to_proto(window) for window in windows],
            passage=None if kind == "tokenized" else tokens_to_proto(passage),
            layout=layout,
            unknown_share=tokenizer.unknown_share(question, passage),
        )

    async def EncodePrompt(
        self, request: pb.EncodePromptRequest, context: Context
    ) -> pb.EncodePromptResponse:
        """A text or a chat to a prompt."""
        size = len(request.text) + len(request.media.previous)
        size += sum(len(part.content) for part in request.chat.messages)
        try:
            return await self._workers.run(size, lambda: self._encode_prompt(request))
        except (TextError, BusyError) as error:
            await self._refuse(context, error)

    def _encode_prompt(self, request: pb.EncodePromptRequest) -> pb.EncodePromptResponse:
        kind = request.WhichOneof("prompt")
        if isinstance(self._tokenizer, MediaTokenizer):
            return self._begin_media(self._tokenizer, request)
        if kind == "media":
            raise WrongModelError("media", _TEXT_ONLY)
        tokenizer = self._tokenizer
        if not isinstance(tokenizer, PromptTokenizer):
            raise WrongModelError("prompt", _GENERATIVE_ONLY)
        options = prompt_options_from_proto(request.options)
        if kind == "chat":
            ids = tokenizer.encode_chat(chat_from_proto(request.chat), options)
        elif kind == "text":
            special = not request.HasField("add_special_tokens") or request.add_special_tokens
            ids = tokenizer.encode_text(request.text, options, add_special_tokens=special)
        else:
            raise TextError("prompt", "neither text nor chat is set; send one of them")
        self._tokens.add(len(ids))
        trace.get_current_span().set_attribute("miaotui.prompt.tokens", len(ids))
        return pb.EncodePromptResponse(input_ids=ids_to_bytes(ids))

    def _begin_media(
        self, tokenizer: MediaTokenizer, request: pb.EncodePromptRequest
    ) -> pb.EncodePromptResponse:
        if request.WhichOneof("prompt") != "media":
            raise WrongModelError("prompt", _MEDIA_ONLY)
        wanted = request.media
        ids = tokenizer.begin(
            language=wanted.language,
            translate=wanted.translate,
            previous=wanted.previous,
            detect=wanted.detect,
        )
        return pb.EncodePromptResponse(input_ids=ids_to_bytes(ids))

    async def ExtractFeatures(
        self, request: pb.ExtractFeaturesRequest, context: Context
    ) -> AsyncIterator[pb.ExtractFeaturesResponse]:
        """A file to features."""
        try:
            if self._media is None:
                raise WrongModelError("file", _TEXT_ONLY)
            async with aclosing(self._media.read(request.file)) as windows:
                async for window in windows:
                    yield features_to_proto(window)
        except (TextError, BusyError) as error:
            await self._refuse(context, error)

    async def DecodeBatch(
        self, request: pb.DecodeBatchRequest, context: Context
    ) -> pb.DecodeBatchResponse:
        """New tokens of many sequences to text."""
        size = sum(len(item.token_ids) for item in request.items) // 4 + len(request.pieces)
        try:
            return await self._workers.run(size, lambda: self._decode_batch(request))
        except (TextError, BusyError) as error:
            await self._refuse(context, error)

    def _decode_batch(self, request: pb.DecodeBatchRequest) -> pb.DecodeBatchResponse:
        self._check_count("items", len(request.items))
        self._check_count("pieces", len(request.pieces))
        growths = [growth_from_proto(item, index) for index, item in enumerate(request.items)]
        gained = self._detokenizer.read(growths, keep_special_tokens=request.keep_special_tokens)
        return pb.DecodeBatchResponse(
            items=[
                pb.DecodedItem(
                    text=item.text, prefix_offset=item.prefix_offset, read_offset=item.read_offset
                )
                for item in gained
            ],
            pieces=[self._detokenizer.piece(token) for token in request.pieces],
        )

    async def DecodeSpans(
        self, request: pb.DecodeSpansRequest, context: Context
    ) -> pb.DecodeSpansResponse:
        """Token spans to characters."""
        size = len(request.passage.input_ids) // 4 + len(request.spans)
        try:
            return await self._workers.run(size, lambda: self._decode_spans(request))
        except (TextError, BusyError) as error:
            await self._refuse(context, error)

    def _decode_spans(self, request: pb.DecodeSpansRequest) -> pb.DecodeSpansResponse:
        self._check_count("spans", len(request.spans))
        passage = tokens_from_proto(request.passage, "passage")
        passage.check("passage")
        text = request.text
        if text and len(text) != passage.characters:
            raise TextError(
                "text",
                f"{len(text)} characters, but the passage was made of {passage.characters}; "
                "send the text that was tokenised",
            )
        # int64 first: a uint32 may be too great for an int32.
        first = np.fromiter((span.first for span in request.spans), np.int64)
        last = np.fromiter((span.last for span in request.spans), np.int64)
        starts, ends = character_spans(passage, first, last)
        return pb.DecodeSpansResponse(
            spans=[
                pb.CharacterSpan(start=start, end=end, text=text[start:end])
                for start, end in zip(starts.tolist(), ends.tolist(), strict=True)
            ]
        )

    async def Decode(self, request: pb.DecodeRequest, context: Context) -> pb.DecodeResponse:
        """Token ids to text."""
        try:
            self._check_count("ids", len(request.ids))
            text = self._tokenizer.decode(
                request.ids, skip_special_tokens=request.skip_special_tokens
            )
        except TextError as error:
            await self._refuse(context, error)
        return pb.DecodeResponse(text=text)

    def _check_count(self, field: str, count: int) -> None:
        if count > self._max_spans:
            raise TextTooLargeError(
                field, f"{count}; at most {self._max_spans} are taken, send several requests"
            )

    async def _refuse(self, context: Context, error: TextError | BusyError) -> NoReturn:
        if isinstance(error, BusyError):
            status = grpc.StatusCode.RESOURCE_EXHAUSTED
        else:
            matching = (status for kind, status in _STATUSES if isinstance(error, kind))
            status = next(matching, grpc.StatusCode.INVALID_ARGUMENT)
        self._refused.add(1, {"rpc.grpc.status_code": status.value[0]})
        await context.abort(status, str(error))
