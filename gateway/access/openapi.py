"""What the OpenAPI document tells of API keys."""

from __future__ import annotations

from typing import Any

from gateway.access.http import guarded
from gateway.errors import KINDS
from gateway.http.openai.errors import speaks_openai
from gateway.http.problems import MEDIA_TYPE
from gateway.settings import GatewaySettings

Json = dict[str, Any]

SCHEMES: Json = {
    "bearer": {
        "type": "http",
        "scheme": "bearer",
        "description": "An API key of `miaotui keys create`.",
    },
    "apiKey": {
        "type": "apiKey",
        "in": "header",
        "name": "X-API-Key",
        "description": "The same key, for clients that cannot set Authorization.",
    },
}
_HEADERS: dict[int, Json] = {
    401: {"WWW-Authenticate": "Bearer."},
    429: {"Retry-After": "Seconds to wait."},
}


def add_access(paths: Json, settings: GatewaySettings) -> Json:
    """`paths` with what keys add to them: where one is needed, and what it may be answered."""
    for path, item in paths.items():
        for operation in item.values():
            responses = operation["responses"]
            responses.setdefault("431", _response(path, 431))
            if not guarded(path, settings.open_metrics):
                continue
            operation["security"] = [{"bearer": []}, {"apiKey": []}]
            if settings.keys is None:
                operation["security"].insert(0, {})  # none is needed
            for status in (401, 403, 429):
                responses.setdefault(str(status), _response(path, status))
    return paths


def _response(path: str, status: int) -> Json:
    titles = [kind.title for kind in KINDS.values() if kind.status == status]
    # Headers are read before it is known what the path speaks.
    openai = speaks_openai(path) and status != 431
    schema = {"$ref": f"#/components/schemas/{'OpenAiError' if openai else 'Problem'}"}
    response: Json = {
        "description": "; ".join(titles),
        "content": {"application/json" if openai else MEDIA_TYPE: {"schema": schema}},
    }
    if status in _HEADERS:
        response["headers"] = {
            name: {"description": text, "schema": {"type": "string"}}
            for name, text in _HEADERS[status].items()
        }
    return response
