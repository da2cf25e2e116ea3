"""Around every HTTP request: its id, its span, its metrics, and a net for errors.

Plain ASGI: Starlette's BaseHTTPMiddleware costs a task and several copies a request, and
OpenTelemetry's ASGI instrumentation adds two spans to each.
"""

from __future__ import annotations

import logging
import os
import re
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.trace import Span, SpanContext, SpanKind, Status, StatusCode
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.errors import GatewayError
from gateway.http.failures import failure_response, from_routing
from gateway.live.lone import LoneSpans
from gateway.live.sampling import RequestSampler
from gateway.metrics import GatewayMetrics
from miaotui.telemetry import context_of, extract_context, traceparent, unrecorded_span

log = logging.getLogger(__name__)

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_METHODS = frozenset(
    ("GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH")
)
# Probes and scrapes come every few seconds and would be most of all traces.
_UNTRACED = frozenset({"/healthz", "/readyz", "/metrics", "/v1/live"})
# The page's files are not requests for an answer, nor is looking at traces.
_UNTRACED_BELOW = ("/web/", "/v1/traces")
_API = "/v1/"
_TRACEPARENT, _TRACESTATE = b"traceparent", b"tracestate"
_SECURITY = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)


def new_request_id(given: bytes | None) -> str:
    """The caller's request id if it is sane (letters, digits, "._-", at most 128), or a new one."""
    if given is not None and _REQUEST_ID.fullmatch(given):
        return given.decode("ascii")
    return os.urandom(16).hex()


