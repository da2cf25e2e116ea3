"""Reading a request's body within bounds, and JSON that means one thing only."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any, NoReturn

from starlette.requests import Request
from starlette.types import Receive

from gateway.begun import within
from gateway.errors import GatewayError
from gateway.http.exchange import header
from gateway.settings import GatewaySettings

# A client that is still sending cannot read its refusal, and a reset would lose it: so
# this much of a body that is too large is read, for this long, and thrown away.
_DRAIN_FACTOR = 16
_DRAIN_SECONDS = 2.0


async def read_json(request: Request, settings: GatewaySettings) -> Any:
    """The body's JSON. Raises `GatewayError` naming what is wrong with type, size or syntax."""
    _check_type(request)
    return parse_json(await _read(request, settings))


def _check_type(request: Request) -> None:
    media_type, *parameters = (header(request, b"content-type") or "").lower().split(";")
    if media_type.strip() != "application/json":
        raise GatewayError("unsupported-media-type", "The body must be JSON.")
    for parameter in parameters:
        name, _, value = parameter.strip().partition("=")
        if name == "charset" and value.strip('"') not in ("utf-8", "utf8"):
            raise GatewayError("unsupported-media-type", "The body must be in UTF-8.")
    encoding = header(request, b"content-encoding")
    if encoding is not None and encoding.lower() != "identity":
        raise GatewayError("unsupported-media-type", "The body must not be compressed.")


async def _read(request: Request, settings: GatewaySettings) -> bytes:
    limit = settings.max_body_bytes
    if _declares_more(request, limit):
        await _refuse_declared(request, limit)
    try:
        body, more = await within(settings.body_timeout, _received(request.receive, limit))
    except TimeoutError:
        raise GatewayError("body-timeout", "The body stopped on its way.") from None
    if len(body) > limit:
        del body
        if more:
            await _drain(request, limit * _DRAIN_FACTOR)
        raise _too_large(limit)
    return body


async def _received(receive: Receive, limit: int) -> tuple[bytes, bool]:
    """The body, and whether there is more of it: where it has more than `limit` bytes."""
    pieces: list[bytes] = []
    received, more = 0, True
    while more and received <= limit:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise GatewayError("client-closed", "The caller went away.")
        pieces.append(message.get("body", b""))
        received += len(pieces[-1])
        more = message.get("more_body", False)
    return b"".join(pieces), more


async def limited(request: Request, settings: GatewaySettings) -> AsyncGenerator[bytes, None]:
    """The body's pieces as they come, for a body that is not held in memory.

    Raises `GatewayError` where it is too large, does not come at all for a while, or takes too
    long altogether.
    """
    limit = settings.max_body_bytes
    if _declares_more(request, limit):
        await _refuse_declared(request, limit)
    received = 0
    more = True
    loop = asyncio.get_running_loop()
    end = loop.time() + settings.upload_timeout
    while more:
        try:
            async with asyncio.timeout_at(min(loop.time() + settings.body_timeout, end)):
                message = await request.receive()
        except TimeoutError:
            raise GatewayError("body-timeout", "The body stopped on its way.") from None
        if message["type"] == "http.disconnect":
            raise GatewayError("client-closed", "The caller went away.")
        received += len(message.get("body", b""))
        more = message.get("more_body", False)
        if received > limit:
            if more:
                await _drain(request, limit * _DRAIN_FACTOR)
            raise _too_large(limit)
        yield message.get("body", b"")


def _declares_more(request: Request, limit: int) -> bool:
    declared = header(request, b"content-length") or ""
    return declared.isdecimal() and (len(declared) > 18 or int(declared) > limit)


async def _refuse_declared(request: Request, limit: int) -> NoReturn:
    # With "Expect: 100-continue" nothing has been sent yet, nor need it be.
    if "expect" not in request.headers:
        await _drain(request, limit * _DRAIN_FACTOR)
    raise _too_large(limit)


def _too_large(limit: int) -> GatewayError:
    return GatewayError("body-too-large", f"The body has more than {limit} bytes.")


async def _drain(request: Request, limit: int) -> None:
    try:
        async with asyncio.timeout(_DRAIN_SECONDS):
            while limit > 0:
                message = await request.receive()
                limit -= len(message.get("body", b""))
                if not message.get("more_body", False):
                    return
    except TimeoutError:
        return


def parse_json(body: bytes) -> Any:
    """JSON by the letter: UTF-8, no field twice, no NaN. Raises `GatewayError`."""
    try:
        return _DECODER.decode(body.decode("utf-8"))
    except UnicodeDecodeError:
        raise _malformed("it is not UTF-8.") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise _malformed(f"the syntax is wrong at {place}.") from None
    except RecursionError:
        raise _malformed("it is nested too deeply.") from None
    except ValueError:
        # Python refuses to read integers of thousands of digits.
        raise _malformed("a number is too long.") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise _malformed("an object holds the same field twice.")
    return fields


def _no_constant(_: str) -> NoReturn:
    raise _malformed("NaN and Infinity are not JSON.")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


def _malformed(what: str) -> GatewayError:
    return GatewayError("malformed-body", f"The body cannot be read: {what}")
