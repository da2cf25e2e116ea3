"""Bad input over a raw socket: a clear 4xx, no crash, nothing of it echoed or logged."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from gateway.http.middleware import RequestScope
from gateway.metrics import GatewayMetrics
from tests.gateway.conftest import Gateway
from tests.gateway.fakes import Fakes

SECRET = "sesame-7f3a"
GOOD = {"question": "When?", "context": "In 1925."}


@pytest.fixture(autouse=True)
async def _unharmed(gateway: Gateway, fakes: Fakes) -> AsyncIterator[None]:
    yield
    response = await gateway.ask("still there?", "In 1920.", no_cache=True)
    assert response.json()["answers"][0]["text"] == "1920"
    assert SECRET not in gateway.process.log
    assert "Traceback" not in gateway.process.log


async def raw(gateway: Gateway, data: bytes) -> tuple[int, dict[str, str], bytes]:
    """Sends bytes as they are and reads one response."""
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    try:
        writer.write(data)
        await writer.drain()
        async with asyncio.timeout(60):
            status = int((await reader.readline()).split()[1])
            headers = {}
            while (line := await reader.readline()) not in (b"\r\n", b""):
                name, _, value = line.decode().partition(":")
                headers[name.lower()] = value.strip()
            body = await reader.readexactly(int(headers.get("content-length", "0")))
        return status, headers, body
    finally:
        writer.close()


def post(body: bytes, *headers: str, path: str = "/v1/qa") -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: test", f"Content-Length: {len(body)}", *headers]
    if not any(header.lower().startswith("content-type") for header in headers):
        lines.append("Content-Type: application/json")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def check(result: tuple[int, dict[str, str], bytes], status: int, slug: str) -> Any:
    """A whole problem document, which holds nothing that was sent."""
    got, headers, body = result
    assert got == status, body
    assert headers["content-type"] == "application/problem+json"
    problem = json.loads(body)
    assert problem["type"] == f"/problems/{slug}"
    assert problem["status"] == status
    assert problem["title"]
    assert problem["detail"]
    assert problem["instance"].endswith(headers["x-request-id"])
    assert SECRET not in body.decode()
    return problem


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"not json " + SECRET.encode(),
        b'{"question": "' + SECRET.encode() + b'"',
        b'{"question": "\xff\xfe' + SECRET.encode() + b'", "context": "x"}',
        b'{"question": "\x00", "context": "x"}',
        b"\x00" * 100,
        b'\xef\xbb\xbf{"question": "q", "context": "c"}',
        json.dumps(GOOD).encode("utf-16"),
        b'{"question": "q", "question": "r", "context": "c"}',
        b'{"question": "q", "context": "c", "no_answer_threshold": NaN}',
        b'{"question": "q", "context": "c", "no_answer_threshold": -Infinity}',
        b'{"question": "q", "context": "c", "top_k": ' + b"9" * 5000 + b"}",
        b"[" * 30_000,
        b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    ],
    ids=lambda body: repr(body[:24]),
)
async def test_bodies_that_are_not_json(gateway: Gateway, body: bytes) -> None:
    problem = check(await raw(gateway, post(body)), 400, "malformed-body")
    assert problem["errors"] == []


@pytest.mark.parametrize(
    ("change", "pointers"),
    [
        ({"question": ""}, ["/question"]),
        ({"question": " \n\u3000"}, ["/question"]),
        ({"context": ""}, ["/context"]),
        ({"question": None}, ["/question"]),
        ({"question": [SECRET]}, ["/question"]),
        ({"question": {SECRET: 1}}, ["/question"]),
        ({"question": 7, "context": True}, ["/question", "/context"]),
        ({"question": f"{SECRET}\0"}, ["/question"]),
        ({"context": f"{SECRET}\ud800"}, ["/context"]),
        ({"question": SECRET * 100}, ["/question"]),
        ({"context": SECRET * 2000}, ["/context"]),
        ({"top_k": 0}, ["/top_k"]),
        ({"top_k": -1}, ["/top_k"]),
        ({"top_k": 51}, ["/top_k"]),
        ({"top_k": 10**40}, ["/top_k"]),
        ({"top_k": 1.5}, ["/top_k"]),
        ({"top_k": "3"}, ["/top_k"]),
        ({"top_k": True}, ["/top_k"]),
        ({"top_k": None}, ["/top_k"]),
        ({"max_answer_length": -5}, ["/max_answer_length"]),
        ({"max_answer_length": 513}, ["/max_answer_length"]),
        ({"no_answer_threshold": "0"}, ["/no_answer_threshold"]),
        ({"no_answer_threshold": False}, ["/no_answer_threshold"]),
        ({"normalization": SECRET}, ["/normalization"]),
        ({"strip_markup": 1}, ["/strip_markup"]),
        ({"no_cache": "true"}, ["/no_cache"]),
        ({SECRET: 1}, [""]),
        ({"__proto__": {}}, [""]),
    ],
    ids=lambda value: ",".join(map(str, value))[:30],
)
async def test_fields_that_are_not_valid(
    gateway: Gateway, change: dict[str, Any], pointers: list[str]
) -> None:
    body = json.dumps({**GOOD, **change}).encode()
    problem = check(await raw(gateway, post(body)), 422, "invalid-request")
    assert [error["pointer"] for error in problem["errors"]] == pointers
    assert all(error["detail"] for error in problem["errors"])


@pytest.mark.parametrize("body", [b"null", b"7", b'"text"', b"[]", b"1e999"])
async def test_bodies_that_are_no_object(gateway: Gateway, body: bytes) -> None:
    check(await raw(gateway, post(body)), 422, "invalid-request")
    check(await raw(gateway, post(body, path="/v1/qa/batch")), 422, "invalid-request")


async def test_a_number_beyond_float_is_refused(gateway: Gateway) -> None:
    body = b'{"question": "q", "context": "c", "no_answer_threshold": 1e999}'
    problem = check(await raw(gateway, post(body)), 422, "invalid-request")
    assert problem["errors"][0]["pointer"] == "/no_answer_threshold"


@pytest.mark.parametrize(
    "body",
    [
        {"requests": []},
        {"requests": [GOOD] * 41},
        {"requests": GOOD},
        {"requests": None},
        {},
        {"requests": [GOOD], SECRET: 1},
    ],
    ids=["empty", "too many", "object", "null", "missing", "unknown"],
)
async def test_batches_that_are_not_valid(gateway: Gateway, body: dict[str, Any]) -> None:
    data = json.dumps(body).encode()
    check(await raw(gateway, post(data, path="/v1/qa/batch")), 422, "invalid-request")


async def test_batch_items_of_wrong_types_fail_alone(gateway: Gateway) -> None:
    body = {"requests": [None, GOOD, 3, [SECRET], SECRET]}
    response = await gateway.http.post("/v1/qa/batch", json=body)
    lines = {line["index"]: line for line in map(json.loads, response.text.splitlines())}
    assert [i for i, line in sorted(lines.items()) if "error" in line] == [0, 2, 3, 4]
    assert lines[1]["response"]["answers"][0]["text"] == "1925"
    assert SECRET not in response.text


@pytest.mark.parametrize(
    "headers",
    [
        ["Content-Type: text/plain"],
        ["Content-Type: application/x-www-form-urlencoded"],
        ["Content-Type: application/json; charset=utf-16"],
        ["Content-Type:"],
        ["Content-Encoding: gzip"],
    ],
    ids=lambda headers: headers[0],
)
async def test_bodies_of_another_type(gateway: Gateway, headers: list[str]) -> None:
    request = post(json.dumps(GOOD).encode(), *headers)
    check(await raw(gateway, request), 415, "unsupported-media-type")


TEN_MEGABYTES = b'{"question": "' + SECRET.encode() + b"a" * 10_000_000 + b'"}'


async def test_ten_megabytes_are_refused(gateway: Gateway) -> None:
    # 10 MB in kernel buffers and on the way: the refusal must still arrive whole.
    status, headers, body = await raw(gateway, post(TEN_MEGABYTES[: 16 * 65536]))
    check((status, headers, body), 413, "body-too-large")
    assert headers["connection"] == "close"


async def test_ten_megabytes_without_a_length_are_refused_while_they_come(gateway: Gateway) -> None:
    head = b"POST /v1/qa HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    writer.write(head + b"Transfer-Encoding: chunked\r\n\r\n")
    sent = 0
    refusal = b""
    try:
        async with asyncio.timeout(60):
            while sent < len(TEN_MEGABYTES):
                writer.write(b"8000\r\n" + TEN_MEGABYTES[sent : sent + 0x8000] + b"\r\n")
                await writer.drain()
                sent += 0x8000
    except ConnectionError:
        pass
    try:
        async with asyncio.timeout(60):
            refusal = await reader.read(4096)
    except ConnectionError:
        pass
    writer.close()
    # It may be gone with the reset where the client kept on sending; a 200 it must not be.
    assert not refusal or refusal.startswith(b"HTTP/1.1 413 ")


async def test_one_byte_above_the_limit_without_a_length(gateway: Gateway) -> None:
    body = json.dumps(GOOD).encode().ljust(65537)
    head = b"POST /v1/qa HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\n"
    chunk = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    result = await raw(gateway, head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk)
    check(result, 413, "body-too-large")
    allowed = post(json.dumps(GOOD).encode().ljust(65536))
    assert (await raw(gateway, allowed))[0] == 200


async def test_with_expect_continue_nothing_need_be_sent(gateway: Gateway) -> None:
    head = (
        "POST /v1/qa HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\n"
        "Content-Length: 10000000\r\nExpect: 100-continue\r\n\r\n"
    )
    # Were the body waited for, it would be a 408.
    check(await raw(gateway, head.encode()), 413, "body-too-large")


async def test_lengths_that_lie(gateway: Gateway) -> None:
    body = json.dumps(GOOD).encode()
    request = post(body).replace(b"Content-Length: %d" % len(body), b"Content-Length: 5000")
    check(await raw(gateway, request), 408, "body-timeout")
    for length in (b"-1", b"abc", b"99999999999999999999999999"):
        request = post(body).replace(b"Length: %d" % len(body), b"Length: " + length)
        status, _, _ = await raw(gateway, request)
        assert status in (400, 413)


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "1e9", "soon", ""])
async def test_timeouts_that_are_not_valid(gateway: Gateway, value: str) -> None:
    request = post(json.dumps(GOOD).encode(), f"X-Request-Timeout: {value}")
    check(await raw(gateway, request), 400, "invalid-header")


@pytest.mark.parametrize(
    ("line", "status", "slug"),
    [
        (f"GET /{SECRET}", 404, "not-found"),
        (f"GET /v1/qa/{SECRET}/", 404, "not-found"),
        (f"GET /problems/{SECRET}", 404, "not-found"),
        ("GET /%2e%2e/%2e%2e/etc/passwd", 404, "not-found"),
        ("GET /v1/qa", 405, "method-not-allowed"),
        ("DELETE /v1/models", 405, "method-not-allowed"),
    ],
)
async def test_paths_and_methods(gateway: Gateway, line: str, status: int, slug: str) -> None:
    result = await raw(gateway, f"{line} HTTP/1.1\r\nHost: t\r\n\r\n".encode())
    check(result, status, slug)
    assert ("allow" in result[1]) == (status == 405)
    metrics = (await gateway.http.get("/metrics")).text
    assert SECRET not in metrics


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/v1/qa", {"POST"}),
        ("/v1/documents", {"GET", "HEAD", "POST"}),
        ("/v1/documents/x", {"GET", "HEAD", "DELETE"}),
    ],
)
async def test_all_methods_of_a_path_are_named(
    gateway: Gateway, path: str, allowed: set[str]
) -> None:
    response = await gateway.http.patch(path)
    assert response.status_code == 405
    assert set(response.headers["allow"].split(", ")) == allowed


@pytest.mark.parametrize(
    "data", [b"\x00\x01\x02\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"hello\r\n\r\n"]
)
async def test_bytes_that_are_no_http(gateway: Gateway, data: bytes) -> None:
    status, _, _ = await raw(gateway, data)
    assert status == 400


async def test_offsets_outside_of_the_passage_are_no_answer(gateway: Gateway, fakes: Fakes) -> None:
    fakes.tokenizer.faults.shift = 1000
    response = await gateway.ask(SECRET, f"In 1921. {SECRET}")
    assert response.status_code == 502
    assert SECRET not in response.text


async def test_an_internal_error_is_a_problem_and_its_message_stays_unlogged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError(f"unforeseen {SECRET}")

    app = RequestScope(broken, GatewayMetrics(), {})
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
        response = await client.post("/v1/qa", content=SECRET)
    check((response.status_code, dict(response.headers), response.content), 500, "internal")
    assert "RuntimeError" in caplog.text
    assert "in broken" in caplog.text
    assert f"unforeseen {SECRET}" not in caplog.text
