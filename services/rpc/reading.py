"""Requests that are no messages: refused, instead of an internal error and a traceback."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError

from services.rpc.interceptor import Handler, WrappingInterceptor

_PROBLEM = "The bytes are no message of this method, or its text is no UTF-8."


class _Unreadable:
    """Stands for bytes that cannot be read."""


class _UnreadableError(Exception):
    """A message of a stream cannot be read."""


_UNREADABLE = _Unreadable()


class ReadingInterceptor(WrappingInterceptor):
    """Ends a call whose request cannot be read with INVALID_ARGUMENT.

    gRPC itself would answer UNKNOWN or INTERNAL and log a traceback for each.
    """

    def wrap(self, method: str, handler: Handler) -> Handler:
        """Returns a handler with a deserializer that does not raise."""
        deserialize = handler.request_deserializer
        return handler if deserialize is None else _wrap(handler, deserialize)


def _reader(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def read(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError:
            return _UNREADABLE

    return read


async def _refuse(context: Any) -> NoReturn:
    """Ends the call; what follows in a handler must never see what could not be read."""
    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, _PROBLEM)
    raise AssertionError("abort always raises")


async def _checked(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        if request is _UNREADABLE:
            raise _UnreadableError
        yield request


async def _answered(answers: Any, context: Any) -> None:
    """Runs a handler of a stream of responses, which yields them or writes them itself."""
    if isinstance(answers, AsyncIterator):
        async for response in answers:
            await context.write(response)
    else:
        await answers


def _wrap(handler: Handler, deserialize: Callable[[bytes], Any]) -> Handler:
    codec: dict[str, Any] = {
        "request_deserializer": _reader(deserialize),
        "response_serializer": handler.response_serializer,
    }
    inner: Any
    if handler.request_streaming and handler.response_streaming:
        inner = handler.stream_stream

        async def exchanged(requests: Any, context: Any) -> None:
            try:
                await _answered(inner(_checked(requests), context), context)
            except _UnreadableError:
                # Not where it is found: the handler must have ended what it writes.
                await _refuse(context)

        both: Any = exchanged
        return grpc.stream_stream_rpc_method_handler(both, **codec)
    if handler.request_streaming:
        inner = handler.stream_unary

        async def gathered(requests: Any, context: Any) -> Any:
            try:
                return await inner(_checked(requests), context)
            except _UnreadableError:
                await _refuse(context)

        return grpc.stream_unary_rpc_method_handler(gathered, **codec)
    if handler.response_streaming:
        inner = handler.unary_stream

        async def told(request: Any, context: Any) -> None:
            if request is _UNREADABLE:
                await _refuse(context)
            await _answered(inner(request, context), context)

        one: Any = told
        return grpc.unary_stream_rpc_method_handler(one, **codec)
    inner = handler.unary_unary

    async def called(request: Any, context: Any) -> Any:
        if request is _UNREADABLE:
            await _refuse(context)
        try:
            return await inner(request, context)
        except NotImplementedError:
            # As generated code says it, which would be logged as an error of ours.
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "This server has no such method.")

    return grpc.unary_unary_rpc_method_handler(called, **codec)
