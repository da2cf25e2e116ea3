"""A file's way to features, a window at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import grpc
from grpc import aio
from opentelemetry import trace
from opentelemetry.trace import SpanKind, Status, StatusCode

from gateway.calling import MARGIN_SECONDS, RETRY_PAUSE_SECONDS, call_id, time_left
from gateway.errors import FieldError, GatewayError, from_rpc
from gateway.models import GenerativePair
from gateway.schema import invalid
from gateway.served import Media, Served
from miaotui.telemetry import inject_context
from miaotui.v1 import tokenizer_pb2 as tokenizer_pb

_tracer = trace.get_tracer("miaotui.gateway")
_NAME = "miaotui.v1.TokenizerService/ExtractFeatures"


def media_of(served: Served) -> Media:
    """What is known of a model that hears or sees."""
    assert served.writing is not None
    assert served.writing.media is not None, "the pair's role"
    return served.writing.media


async def read_file(
    pair: GenerativePair, served: Served, data: bytes, request_id: str, deadline: float, place: str
) -> AsyncGenerator[tokenizer_pb.ExtractFeaturesResponse]:
    """The features of a file: of sound a window after the other, each made when it is asked for.

    Where a tokenizer is lost before the first window, another one is asked. `deadline` on the
    event loop's clock; `place`: a JSON pointer to the file, for errors. Raises `GatewayError`.
    """
    most = media_of(served).max_file_bytes
    if most and len(data) > most:
        raise invalid([FieldError(place, f"has more than {most} bytes")])
    # Not the current span: a generator's code runs in its caller's context.
    span = _tracer.start_span(_NAME, kind=SpanKind.CLIENT)
    metadata = tuple(inject_context(trace.set_span_in_context(span)).items())
    windows = 0
    try:
        for last in (False, True):
            request = tokenizer_pb.ExtractFeaturesRequest(request_id=call_id(request_id), file=data)
            replica = pair.tokenizer(served)
            call = replica.stub.ExtractFeatures(
                request, timeout=time_left(deadline), metadata=metadata
            )
            try:
                async for window in call:
                    windows += 1
                    yield window
                return
            except aio.AioRpcError as error:
                replica.ended(error)
                again = error.code() is grpc.StatusCode.UNAVAILABLE and not windows
                if last or not again:
                    span.set_status(Status(StatusCode.ERROR, error.code().name))
                    raise _told(error, place) from None
            finally:
                call.cancel()
            await asyncio.sleep(RETRY_PAUSE_SECONDS)
            await pair.check_still(served, time_left(deadline) - MARGIN_SECONDS)
    finally:
        span.set_attribute("miaotui.windows", windows)
        span.end()


def _told(error: aio.AioRpcError, place: str) -> GatewayError:
    if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
        # "file: is broken", in the service's words.
        detail = (error.details() or "cannot be read").removeprefix("file: ")
        return invalid([FieldError(place, detail)])
    return from_rpc(error, "tokenizer")
