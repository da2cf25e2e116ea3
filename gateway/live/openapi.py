"""The part of the OpenAPI document that tells of live figures and traces."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from gateway.errors import KINDS
from gateway.http.problems import MEDIA_TYPE
from gateway.live.views import Live, TraceList, TraceView

Json = dict[str, Any]
_REF = "#/components/schemas/{model}"
_MODELS = (Live, TraceList, TraceView)


def live_paths() -> Json:
    """The paths /v1/live and below /v1/traces."""
    identifier: Json = {
        "name": "trace_id",
        "in": "path",
        "required": True,
        "description": "32 hex digits, such as X-Trace-ID holds.",
        "schema": {"type": "string"},
    }
    return {
        "/v1/live": _get(
            "live", "Live figures: requests of the last minute, and what every stage does", "Live"
        ),
        "/v1/traces": _get(
            "listTraces",
            "Traces of recent requests: some of them, or all sampled ones",
            "TraceList",
        ),
        "/v1/traces/{trace_id}": _get(
            "describeTrace",
            "Where a request's time went, service by service",
            "TraceView",
            404,
            parameters=[identifier],
        ),
    }


def live_schemas() -> Json:
    """What these paths answer."""
    _, document = TypeAdapter.json_schemas(
        [(model, "serialization", TypeAdapter(model)) for model in _MODELS], ref_template=_REF
    )
    schemas: Json = document["$defs"]
    return schemas


def _get(operation: str, summary: str, answer: str, *statuses: int, **more: Any) -> Json:
    problems: Json = {
        str(status): {
            "description": "; ".join(k.title for k in KINDS.values() if k.status == status),
            "content": {MEDIA_TYPE: {"schema": {"$ref": _REF.format(model="Problem")}}},
        }
        for status in (*statuses, 500)
    }
    body: Json = {"application/json": {"schema": {"$ref": _REF.format(model=answer)}}}
    return {
        "get": {
            "operationId": operation,
            "summary": summary,
            "tags": ["service"],
            "responses": {"200": {"description": f"{summary}.", "content": body}, **problems},
            **more,
        }
    }
