"""Server side of every gRPC service: health, reflection, tracing and a clean stop."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Awaitable, Callable

from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import start_http_server

from services.rpc.channel import COMMON_OPTIONS, Options
from services.rpc.reading import ReadingInterceptor
from services.rpc.tls import server_credentials
from services.rpc.tracing import TracingInterceptor
from services.rpc.vanished import expect_callers_to_vanish

log = logging.getLogger(__name__)

SERVER_OPTIONS: Options = [
    *COMMON_OPTIONS,
    ("grpc.http2.min_ping_interval_without_data_ms", 500),
    # Two processes on one port would each get half of the requests, silently.
    ("grpc.so_reuseport", 0),
]


class AddressInUseError(OSError):
    """The listen address cannot be bound."""


class RpcServer:
    """A `grpc.aio` server with health checking, reflection and traced methods.

    Health is NOT_SERVING until `set_serving(True)`.
    """

    def __init__(self, service_name: str, *more: str) -> None:
        """`service_name`: full protobuf name, such as "miaotui.v1.ShardService".

        `more`: further services of the server, whose health is the same.
        """
        expect_callers_to_vanish()
        self.service_name = service_name
        self._names = (service_name, *more)
        self.tracing = TracingInterceptor(*self._names)
        self.aio = aio.server(
            interceptors=[ReadingInterceptor(), self.tracing],
            options=SERVER_OPTIONS,
        )
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.aio)
        names = (*self._names, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self.aio)
        self.port = 0

    async def set_serving(self, serving: bool) -> None:
        """Publishes the health of the services and of the whole server ("")."""
        status = (
            health_pb2.HealthCheckResponse.SERVING
            if serving
            else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        for name in (*self._names, ""):
            await self._health.set(name, status)

    async def start(self, listen: str) -> int:
        """Binds `host:port` (port 0: any free one), starts, and returns the port.

        Over TLS where `MIAOTUI_TLS_DIR` is set (services/rpc/tls.py). Raises
        `AddressInUseError` when the address cannot be bound.
        """
        await self.set_serving(False)
        credentials = server_credentials()
        try:
            if credentials is None:
                self.port = self.aio.add_insecure_port(listen)
            else:
                self.port = self.aio.add_secure_port(listen, credentials)
        except RuntimeError as error:
            raise AddressInUseError(
                f"cannot listen on {listen}: the address is in use or not of this machine; "
                "choose another with --listen, or stop the process that holds it"
            ) from error
        await self.aio.start()
        return self.port

    async def stop(self, grace: float) -> None:
        """Takes nothing new, lets running calls finish for `grace` seconds, then ends them."""
        await self._health.enter_graceful_shutdown()
        await self.aio.stop(grace)


def stop_event() -> asyncio.Event:
    """An event that SIGINT and SIGTERM set; call inside the running loop."""
    event = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, event.set)
    return event


async def serve(
    server: RpcServer,
    listen: str,
    *,
    grace: float = 5.0,
    ready: Callable[[], Awaitable[None]] | None = None,
    drain: Callable[[], Awaitable[None]] | None = None,
    metrics_port: int | None = None,
) -> None:
    """Runs a service until SIGINT or SIGTERM.

    `ready` runs after the port is bound; without one the service is healthy at once.
    `drain` runs before the server stops. `metrics_port` serves Prometheus metrics.
    """
    stopping = stop_event()
    port = await server.start(listen)
    if metrics_port is not None:
        start_http_server(metrics_port)
    log.info("%s listens on %s (port %d)", server.service_name, listen, port)
    if ready is None:
        await server.set_serving(True)
    else:
        await ready()
    await stopping.wait()
    log.info("stopping: finishing running calls for up to %.0f s", grace)
    if drain is not None:
        await drain()
    await server.stop(grace)


def run(main: Callable[[], Awaitable[None]]) -> int:
    """Runs an asyncio main on uvloop and returns a process exit code."""
    import uvloop

    async def entry() -> None:
        await main()

    try:
        uvloop.run(entry())
    except KeyboardInterrupt:
        return 130
    except (AddressInUseError, ValueError, FileNotFoundError) as error:
        log.error("%s", error)
        return 2
    return 0