class RequestScope:
    """The outermost middleware of the app."""

    def __init__(
        self, app: ASGIApp, metrics: GatewayMetrics, paths: Mapping[Callable[..., Any], str]
    ) -> None:
        """`paths` holds each endpoint's path template, the only path that is ever recorded.

        Make it after telemetry is set up.
        """
        self._app = app
        self._metrics = metrics
        self._paths = paths
        self._tracer = trace.get_tracer("miaotui.gateway")
        sampler = getattr(trace.get_tracer_provider(), "sampler", None)
        self._sampler = sampler if isinstance(sampler, RequestSampler) else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one connection event of the ASGI server."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["app"] = self  # makes Starlette raise its 404 and 405 instead of writing text
        headers: dict[bytes, bytes] = dict(scope["headers"])
        request_id = new_request_id(headers.get(b"x-request-id"))
        scope.setdefault("state", {})["request_id"] = request_id
        method = scope["method"] if scope["method"] in _METHODS else "_OTHER"
        exchange = _Exchange(send, request_id)
        started = time.perf_counter()
        scheme = scope.get("scheme", "http")
        self._metrics.active_requests.add(1, method)
        counted = method == "POST" and scope["path"].startswith(_API)
        if counted:
            self._metrics.live.began()
        try:
            if scope["path"] in _UNTRACED or scope["path"].startswith(_UNTRACED_BELOW):
                await self._run(scope, receive, exchange)
            else:
                await self._traced(scope, receive, exchange, headers, method)
        finally:
            self._metrics.active_requests.add(-1, method)
            seconds = time.perf_counter() - started
            if counted:
                self._metrics.live.ended(seconds, failed=exchange.status >= 500)
            self._metrics.request_duration.record(
                seconds, method, exchange.status, self._route(scope), scheme
            )

    async def _traced(
        self,
        scope: Scope,
        receive: Receive,
        exchange: _Exchange,
        headers: dict[bytes, bytes],
        method: str,
    ) -> None:
        started = time.perf_counter()
        span = self._begin_span(scope, headers, method)
        context = span.get_span_context()
        token = otel_context.attach(context_of(span))
        try:
            exchange.trace_headers(context)
            await self._run(scope, receive, exchange)
            took = time.perf_counter() - started
            if span.is_recording():
                _describe(span, method, self._route(scope), exchange.status)
            elif LoneSpans.wanted(exchange.status, took):
                self._metrics.lone.add(context, method, self._route(scope), exchange.status, took)
        finally:
            otel_context.detach(token)
            span.end()

    def _begin_span(self, scope: Scope, headers: dict[bytes, bytes], method: str) -> Span:
        carrier: dict[str, str] = {}
        if _TRACEPARENT in headers:
            carrier["traceparent"] = headers[_TRACEPARENT].decode("latin-1")
            carrier["tracestate"] = headers.get(_TRACESTATE, b"").decode("latin-1")
        elif self._sampler is not None and self._sampler.drops_next():
            return unrecorded_span()
        attributes: dict[str, Any] = {
            "http.request.method": method,
            "url.scheme": scope.get("scheme", "http"),
            "network.protocol.version": scope.get("http_version", "1.1"),
        }
        if server := scope.get("server"):
            attributes["server.address"], attributes["server.port"] = server[0], server[1] or 0
        if client := scope.get("client"):
            attributes["client.address"] = client[0]
        return self._tracer.start_span(
            method, extract_context(carrier), kind=SpanKind.SERVER, attributes=attributes
        )

    async def _run(self, scope: Scope, receive: Receive, exchange: _Exchange) -> None:
        try:
            await self._app(scope, receive, exchange.send)
        except Exception as error:  # noqa: BLE001 - the last net
            await self._failed(error, scope, receive, exchange)

    async def _failed(
        self, error: Exception, scope: Scope, receive: Receive, exchange: _Exchange
    ) -> None:
        try:
            await self._refused(error, scope, receive, exchange)
        except ClientDisconnect:
            log.debug("the caller of %s was gone before its response", exchange.request_id)
        except Exception as error:  # noqa: BLE001 - as above
            # Code lines only: an exception's message may quote what the caller sent.
            where = "".join(traceback.format_tb(error.__traceback__)[-4:])
            log.error("request %s failed: %s\n%s", exchange.request_id, type(error).__name__, where)
            if exchange.started:
                # Closes the connection: a cut-off response must not look like a whole one.
                raise ConnectionAbortedError("the response had begun") from None
            failure = GatewayError("internal", "Something went wrong that should not.")
            response = failure_response(scope["path"], failure, exchange.request_id)
            await response(scope, receive, exchange.send)

    async def _refused(
        self, error: Exception, scope: Scope, receive: Receive, exchange: _Exchange
    ) -> None:
        """Puts a refusal into words; raises what is none."""
        headers: dict[str, str] = {}
        if isinstance(error, GatewayError):
            failure = error
        elif isinstance(error, HTTPException):
            failure, headers = from_routing(error), dict(error.headers or {})
        else:
            raise error
        if exchange.started:
            raise RuntimeError("refused, and the response had begun")
        response = failure_response(scope["path"], failure, exchange.request_id, headers)
        await response(scope, receive, exchange.send)

    def _route(self, scope: Scope) -> str:
        return self._paths.get(scope.get("endpoint", _nothing), "unmatched")


def _nothing() -> None: ...


def _describe(span: Span, method: str, route: str, status: int) -> None:
    """Tells a span that is recorded what has become of its request."""
    if route != "unmatched":
        # An unmatched path is the caller's text, and may hold anything.
        span.update_name(f"{method} {route}")
        span.set_attribute("http.route", route)
        span.set_attribute("url.path", route)
    span.set_attribute("http.response.status_code", status)
    if status >= 500:
        span.set_status(Status(StatusCode.ERROR))


class _Exchange:
    """The sending half of one request."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self.request_id = request_id
        # What stands when nothing was sent: the caller had gone.
        self.status = 499
        self.started = False
        self._headers = [*_SECURITY, (b"x-request-id", request_id.encode())]

    def trace_headers(self, context: SpanContext) -> None:
        """Adds the ids of the request's span to the response."""
        if context.is_valid:
            header = traceparent(context)
            self._headers += ((b"traceparent", header), (b"x-trace-id", header[3:35]))

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), *self._headers]
            if self.status in (408, 413):
                # What is left of the body must not be read as the next request.
                message["headers"].append((b"connection", b"close"))
        try:
            await self._send(message)
        except RuntimeError as error:
            # uvloop's way to say that the connection is closed.
            if "handler is closed" in str(error):
                raise ClientDisconnect from None
            raise
