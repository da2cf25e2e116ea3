"""The gRPC API: the same answers, rules and errors as over HTTP."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from grpc import aio

from gateway.access.caller import spend
from gateway.access.control import AccessControl
from gateway.access.rpc import RpcGate
from gateway.access.rpc import abort as _abort
from gateway.batch import run_batch
from gateway.desk import Desk
from gateway.errors import FieldError, GatewayError
from gateway.explanation import explanation_to_proto
from gateway.http.middleware import new_request_id
from gateway.http.views import models_of
from gateway.models import Models
from gateway.schema import (
    DEFAULT_TOP_K,
    CacheStatus,
    QaRequest,
    QaResponse,
    invalid,
    parse_request,
)
from gateway.settings import GatewaySettings
from gateway.writing_rpc import WritingRpc, Written
from miaotui.v1 import gateway_pb2 as pb
from miaotui.v1 import gateway_pb2_grpc
from miaotui.v1 import shard_pb2 as shard_pb
from miaotui.v1 import tokenizer_pb2 as tokenizer_pb

SERVICE = "miaotui.v1.GatewayService"
COUNTED = ("Answer", "AnswerBatch", "Write", "Chat")
"""Methods that answer or write."""
Context = aio.ServicerContext[Any, Any]

_CACHE = {
    CacheStatus.MISS: pb.CACHE_STATUS_MISS,
    CacheStatus.HIT: pb.CACHE_STATUS_HIT,
    CacheStatus.SHARED: pb.CACHE_STATUS_SHARED,
    CacheStatus.BYPASS: pb.CACHE_STATUS_BYPASS,
}
_KIND = {
    "extractive": shard_pb.MODEL_KIND_EXTRACTIVE,
    "generative": shard_pb.MODEL_KIND_GENERATIVE,
    "transcribing": shard_pb.MODEL_KIND_GENERATIVE,
    "captioning": shard_pb.MODEL_KIND_GENERATIVE,
}
_NORMALIZATION = {
    tokenizer_pb.NORMALIZATION_UNSPECIFIED: "nfc",
    tokenizer_pb.NORMALIZATION_NONE: "none",
    tokenizer_pb.NORMALIZATION_NFC: "nfc",
    tokenizer_pb.NORMALIZATION_NFKC: "nfkc",
}


# What bytes that are no message are read as, told apart by identity. gRPC itself would
# answer INTERNAL and log a traceback for each.
_UNREADABLE: dict[type[Message], Message] = {
    kind: kind()
    for kind in (
        pb.AnswerRequest,
        pb.AnswerBatchRequest,
        pb.ListModelsRequest,
        pb.WriteRequest,
        pb.ChatRequest,
    )
}


def _reader(kind: type[Message]) -> Callable[[bytes], Message]:
    def read(data: bytes) -> Message:
        try:
            return kind.FromString(data)
        except DecodeError:
            return _UNREADABLE[kind]

    return read


def _check_readable(request: Message) -> None:
    if request is _UNREADABLE[type(request)]:
        name = type(request).DESCRIPTOR.name
        raise GatewayError("malformed-body", f"The bytes are no {name}, or its text is no UTF-8.")


class GatewayServicer(gateway_pb2_grpc.GatewayServiceServicer):
    """GatewayService over the pipeline that HTTP uses too."""

    def __init__(
        self,
        settings: GatewaySettings,
        models: Models,
        desk: Desk,
        access: AccessControl | None = None,
    ) -> None:
        """`access`: who may call; `None`: everybody."""
        self._settings = settings
        self._gate = RpcGate(access)
        self._models = models
        self._desk = desk
        self._writing = WritingRpc(settings, desk.generator)

    def add_to(self, server: aio.Server) -> None:
        """Registers the service's methods."""
        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
        handlers = {
            "Answer": unary(
                self._gate.unary("Answer", self.Answer),
                request_deserializer=_reader(pb.AnswerRequest),
                response_serializer=pb.AnswerResponse.SerializeToString,
            ),
            "AnswerBatch": stream(
                self._gate.stream("AnswerBatch", self.AnswerBatch),
                request_deserializer=_reader(pb.AnswerBatchRequest),
                response_serializer=pb.AnswerBatchResponse.SerializeToString,
            ),
            "Write": stream(
                self._gate.stream("Write", self.Write),
                request_deserializer=_reader(pb.WriteRequest),
                response_serializer=pb.WriteResponse.SerializeToString,
            ),
            "Chat": stream(
                self._gate.stream("Chat", self.Chat),
                request_deserializer=_reader(pb.ChatRequest),
                response_serializer=pb.ChatResponse.SerializeToString,
            ),
            "ListModels": unary(
                self._gate.unary("ListModels", self.ListModels),
                request_deserializer=_reader(pb.ListModelsRequest),
                response_serializer=pb.ListModelsResponse.SerializeToString,
            ),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))

    async def Answer(self, request: pb.AnswerRequest, context: Context) -> pb.AnswerResponse:
        """Answers one question."""
        try:
            _check_readable(request)
            question = self._parse(request, "")
            answer = await self._desk.answer(question, _request_id(context), self._timeout(context))
        except GatewayError as error:
            await _abort(context, error)
        return _response(answer)

    async def AnswerBatch(
        self, request: pb.AnswerBatchRequest, context: Context
    ) -> AsyncIterator[pb.AnswerBatchResponse]:
        """Answers many, each as soon as it is ready."""
        try:
            _check_readable(request)
        except GatewayError as unreadable:
            await _abort(context, unreadable)
        limit = self._settings.max_batch_items
        if not 1 <= len(request.requests) <= limit:
            fault = FieldError("/requests", f"must hold 1 to {limit} questions")
            await _abort(context, invalid([fault]))
        try:
            spend(len(request.requests) - 1)
        except GatewayError as over:
            await _abort(context, over)
        results = run_batch(
            self._desk.answer,
            request.requests,
            lambda index, item: self._parse(item, f"/requests/{index}"),
            _request_id(context),
            self._timeout(context),
            self._settings.batch_concurrency,
        )
        try:
            async for index, outcome in results:
                if isinstance(outcome, QaResponse):
                    yield pb.AnswerBatchResponse(index=index, response=_response(outcome))
                else:
                    code = outcome.kind.code.value[0]
                    error = pb.AnswerError(code=code, message=outcome.message())
                    yield pb.AnswerBatchResponse(index=index, error=error)
        finally:
            await results.aclose()

    async def Write(
        self, request: pb.WriteRequest, context: Context
    ) -> AsyncIterator[pb.WriteResponse]:
        """Continues a prompt."""
        try:
            _check_readable(request)
            async with aclosing(self._written(request, context)) as written:
                async for texts, usage in written:
                    yield pb.WriteResponse(texts=texts, usage=usage)
        except GatewayError as error:
            await _abort(context, error)

    async def Chat(
        self, request: pb.ChatRequest, context: Context
    ) -> AsyncIterator[pb.ChatResponse]:
        """Writes a chat's next message."""
        try:
            _check_readable(request)
            async with aclosing(self._written(request, context)) as written:
                async for texts, usage in written:
                    yield pb.ChatResponse(texts=texts, usage=usage)
        except GatewayError as error:
            await _abort(context, error)

    def _written(
        self, request: pb.WriteRequest | pb.ChatRequest, context: Context
    ) -> AsyncGenerator[Written]:
        return self._writing.written(request, _request_id(context), context.time_remaining())

    async def ListModels(
        self, request: pb.ListModelsRequest, context: Context
    ) -> pb.ListModelsResponse:
        """The models served."""
        models = [
            pb.Model(
                name=model.name,
                fingerprint=model.fingerprint,
                model_type=model.model_type,
                stages=model.stages,
                layers=model.layers,
                max_length=model.max_length,
                ready=model.ready,
                kind=_KIND[model.kind],
            )
            for model in models_of(self._models).models
        ]
        return pb.ListModelsResponse(models=models)

    def _parse(self, request: pb.AnswerRequest, pointer: str) -> QaRequest:
        options = request.text_options
        if options.normalization not in _NORMALIZATION:
            place = f"{pointer}/text_options/normalization"
            raise invalid([FieldError(place, "is none of the known values")])
        data: dict[str, Any] = {
            "question": request.question,
            "context": request.context,
            "top_k": request.top_k or DEFAULT_TOP_K,
            "no_answer_threshold": (
                request.no_answer_threshold if request.HasField("no_answer_threshold") else None
            ),
            "normalization": _NORMALIZATION[options.normalization],
            "strip_markup": options.strip_markup,
            "no_cache": request.no_cache,
            "mode": "generative" if request.generative else "extractive",
            "explain": request.explain,
        }
        if request.max_answer_length:
            data["max_answer_length"] = request.max_answer_length
        return parse_request(data, self._settings, pointer)

    def _timeout(self, context: Context) -> float | None:
        left = context.time_remaining()
        if left is None:
            return None
        return min(max(left, 0.001), self._settings.longest_timeout)


def _request_id(context: Context) -> str:
    metadata = dict(context.invocation_metadata() or ())
    given = metadata.get("x-request-id")
    return new_request_id(given.encode() if isinstance(given, str) else given)


def _response(answer: QaResponse) -> pb.AnswerResponse:
    return pb.AnswerResponse(
        answerable=answer.answerable,
        answers=[
            pb.Answer(text=a.text, start=a.start, end=a.end, score=a.score, logit=a.logit)
            for a in answer.answers
        ],
        no_answer_score=answer.no_answer_score,
        model=answer.model,
        model_fingerprint=answer.model_fingerprint,
        cache=_CACHE[answer.cache],
        timings=[pb.HopTiming(hop=h.hop, milliseconds=h.milliseconds) for h in answer.timings],
        trace_id=answer.trace_id,
        request_id=answer.request_id,
        answer=answer.answer or "",
        citations=[pb.Citation(start=c.start, end=c.end, text=c.text) for c in answer.citations],
        explanation=None
        if answer.explanation is None
        else explanation_to_proto(answer.explanation),
        warnings=[
            pb.InputWarning(kind=w.kind, message=w.message, score=w.score) for w in answer.warnings
        ],
    )
