"""What endpoints share: ids, deadlines, and callers that go away."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive

from gateway.begun import Begun
from gateway.errors import GatewayError

T = TypeVar("T")
JSON = "application/json"
SSE = "text/event-stream"
_HEADERS = ((b"cache-control", b"no-store"), (b"content-type", JSON.encode()))


def request_id(request: Request) -> str:
    """The request's id."""
    return str(request.scope["state"]["request_id"])


def header(request: Request, name: bytes) -> str | None:
    """The first header of this name (in lower case), without Starlette's case-blind mapping."""
    for known, value in request.scope["headers"]:
        if known == name:
            return str(value, "latin-1")
    return None


class _JsonBody(Response):
    """Knows most of its headers beforehand."""

    media_type = JSON

    def init_headers(self, headers: Mapping[str, str] | None = None) -> None:
        self.raw_headers = [*_HEADERS, (b"content-length", b"%d" % len(self.body))]
        if headers:
            self.headers.update(headers)


def json_response(body: bytes, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON body that no cache keeps."""
    return _JsonBody(body, headers=headers)


def timeout_given(request: Request, longest: float) -> float | None:
    """The caller's X-Request-Timeout in seconds. Raises `GatewayError` (invalid-header)."""
    given = header(request, b"x-request-timeout")
    if given is None:
        return None
    seconds = math.nan
    with suppress(ValueError):
        seconds = float(given)
    if not 0 < seconds <= longest:
        raise GatewayError(
            "invalid-header",
            f"X-Request-Timeout must be a number of seconds above 0 and at most {longest:g}.",
        )
    return seconds


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Awaits `work`, and cancels it when the caller closes the connection."""
    begun = Begun(work)
    if begun.done:
        return begun.result
    task = asyncio.current_task()
    assert task is not None, "somebody awaits this"
    gone = over = False

    def cancel(_: asyncio.Task[None]) -> None:
        nonlocal gone
        if not over:
            gone = True
            task.cancel()

    watch = asyncio.ensure_future(_gone(receive))
    watch.add_done_callback(cancel)
    try:
        result = await begun
    except (Exception, asyncio.CancelledError):
        if not gone:
            raise
    finally:
        over = True
        watch.cancel()
    if not gone:
        return result
    if task.uncancel():
        raise asyncio.CancelledError  # somebody else has cancelled it, too
    raise GatewayError("client-closed", "The caller went away.")


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
