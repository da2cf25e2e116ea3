"""A connection may take its time, and a service that was not there is found again at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from services.rpc.certificates import make_certificates
from services.rpc.channel import open_channel
from services.rpc.server import RpcServer
from tests.processes import free_port


@asynccontextmanager
async def slow_relay(port: int, delay: float) -> AsyncIterator[int]:
    """A relay to a port of this machine that passes on what it gets `delay` seconds later."""

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        while data := await reader.read(65536):
            loop.call_later(delay, writer.write, data)
        loop.call_later(delay, writer.close)

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        onward_reader, onward_writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(
            carry(reader, onward_writer), carry(onward_reader, writer), return_exceptions=True
        )

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


async def test_tls_over_a_link_that_takes_seconds_to_connect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attempts must not be given up before such a link, or a busy machine, can answer."""
    make_certificates(tmp_path)
    monkeypatch.setenv("MIAOTUI_TLS_DIR", str(tmp_path))
    server = RpcServer("test.Service")
    port = await server.start("127.0.0.1:0")
    try:
        async with slow_relay(port, 0.9) as slow, open_channel(f"127.0.0.1:{slow}") as channel:
            await asyncio.wait_for(channel.channel_ready(), 60)
    finally:
        await server.stop(0)


async def test_a_service_that_starts_late_is_found_at_once() -> None:
    port = free_port()
    server = RpcServer("test.Service")
    async with open_channel(f"127.0.0.1:{port}") as channel:
        channel.get_state(try_to_connect=True)
        await asyncio.sleep(1.5)
        await server.start(f"127.0.0.1:{port}")
        try:
            began = time.monotonic()
            await asyncio.wait_for(channel.channel_ready(), 60)
            # The longest pause between attempts is 2 s; gRPC's own is two minutes.
            assert time.monotonic() - began < 20
        finally:
            await server.stop(0)
