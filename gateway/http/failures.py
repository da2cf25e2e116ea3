"""An error in the shape that its path speaks."""

from __future__ import annotations

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
