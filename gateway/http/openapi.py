"""The OpenAPI document. Written here because the handlers read their bodies themselves:
FastAPI's own reading echoes input in errors, takes any JSON twist, and costs time."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from gateway.access.openapi import SCHEMES, add_access
from gateway.documents.openapi import COLLECTION_EXAMPLE, document_paths, document_schemas
from gateway.errors import KINDS
from gateway.http.openai.document import openai_paths, openai_schemas
from gateway.http.problems import MEDIA_TYPE, Problem
from gateway.http.views import Alive, BatchLine, ModelList, PipelineView, ScenarioList
from gateway.live.openapi import live_paths, live_schemas
from gateway.schema import EXAMPLE_EN, EXAMPLE_ZH, QaRequest, QaResponse
from gateway.settings import GatewaySettings
from miaotui import __version__

Json = dict[str, Any]
_REF = "#/components/schemas/{model}"
_RESPONSE_EXAMPLE: Json = {
    "answerable": True,
    "answers": [{"text": "1925", "start": 44, "end": 48, "score": 0.97, "logit": 14.2}],
    "no_answer_score": -11.8,
    "model": "miaotui-qa-small",
    "model_fingerprint": "3f6c0f7d",
    "cache": "miss",
    "timings": [
        {"hop": "cache", "milliseconds": 0.03},
        {"hop": "tokenizer", "milliseconds": 0.9},
        {"hop": "stage 0", "milliseconds": 4.1},
        {"hop": "total", "milliseconds": 9.7},
    ],
    "trace_id": "4bf92f3577b34da6a3ce929d0e0e4736",
    "request_id": "b0f4a7d2c6e14f0fb2f5d0a8f3f0c9de",
}
_HEADERS: Json = {
    "X-Request-ID": {"description": "The request's id.", "schema": {"type": "string"}},
    "X-Trace-ID": {"description": "The trace's id.", "schema": {"type": "string"}},
    "traceparent": {"description": "W3C trace context.", "schema": {"type": "string"}},
}
_RETRY: Json = {
    "Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer"}},
}


def _ref(name: str) -> Json:
    return {"$ref": _REF.format(model=name)}


def _content(name: str, media_type: str = "application/json", **more: Any) -> Json:
    return {media_type: {"schema": _ref(name), **more}}


def _problems(*statuses: int) -> Json:
    responses: Json = {}
    for status in (*statuses, 500):
        titles = [kind.title for kind in KINDS.values() if kind.status == status]
        responses[str(status)] = {
            "description": "; ".join(titles),
            "headers": {**_HEADERS, **(_RETRY if status == 503 else {})},
            "content": _content("Problem", MEDIA_TYPE),
        }
    return responses


def _get(operation: str, summary: str, tag: str, ok: Json, *statuses: int, **more: Any) -> Json:
    return {
        "get": {
            "operationId": operation,
            "summary": summary,
            "tags": [tag],
            "responses": {"200": ok, **_problems(*statuses)},
            **more,
        }
    }


def _ok(description: str, content: Json) -> Json:
    return {"description": description, "headers": _HEADERS, "content": content}


def openapi_document(settings: GatewaySettings) -> Json:
    """The document; limits come from the settings."""
    request_headers: list[Json] = [
        {
            "name": "X-Request-Timeout",
            "in": "header",
            "description": "Seconds that the answer may take (for each question of a batch).",
            "schema": {
                "type": "number",
                "exclusiveMinimum": 0,
                "maximum": settings.longest_timeout,
                "default": settings.request_timeout,
            },
        },
        {
            "name": "X-Request-ID",
            "in": "header",
            "description": 'Kept if it is letters, digits and "._-", at most 128; else replaced.',
            "schema": {"type": "string"},
        },
        {
            "name": "traceparent",
            "in": "header",
            "description": "W3C trace context that the request joins.",
            "schema": {"type": "string"},
        },
    ]
    post_errors = (400, 408, 413, 415, 422, 502, 503, 504)
    ask: Json = {
        "operationId": "ask",
        "summary": "Answer a question over a passage, or over a collection of documents",
        "description": "With `context`, offsets count Unicode code points of the passage as sent. "
        "Without, the collection's documents are searched, and offsets are those of their text.",
        "tags": ["questions"],
        "parameters": request_headers,
        "requestBody": {
            "required": True,
            "content": _content(
                "AnyQuestion",
                examples={
                    "english": {"summary": "English", "value": EXAMPLE_EN},
                    "chinese": {"summary": "中文", "value": EXAMPLE_ZH},
                    "documents": {"summary": "Your documents", "value": COLLECTION_EXAMPLE},
                },
            ),
        },
        "responses": {
            "200": _ok("The answer.", _content("AnyAnswer", example=_RESPONSE_EXAMPLE)),
            **_problems(*post_errors, 404),
        },
    }
    batch: Json = {
        "operationId": "askBatch",
        "summary": "Answer many questions, each result as it finishes",
        "description": "One line (NDJSON) or event (SSE, with Accept: text/event-stream) a "
        "question, in any order. A question that is not valid or fails gives an error in its "
        "place; the others are not affected.",
        "tags": ["questions"],
        "parameters": request_headers,
        "requestBody": {
            "required": True,
            "content": _content(
                "BatchRequest",
                examples={
                    "both": {
                        "summary": "English and 中文",
                        "value": {"requests": [EXAMPLE_EN, EXAMPLE_ZH]},
                    }
                },
            ),
        },
        "responses": {
            "200": _ok(
                "The results.",
                {
                    "application/x-ndjson": {"schema": _ref("BatchLine")},
                    # Without a type: some take it for the body's, others for an event's.
                    "text/event-stream": {
                        "schema": {
                            "description": 'Events "result" with a BatchLine as data, then "done".',
                        }
                    },
                },
            ),
            **_problems(400, 408, 413, 415, 422),
        },
    }
    text = {"text/plain": {"schema": {"type": "string"}}}
    slug: Json = {"name": "slug", "in": "path", "required": True, "schema": {"type": "string"}}
    anything: Json = {"application/json": {"schema": {"type": "object"}}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Miaotui",
            "version": __version__,
            "description": "Question answering and text generation by models split over several "
            "machines. 秒推：把模型拆分到多台机器上的实时问答与文本生成。",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "tags": [
            {"name": "questions", "description": "Questions and answers"},
            {"name": "documents", "description": "The users' own documents, and search in them"},
            {"name": "texts", "description": "Text generation, as OpenAI's API has it"},
            {"name": "service", "description": "What is served and how it is"},
        ],
        "paths": add_access(
            {
                "/v1/qa": {"post": ask},
                "/v1/qa/batch": {"post": batch},
                **openai_paths(settings, request_headers),
                **document_paths(),
                "/v1/models": _get(
                    *("listModels", "The models served", "service"),
                    _ok("The models.", _content("ModelList")),
                ),
                "/v1/scenarios": _get(
                    *("listScenarios", "Ready prompts for chats", "texts"),
                    _ok("The prompts.", _content("ScenarioList")),
                ),
                "/v1/pipeline": _get(
                    *("describePipeline", "The stages of the model", "service"),
                    _ok("The stages.", _content("PipelineView")),
                ),
                **live_paths(),
                "/healthz": _get(
                    *("alive", "Whether the gateway runs", "service"),
                    _ok("It runs.", _content("Alive")),
                ),
                "/readyz": _get(
                    *("ready", "Whether questions can be answered", "service"),
                    _ok("They can.", _content("ModelList")),
                    503,
                ),
                "/metrics": _get(
                    *("metrics", "Metrics for Prometheus", "service"), _ok("Metrics.", text)
                ),
                "/problems/{slug}": _get(
                    *("describeProblem", "What a kind of problem means", "service"),
                    _ok("The kind.", anything),
                    404,
                    parameters=[slug],
                ),
                "/openapi.json": _get(
                    *("openapi", "This document", "service"), _ok("The document.", anything)
                ),
            },
            settings,
        ),
        "components": {
            "securitySchemes": SCHEMES,
            "schemas": {
                **_schemas(settings),
                **openai_schemas(),
                **document_schemas(settings),
                **live_schemas(),
            },
        },
    }


def _schemas(settings: GatewaySettings) -> Json:
    models = (
        QaRequest,
        QaResponse,
        BatchLine,
        ModelList,
        PipelineView,
        ScenarioList,
        Alive,
        Problem,
    )
    _, document = TypeAdapter.json_schemas(
        [
            (model, "validation" if model is QaRequest else "serialization", TypeAdapter(model))
            for model in models
        ],
        ref_template=_REF,
    )
    schemas: Json = document["$defs"]
    properties = schemas["QaRequest"]["properties"]
    properties["question"]["maxLength"] = settings.max_question_characters
    properties["context"]["maxLength"] = settings.max_context_characters
    schemas["BatchRequest"] = {
        "type": "object",
        "description": "Many questions.",
        "properties": {
            "requests": {
                "type": "array",
                "minItems": 1,
                "maxItems": settings.max_batch_items,
                "items": _ref("QaRequest"),
            }
        },
        "required": ["requests"],
        "additionalProperties": False,
    }
    return schemas
