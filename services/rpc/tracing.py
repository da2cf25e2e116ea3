"""Server spans of gRPC methods, within the caller's trace.

OpenTelemetry's own interceptor does the same for about 0.3 ms a call, a tenth of what a whole
request may cost here (measured with `python -m tests.bench`), so this one is small and caches
what it can.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Protocol

import grpc
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.util.types import Attributes

from miaotui.telemetry import extract_context
from services.rpc.interceptor import Handler, WrappingInterceptor

_tracer = trace.get_tracer("miaotui.rpc")
_HEADERS = ("traceparent", "tracestate")

UNSAMPLED = (("traceparent", f"00-{1:032x}-{1:016x}-00"),)
"""Metadata of looks at services, which would drown the traces of requests: flag 00 is "not
sampled"."""


class CallCounters(Protocol):
    """Counts calls."""

    def began(self) -> None:
        """A call came."""

    def ended(self, seconds: float, *, failed: bool) -> None:
        """It is over; `failed`: not by its caller's fault."""


# The server's fault, or of what stands behind it; all others are the caller's doing.
_FAILURES = frozenset(
    (
        *(grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE),
        *(grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.DATA_LOSS),
    )
)


class TracingInterceptor(WrappingInterceptor):
    """Wraps the unary-request methods of `services`; everything else is left as it is."""

    def __init__(self, *services: str) -> None:
        super().__init__()
        self._prefixes = tuple(f"/{service}/" for service in services)
        self._counters: CallCounters | None = None
        self._counted: frozenset[str] = frozenset()

    def count(self, counters: CallCounters, *methods: str) -> None:
        """Counts the calls of these methods ("/package.Service/Method"), before the first."""
        self._counters, self._counted = counters, frozenset(methods)

    def wrap(self, method: str, handler: Handler) -> Handler:
        """Returns the handler inside a span."""
        if handler.request_streaming or not method.startswith(self._prefixes):
            return handler
        counters = self._counters if method in self._counted else None
        return _wrap(method.lstrip("/"), handler, counters)


class _Count:
    """One call, counted."""

    def __init__(self, counters: CallCounters | None) -> None:
        self._counters = counters
        if counters is not None:
            counters.began()
            self._started = time.perf_counter()

    def end(self, code: grpc.StatusCode) -> None:
        if self._counters is not None:
            seconds = time.perf_counter() - self._started
            self._counters.ended(seconds, failed=code in _FAILURES)


def _wrap(name: str, handler: Handler, counters: CallCounters | None) -> Handler:
    codec: dict[str, Any] = {
        "request_deserializer": handler.request_deserializer,
        "response_serializer": handler.response_serializer,
    }
    if handler.response_streaming:
        stream: Any = handler.unary_stream

        async def streamed(request: Any, context: Any) -> AsyncIterator[Any]:
            count, span = _Count(counters), start_server_span(name, context)
            # Never detached: the call's task, and so its context, ends with it, and a generator
            # whose caller went away may be closed in another one.
            otel_context.attach(trace.set_span_in_context(span))
            code = grpc.StatusCode.OK
            try:
                async for response in stream(request, context):
                    yield response
            except BaseException:
                code = _code(context)
                raise
            finally:
                end_server_span(span, code)
                count.end(code)

        return grpc.unary_stream_rpc_method_handler(streamed, **codec)
    unary: Any = handler.unary_unary

    async def called(request: Any, context: Any) -> Any:
        count, code = _Count(counters), grpc.StatusCode.OK
        try:
            with server_span(name, context):
                return await unary(request, context)
        except BaseException:
            code = _code(context)
            raise
        finally:
            count.end(code)

    return grpc.unary_unary_rpc_method_handler(called, **codec)


def start_server_span(name: str, context: Any) -> Span:
    """A server span within the caller's trace; `name` is "package.Service/Method"."""
    carrier = {key: value for key, value in context.invocation_metadata() if key in _HEADERS}
    return _tracer.start_span(
        name, context=extract_context(carrier), kind=SpanKind.SERVER, attributes=_attributes(name)
    )


@cache
def _attributes(name: str) -> Attributes:
    service, _, method = name.partition("/")
    return {"rpc.system": "grpc", "rpc.service": service, "rpc.method": method}


def end_server_span(span: Span, code: grpc.StatusCode) -> None:
    """Ends a server span with the call's status."""
    if span.is_recording():
        span.set_attribute("rpc.grpc.status_code", code.value[0])
        if code is not grpc.StatusCode.OK:
            span.set_status(Status(StatusCode.ERROR, code.name))
    span.end()


@contextmanager
def server_span(name: str, context: Any) -> Iterator[Span]:
    """The server span of one call; `name` is "package.Service/Method"."""
    span = start_server_span(name, context)
    token = otel_context.attach(trace.set_span_in_context(span))
    code = grpc.StatusCode.OK
    try:
        yield span
    except BaseException:
        code = _code(context)
        raise
    finally:
        otel_context.detach(token)
        end_server_span(span, code)


def _code(context: Any) -> grpc.StatusCode:
    """The status that a failed call ends with; an int or None inside of grpc.aio."""
    code = context.code()
    if isinstance(code, grpc.StatusCode):
        return code
    known = {status.value[0]: status for status in grpc.StatusCode}
    if code:
        return known.get(code, grpc.StatusCode.UNKNOWN)
    return grpc.StatusCode.CANCELLED if context.cancelled() else grpc.StatusCode.UNKNOWN
