"""TLS between the services: who gets in, who does not, and what the network sees."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import ssl
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import grpc
import httpx
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2

from services.rpc.certificates import make_certificates
from services.rpc.channel import open_channel
from services.rpc.server import RpcServer
from services.rpc.tls import CA, CERTIFICATE, KEY
from tests.deploy.conftest import Stacks
from tests.deploy.stack import answered
from tests.processes import clean_environment

QUESTION = "Who was the first photographer of the mountain?"
CONTEXT = "The lighthouse keeper Wilhelmina Oosterhuis took the first photograph in 1887. " * 4
# Shorter runs of equal bytes turn up in any two captures: headers, zeros, small numbers.
WINDOW = 48


async def health(channel: aio.Channel) -> int:
    """The health behind a channel; raises `grpc.aio.AioRpcError`."""
    async with channel:
        check: aio.UnaryUnaryMultiCallable[
            health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse
        ] = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        return (await check(health_pb2.HealthCheckRequest(), timeout=60)).status


def secure(target: str, ca: Path, own: Path | None) -> aio.Channel:
    """A channel that trusts `ca` and shows the certificate in `own`."""
    files = [own / KEY, own / CERTIFICATE] if own else []
    credentials = grpc.ssl_channel_credentials((ca / CA).read_bytes(), *map(Path.read_bytes, files))
    return aio.secure_channel(target, credentials)


async def refused(channel: aio.Channel) -> str:
    """Why a channel gets no answer; fails where it gets one."""
    with pytest.raises(aio.AioRpcError) as error:
        await health(channel)
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE
    return error.value.details() or ""


@pytest.mark.parametrize("service", ["tokenizer", "shard-0", "shard-1", "gateway"])
async def test_only_clients_of_the_same_authority_get_in(
    stacks: Stacks, service: str, tmp_path: Path
) -> None:
    port = {"tokenizer": "50051", "gateway": "50050"}.get(service, "50060")
    target = stacks.tls.address(service, port)
    ours = stacks.tls.tls_dir
    assert ours is not None
    theirs = tmp_path / "theirs"
    make_certificates(theirs)

    assert await health(secure(target, ours, ours)) == health_pb2.HealthCheckResponse.SERVING
    await refused(aio.insecure_channel(target))
    await refused(secure(target, ours, None))
    await refused(secure(target, ours, theirs))
    assert "CERTIFICATE_VERIFY_FAILED" in await refused(secure(target, theirs, ours))
    # And one in plain text is not afraid of strangers, so that the refusals above mean something.
    plain = stacks.plain.address(service, port)
    assert await health(aio.insecure_channel(plain)) == health_pb2.HealthCheckResponse.SERVING


async def test_miaotui_ask_over_tls(stacks: Stacks) -> None:
    target = stacks.tls.address("gateway", "50050")
    arguments = ["ask", QUESTION, "--context", CONTEXT, "--grpc", target, "--timeout"]

    def ask(timeout: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "miaotui.cli", *arguments, timeout],
            env={**clean_environment(), **environment},
            capture_output=True,
            text=True,
        )

    # In a thread: the relays need this one.
    done = await asyncio.to_thread(ask, "60", MIAOTUI_TLS_DIR=str(stacks.tls.tls_dir))
    assert done.returncode == 0, done.stderr
    assert (await asyncio.to_thread(ask, "1")).returncode != 0


async def test_a_server_by_another_name_is_not_trusted(
    stacks: Stacks, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = stacks.tls.address("tokenizer", "50051")
    monkeypatch.setenv("MIAOTUI_TLS_DIR", str(stacks.tls.tls_dir))
    monkeypatch.setenv("MIAOTUI_TLS_SERVER_NAME", "miaotui")
    assert await health(open_channel(target)) == health_pb2.HealthCheckResponse.SERVING
    monkeypatch.setenv("MIAOTUI_TLS_SERVER_NAME", "tokenizer.example")
    await refused(open_channel(target))


def repeated_bytes(first: bytes, second: bytes) -> int:
    """Bytes of `second` that lie in a run of at least WINDOW equal bytes of `first`."""
    known = {first[at : at + WINDOW] for at in range(len(first) - WINDOW + 1)}
    covered = bytearray(len(second))
    for at in range(len(second) - WINDOW + 1):
        if second[at : at + WINDOW] in known:
            covered[at : at + WINDOW] = b"\1" * WINDOW
    return sum(covered)


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
async def test_the_network_sees_no_text(
    stacks: Stacks, client: httpx.AsyncClient, tls: bool
) -> None:
    stack = stacks.tls if tls else stacks.plain
    relay = stack.relays["tokenizer"]
    await answered(client, stack.url, QUESTION, CONTEXT)
    captured = bytes(relay.seen)
    assert len(captured) > len(CONTEXT)
    for text in (QUESTION, "Wilhelmina Oosterhuis", "miaotui.v1.TokenizerService"):
        assert (text.encode() in captured) is not tls, text


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
async def test_the_network_sees_no_activations(
    stacks: Stacks, client: httpx.AsyncClient, tls: bool
) -> None:
    """The same question gives the same activations: equal bytes again, unless encrypted."""
    stack = stacks.tls if tls else stacks.plain
    relay = stack.relays["shard-1"]
    seen = []
    for _ in range(2):
        before = len(relay.seen)
        reply = await answered(client, stack.url, QUESTION, CONTEXT)
        seen.append(bytes(relay.seen[before:]))
    # 32 wide, in float32.
    tensor = 4 * 32 * 64
    assert min(map(len, seen)) > tensor, reply
    repeated = repeated_bytes(*seen)
    if tls:
        assert repeated == 0
    else:
        assert repeated > tensor


async def test_https_and_redis_over_tls(stacks: Stacks, client: httpx.AsyncClient) -> None:
    url = stacks.tls.url
    assert url.startswith("https://")
    body = {"question": QUESTION, "context": CONTEXT}

    # Making a connection over TLS may take longer than a cache may on a busy machine.
    async def states() -> tuple[str, list[str]]:
        cache = (await client.post(f"{url}/v1/qa", json=body)).json()["cache"]
        metrics = (await client.get(f"{url}/metrics")).text
        up = [line for line in metrics.splitlines() if line.startswith("miaotui_gateway_cache_up{")]
        return cache, [line.split()[-1] for line in up]

    deadline = time.monotonic() + 60
    while (found := await states()) != ("hit", ["1.0"]):
        assert time.monotonic() < deadline, found
        await asyncio.sleep(0.2)
    # Redis itself takes no plain text.
    with socket.create_connection(("127.0.0.1", stacks.tls.redis.port), 5) as plain:
        plain.sendall(b"PING\r\n")
        with suppress(ConnectionResetError):
            assert b"PONG" not in plain.recv(64)
    async with httpx.AsyncClient(trust_env=False) as stranger:
        with pytest.raises(httpx.ConnectError):
            await stranger.get(f"{url}/healthz")
        with pytest.raises(httpx.TransportError):
            await stranger.get(url.replace("https", "http") + "/healthz")


async def test_a_renewed_certificate_needs_no_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served, other = tmp_path / "served", tmp_path / "other"
    make_certificates(served)
    make_certificates(other)
    monkeypatch.setenv("MIAOTUI_TLS_DIR", str(served))
    server = RpcServer("test.Service")
    port = await server.start("127.0.0.1:0")
    await server.set_serving(True)
    target = f"127.0.0.1:{port}"
    try:
        assert await health(open_channel(target)) == health_pb2.HealthCheckResponse.SERVING
        await refused(secure(target, other, other))
        for file in (CA, CERTIFICATE, KEY):
            shutil.copy(other / file, served / file)
        assert await health(secure(target, other, other)) == health_pb2.HealthCheckResponse.SERVING
    finally:
        await server.stop(0)


async def test_one_sided_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_certificates(tmp_path)
    monkeypatch.setenv("MIAOTUI_TLS_DIR", str(tmp_path))
    monkeypatch.setenv("MIAOTUI_TLS_MUTUAL", "false")
    server = RpcServer("test.Service")
    port = await server.start("127.0.0.1:0")
    await server.set_serving(True)
    try:
        channel = secure(f"127.0.0.1:{port}", tmp_path, None)
        assert await health(channel) == health_pb2.HealthCheckResponse.SERVING
        await refused(aio.insecure_channel(f"127.0.0.1:{port}"))
    finally:
        await server.stop(0)


def test_certificates(tmp_path: Path) -> None:
    make_certificates(tmp_path, ("stage-a", "10.1.2.3"))
    assert [os.stat(tmp_path / key).st_mode & 0o777 for key in (KEY, "ca.key")] == [0o600] * 2
    authority = (tmp_path / CA).read_bytes()
    first = (tmp_path / CERTIFICATE).read_bytes()
    make_certificates(tmp_path, ("stage-b",))
    # A machine added later is trusted by those that are there.
    assert (tmp_path / CA).read_bytes() == authority
    assert (tmp_path / CERTIFICATE).read_bytes() != first
    ssl.create_default_context(cafile=tmp_path / CA).load_cert_chain(
        tmp_path / CERTIFICATE, tmp_path / KEY
    )
    (tmp_path / "ca.key").unlink()
    with pytest.raises(ValueError, match="half of the CA"):
        make_certificates(tmp_path)
