"""Exits with 0 where a service is healthy: for containers, which need no other tool then.

`python -m services.rpc.probe TARGET…`: a target is host:port (gRPC's health protocol, over TLS
where `MIAOTUI_TLS_DIR` is set) or the URL of a readiness endpoint. The first target that
something listens on decides, so that one image can name the ports of all its roles.
"""

from __future__ import annotations

import http.client
import socket
import ssl
import sys
from collections.abc import Sequence
from urllib.parse import urlsplit

import grpc
from grpc_health.v1 import health_pb2

from services.rpc.tls import blocking_channel

SECONDS = 3.0


def healthy(target: str) -> bool | None:
    """Whether `target` serves; `None` where nothing listens there."""
    address = urlsplit(target if "://" in target else f"grpc://{target}")
    host, port = address.hostname or "127.0.0.1", address.port or 80
    try:
        socket.create_connection((host, port), SECONDS).close()
    except OSError:
        return None
    if address.scheme == "grpc":
        return _grpc(f"{host}:{port}")
    return _http(host, port, address.path or "/", tls=address.scheme == "https")


def _grpc(target: str) -> bool:
    with blocking_channel(target) as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        try:
            status: int = check(health_pb2.HealthCheckRequest(), timeout=SECONDS).status
        except grpc.RpcError as error:
            print(f"{target}: {error.code().name}: {error.details()}", file=sys.stderr)
            return False
    return status == health_pb2.HealthCheckResponse.SERVING


def _http(host: str, port: int, path: str, *, tls: bool) -> bool:
    connection = http.client.HTTPConnection(host, port, timeout=SECONDS)
    if tls:
        # It asks the machine that it runs on, and tells it nothing: no name to verify.
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        connection = http.client.HTTPSConnection(host, port, timeout=SECONDS, context=context)
    try:
        connection.request("GET", path)
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        print(f"{host}:{port}{path}: {error}", file=sys.stderr)
        return False
    finally:
        connection.close()
    if status != 200:
        print(f"{host}:{port}{path}: {status}", file=sys.stderr)
    return status == 200


def main(targets: Sequence[str]) -> int:
    """The exit code: 0 healthy, 1 not, 2 for no target."""
    if not targets:
        print("usage: python -m services.rpc.probe TARGET…", file=sys.stderr)
        return 2
    for target in targets:
        answer = healthy(target)
        if answer is not None:
            return 0 if answer else 1
    print(f"nothing listens on {', '.join(targets)}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
