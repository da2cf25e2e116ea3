"""Errors, by where they come from, and in the shape that their path speaks."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.responses import Response

from gateway.errors import GatewayError
from gateway.http.openai.errors import error_response, speaks_openai
from gateway.http.problems import problem_response


def failure_response(
    path: str, error: GatewayError, request_id: str, headers: dict[str, str] | None = None
) -> Response:
    """OpenAI's shape on the paths that are OpenAI's, problem details (RFC 9457) elsewhere."""
    if error.kind.slug == "unauthenticated":
        headers = {**(headers or {}), "WWW-Authenticate": 'Bearer realm="miaotui"'}
    if speaks_openai(path):
        return error_response(error, headers)
    return problem_response(error, request_id, headers)


def from_routing(error: HTTPException) -> GatewayError:
    """What Starlette's router raises where it finds no endpoint."""
    if error.status_code == 405:
        return GatewayError("method-not-allowed", "This path knows other methods.")
    if error.status_code == 404:
        return GatewayError("not-found", "Nothing is served under this path.")
    return GatewayError("internal", "Something went wrong that should not.")
