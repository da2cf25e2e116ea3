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

from gateway.errors import GatewayError

T = TypeVar("T")
JSON = "application/json"
SSE = "text/event-stream"


def request_id(request: Request) -> str:
    """The request's id."""
    return str(request.scope["state"]["request_id"])


def json_response(body: bytes, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON body that no cache keeps."""
    return Response(body, headers={"Cache-Control": "no-store", **(headers or {})}, media_type=JSON)


def timeout_given(request: Request, longest: float) -> float | None:
    """The caller's X-Request-Timeout in seconds. Raises `GatewayError` (invalid-header)."""
    given = request.headers.get("x-request-timeout")
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
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise GatewayError("client-closed", "The caller went away.")
        return task.result()
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait((task,))


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
