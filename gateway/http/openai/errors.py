"""Errors in OpenAI's shape, by which its clients choose the exception that they raise."""

from __future__ import annotations

import re
from typing import Any

from pydantic_core import to_json
from starlette.responses import Response

from gateway.errors import GatewayError

# Other statuses than for problem details: OpenAI's clients know 400 and 429 better.
_STATUSES = {"invalid-request": 400, "context-too-long": 400, "overloaded": 429}
_CODES = {
    "unauthenticated": "invalid_api_key",
    "rate-limited": "rate_limit_exceeded",
    "quota-exceeded": "insufficient_quota",
    "invalid-request": None,
    "context-too-long": "context_length_exceeded",
    "overloaded": "rate_limit_exceeded",
}
# All paths under these answer in this shape.
_PATHS = re.compile(r"/v1/(chat/|completions$|audio/|models/)")


def speaks_openai(path: str) -> bool:
    """Whether errors under this path have OpenAI's shape."""
    return _PATHS.match(path) is not None


def status_of(error: GatewayError) -> int:
    """The HTTP status."""
    return _STATUSES.get(error.kind.slug, error.kind.status)


def error_body(error: GatewayError) -> dict[str, Any]:
    """`{"error": {"message", "type", "param", "code"}}`; holds nothing that was sent."""
    status, slug = status_of(error), error.kind.slug
    kind = "rate_limit_error" if status == 429 else "server_error"
    if status < 500 and status != 429:
        kind = "invalid_request_error"
    param = next((fault.pointer for fault in error.errors if fault.pointer), None)
    message = error.message() if error.errors else f"{error.detail} {error.kind.advice}"
    return {
        "error": {
            "message": message,
            "type": kind,
            "param": None if param is None else _path(param),
            "code": _CODES.get(slug, slug.replace("-", "_")),
        }
    }


def error_response(error: GatewayError, headers: dict[str, str] | None = None) -> Response:
    """The HTTP response for an error."""
    headers = {**(headers or {}), "Cache-Control": "no-store"}
    status = status_of(error)
    if (seconds := error.retry_after) is not None:
        headers["Retry-After"] = str(seconds)
    return Response(to_json(error_body(error)), status, headers, "application/json")


def _path(pointer: str) -> str:
    """A JSON pointer as OpenAI writes it: `messages[0].content`."""
    path = ""
    for part in pointer.split("/")[1:]:
        path += f"[{part}]" if part.isdecimal() else f".{part}" if path else part
    return path
