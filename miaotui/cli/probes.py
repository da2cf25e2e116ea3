"""Asks a starting service whether it serves, and if not, why."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import grpc
from grpc import aio

from services.rpc.channel import open_channel

PROBE_SECONDS = 2.0


@dataclass(frozen=True)
class Health:
    """What a probe found."""

    ready: bool
    # Why not; empty where nothing is known yet.
    reason: str = ""
    # Whether waiting cannot help, because the configuration is wrong.
    hopeless: bool = False


Probe = Callable[[], Awaitable[Health]]


def grpc_probe(target: str) -> Probe:
    """A probe by gRPC's health checking protocol."""
    from grpc_health.v1 import health_pb2

    channel: aio.Channel | None = None

    async def probe() -> Health:
        nonlocal channel
        if channel is None:  # needs the running loop
            channel = open_channel(target)
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        try:
            response = await check(health_pb2.HealthCheckRequest(), timeout=PROBE_SECONDS)
        except aio.AioRpcError as error:
            return Health(False, "" if error.code() is grpc.StatusCode.UNAVAILABLE else str(error))
        return Health(response.status == health_pb2.HealthCheckResponse.SERVING)

    return probe


def shard_probe(target: str) -> Probe:
    """Health, and from `Describe` the reason where a stage does not serve."""
    from miaotui.v1 import shard_pb2, shard_pb2_grpc

    check = grpc_probe(target)
    channel: aio.Channel | None = None

    async def probe() -> Health:
        nonlocal channel
        health = await check()
        if health.ready:
            return health
        if channel is None:
            channel = open_channel(target)
        stub = shard_pb2_grpc.ShardServiceStub(channel)
        request = shard_pb2.ShardServiceDescribeRequest()
        try:
            described = await stub.Describe(request, timeout=PROBE_SECONDS)
        except aio.AioRpcError:
            return health
        mismatched = described.status == shard_pb2.STAGE_STATUS_MISMATCHED
        return Health(False, described.reason, hopeless=mismatched)

    return probe


def http_probe(url: str) -> Probe:
    """A probe of an HTTP readiness endpoint: 200 is ready, 503 tells the reason."""
    import httpx

    async def probe() -> Health:
        try:
            async with httpx.AsyncClient(timeout=PROBE_SECONDS, trust_env=False) as client:
                response = await client.get(url)
        except httpx.TransportError:
            return Health(False)
        if response.status_code == 200:
            return Health(True)
        return Health(False, response.text[:300])

    return probe
