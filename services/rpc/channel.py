"""Client side of every gRPC link: channels and traced unary calls."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any, Protocol, TypeVar

import grpc
from grpc import aio
from opentelemetry import trace
from opentelemetry.trace import SpanKind, Status, StatusCode

from miaotui.telemetry import inject_context, span_within
from services.rpc.tls import channel_credentials

# Tensors are cut into parts below this (services/shard/codec.py), so it bounds what one
# message can make a peer allocate. gRPC's own default is 4 MiB.
MAX_MESSAGE_BYTES = 64 * 1024 * 1024

Options = list[tuple[str, int | str]]

COMMON_OPTIONS: Options = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # For a peer that has vanished without a FIN. One that hangs is found by the looks that its
    # callers take at it (gateway/upstream.py, services/shard/lanes.py).
    ("grpc.keepalive_time_ms", 2_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]
CHANNEL_OPTIONS: Options = [
    *COMMON_OPTIONS,
    # A stage or service that restarts should be found again at once, not after 2 minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    # Not a pause, in spite of its name, but how long an attempt may take at least: TLS over a
    # slow link, or by a busy machine, takes seconds.
    ("grpc.min_reconnect_backoff_ms", 5_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # Channels of one process must not share a connection that one of them blocks.
    ("grpc.use_local_subchannel_pool", 1),
]

Request = TypeVar("Request", contravariant=True)
Response = TypeVar("Response", covariant=True)


class UnaryMethod(Protocol[Request, Response]):
    """A unary method of an asyncio stub."""

    def __call__(
        self,
        request: Request,
        /,
        *,
        timeout: float | None = None,
        metadata: Any = None,
    ) -> Awaitable[Response]: ...


def open_channel(target: str) -> aio.Channel:
    """An asyncio channel to `host:port`; connects lazily and reconnects by itself.

    Over TLS where `MIAOTUI_TLS_DIR` is set (services/rpc/tls.py).
    """
    tls = channel_credentials()
    if tls is None:
        return aio.insecure_channel(target, options=CHANNEL_OPTIONS)
    credentials, name = tls
    named: Options = [("grpc.ssl_target_name_override", name)] if name else []
    return aio.secure_channel(target, credentials, options=[*CHANNEL_OPTIONS, *named])


_tracer = trace.get_tracer("miaotui.rpc")


async def call(
    method: UnaryMethod[Request, Response],
    request: Request,
    *,
    name: str,
    timeout: float | None,
) -> Response:
    """Calls a unary method inside a client span and sends its trace context along.

    `name` is "package.Service/Method"; `timeout` in seconds. Raises `grpc.aio.AioRpcError`.
    A plain call instead of OpenTelemetry's interceptor, because cancelling an intercepted
    asyncio call leaves the RPC itself running until it is garbage-collected.
    """
    service, _, rpc = name.partition("/")
    attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": rpc}
    with span_within(
        _tracer,
        name,
        kind=SpanKind.CLIENT,
        attributes=attributes,
        record_exception=False,
        set_status_on_exception=False,
    ) as span:
        metadata = tuple(inject_context().items())
        try:
            response = await method(request, timeout=timeout, metadata=metadata)
        except aio.AioRpcError as error:
            code: grpc.StatusCode = error.code()
            span.set_attribute("rpc.grpc.status_code", code.value[0])
            span.set_status(Status(StatusCode.ERROR, code.name))
            raise
        span.set_attribute("rpc.grpc.status_code", 0)
        return response
