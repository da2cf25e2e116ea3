"""What comes over the wire has bounds: path, headers and trailers, in bytes and in time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import grpc
import pytest

from miaotui.v1 import gateway_pb2 as pb
from miaotui.v1 import gateway_pb2_grpc
from services.rpc.channel import open_channel
from tests.gateway.conftest import Gateway, run_gateway
from tests.gateway.fakes import Fakes

LIMIT = 8192


@pytest.fixture(scope="module")
async def narrow(
    all_fakes: Fakes, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Gateway]:
    directory: Path = tmp_path_factory.mktemp("narrow")
    settings = {"HEADER_TIMEOUT": "2", "UPLOAD_TIMEOUT": "2", "BODY_TIMEOUT": "60"}
    async with run_gateway(
        all_fakes, directory, MAX_HEADER_BYTES=str(LIMIT), **settings
    ) as running:
        yield running


async def talk(gateway: Gateway, *pieces: bytes, pause: float = 0.0) -> bytes:
    """Sends the pieces and returns all that comes until the gateway closes it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    received = bytearray()

    async def listen() -> None:
        with suppress(ConnectionError):
            while piece := await reader.read(65536):
                received.extend(piece)

    listening = asyncio.create_task(listen())
    try:
        async with asyncio.timeout(30):
            for piece in pieces:
                if listening.done():
                    break
                writer.write(piece)
                with suppress(ConnectionError):
                    await writer.drain()
                await asyncio.sleep(pause)
            await listening
    finally:
        listening.cancel()
        writer.close()
    return bytes(received)


def split(response: bytes) -> tuple[int, dict[str, str]]:
    """Status and problem document of a response that is all there is."""
    head, _, body = response.partition(b"\r\n\r\n")
    assert b"connection: close" in head.lower()
    assert b"application/problem+json" in head
    return int(head.split()[1]), json.loads(body)


HEAD = b"GET /healthz HTTP/1.1\r\nHost: x\r\n"


@pytest.mark.parametrize(
    "pieces",
    [
        [HEAD, b"a: " + b"x" * (LIMIT + 1) + b"\r\n\r\n"],
        [HEAD, *[b"h%d: value\r\n" % n for n in range(LIMIT // 12)], b"\r\n"],
        [HEAD, b"endless: ", *[b"x" * 65536] * 20],
        [b"GET /" + b"x" * (LIMIT + 1) + b" HTTP/1.1\r\nHost: x\r\n\r\n"],
        [b"GET /", *[b"x" * 65536] * 20],
    ],
    ids=["one long", "many short", "endless header", "long path", "endless path"],
)
async def test_headers_beyond_the_limit_get_431(narrow: Gateway, pieces: list[bytes]) -> None:
    response = await talk(narrow, *pieces)
    # A client that goes on sending may see its connection reset before it reads.
    if response:
        status, problem = split(response)
        assert (status, problem["type"]) == (431, "/problems/headers-too-large")
        assert str(LIMIT) in problem["detail"]
    assert (await narrow.http.get("/healthz")).status_code == 200


async def test_headers_below_the_limit_pass(narrow: Gateway) -> None:
    headers = {f"x-{n}": "v" * 100 for n in range(60)}
    assert (await narrow.http.get("/healthz", headers=headers)).status_code == 200
    # Each request of a connection has the limit to itself, however they come.
    request = HEAD + b"a: " + b"x" * (LIMIT - 1000) + b"\r\n"
    several = (request + b"\r\n") * 5 + request + b"connection: close\r\n\r\n"
    for pieces in ([several], [several[i : i + 1000] for i in range(0, len(several), 1000)]):
        assert (await talk(narrow, *pieces)).count(b"HTTP/1.1 200") == 6


async def test_endless_trailers_are_cut_off(narrow: Gateway) -> None:
    head = b"POST /v1/qa HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    body = b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n"
    trailers = [b"t: " + b"x" * 1000 + b"\r\n"] * 2000
    await talk(narrow, head + body, *trailers)  # were they waited for, it would not close in time


async def test_slow_headers_get_408_and_silence_is_closed(narrow: Gateway) -> None:
    drip = [HEAD, *[b"a: b\r\n"] * 50]
    *responses, _ = await asyncio.gather(
        talk(narrow, *drip, pause=0.1), talk(narrow), talk(narrow, b"GE"), rests(narrow)
    )
    for response in (responses[0], responses[2]):
        status, problem = split(response)
        assert (status, problem["type"]) == (408, "/problems/headers-timeout")
    assert responses[1] == b""


async def rests(gateway: Gateway) -> None:
    """Between requests a connection may rest longer than headers may take."""
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    for pause in (2.3, 0.0):
        writer.write(HEAD + b"\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        while await reader.readline() != b"\r\n":
            pass
        assert await reader.readexactly(len(b'{"status":"ok"}'))
        await asyncio.sleep(pause)
    # A later request's headers have no more time than the first's.
    writer.write(HEAD)
    async with asyncio.timeout(30):
        assert (await reader.read()).startswith(b"HTTP/1.1 408")
    writer.close()


async def test_what_is_no_http_gets_a_problem_document(narrow: Gateway) -> None:
    for noise in (
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"hello\r\n\r\n",
    ):
        status, problem = split(await talk(narrow, noise))
        assert (status, problem["type"]) == (400, "/problems/malformed-http")


async def test_a_dripping_upload_has_an_end(narrow: Gateway) -> None:
    head = (
        b"POST /v1/documents HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n"
        b"Content-Type: multipart/form-data; boundary=b\r\n\r\n"
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.txt"\r\n\r\n'
    )
    response = await talk(narrow, head, *[b"x"] * 50, pause=0.1)
    assert response.startswith(b"HTTP/1.1 408")


async def test_grpc_metadata_has_a_bound(narrow: Gateway) -> None:
    async with open_channel(narrow.grpc_target) as channel:
        stub = gateway_pb2_grpc.GatewayServiceStub(channel)
        metadata = (("x", "v" * 40_000),)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.ListModels(pb.ListModelsRequest(), metadata=metadata, timeout=30)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await stub.ListModels(pb.ListModelsRequest(), timeout=30)).models
