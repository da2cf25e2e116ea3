"""The part of the OpenAPI document that tells of OpenAI's endpoints."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from gateway.http.openai.audio_schema import EVENTS, audio_paths, audio_schemas
from gateway.http.openai.schema import ChatCompletionRequest, CompletionRequest
from gateway.settings import GatewaySettings

Json = dict[str, Any]

_STRING: Json = {"type": "string"}
_COUNT: Json = {"type": "integer", "minimum": 0}
_NUMBER: Json = {"type": "number"}
_NULLABLE_STRING: Json = {"type": ["string", "null"]}
_REASON: Json = {"enum": ["stop", "length", None]}
_CHAT_EXAMPLE: Json = {
    "messages": [{"role": "user", "content": "用一句话介绍长江。"}],
    "max_completion_tokens": 100,
}
_COMPLETION_EXAMPLE: Json = {"prompt": "The Yangtze is", "max_tokens": 32, "stop": ["\n"]}
_ERRORS = {
    400: "The request is not valid",
    404: "There is no such model",
    408: "The body did not arrive in time",
    413: "The body is too large",
    415: "The body's type is not supported",
    429: "There is too much to do",
    500: "An error inside of Miaotui",
    502: "A service behind the gateway failed",
    503: "Miaotui is not ready",
    504: "The text took too long",
}


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def _object(description: str, **properties: Json) -> Json:
    return {
        "type": "object",
        "description": description,
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _list(items: Json) -> Json:
    return {"type": "array", "items": items}


def _or_null(schema: Json) -> Json:
    return {"anyOf": [schema, {"type": "null"}]}


def _errors(*statuses: int) -> Json:
    responses: Json = {}
    for status in statuses:
        responses[str(status)] = {
            "description": _ERRORS[status],
            "content": {"application/json": {"schema": _ref("OpenAiError")}},
        }
        if status in (429, 503):
            header = {"description": "Seconds to wait.", "schema": {"type": "integer"}}
            responses[str(status)]["headers"] = {"Retry-After": header}
    return responses


def openai_paths(settings: GatewaySettings, headers: list[Json]) -> Json:
    """The paths; `headers`: the parameters that every request may have."""
    timeout, *others = headers
    limit = {
        **timeout["schema"],
        "maximum": settings.max_generation_timeout,
        "default": settings.generation_timeout,
    }
    parameters = [
        {**timeout, "description": "Seconds that the text may take.", "schema": limit},
        *others,
    ]
    every = (400, 404, 408, 413, 415, 429, 500, 502, 503, 504)

    def post(operation: str, summary: str, body: str, whole: str, part: str, example: Json) -> Json:
        return {
            "post": {
                "operationId": operation,
                "summary": summary,
                "description": "As OpenAI's endpoint of this path; its clients work unchanged. "
                f"With `stream`, events hold a {part} each as data, and the last one `[DONE]`; "
                "after a failure one with an OpenAiError, and then nothing more.",
                "tags": ["texts"],
                "parameters": parameters,
                "requestBody": {
                    "required": True,
                    "content": {
                        "application/json": {
                            "schema": _ref(body),
                            "examples": {"example": {"summary": summary, "value": example}},
                        }
                    },
                },
                "responses": {
                    "200": {
                        "description": "The text.",
                        "headers": {
                            "X-Miaotui-Cache": {
                                "description": "Where a whole text came from: miss, hit, shared "
                                "(with an equal request at the same time), bypass.",
                                "schema": _STRING,
                            }
                        },
                        "content": {
                            "application/json": {"schema": _ref(whole)},
                            "text/event-stream": {"schema": EVENTS},
                        },
                    },
                    **_errors(*every),
                },
            }
        }

    name: Json = {"name": "model", "in": "path", "required": True, "schema": _STRING}
    return {
        "/v1/chat/completions": post(
            *("chat", "Write a chat's next message"),
            *("ChatCompletionRequest", "ChatCompletion", "ChatCompletionChunk"),
            _CHAT_EXAMPLE,
        ),
        "/v1/completions": post(
            *("complete", "Continue a prompt"),
            *("CompletionRequest", "Completion", "Completion"),
            _COMPLETION_EXAMPLE,
        ),
        **audio_paths(settings, parameters, _errors(*every)),
        "/v1/models/{model}": {
            "get": {
                "operationId": "describeModel",
                "summary": "One of the models that are ready",
                "tags": ["service"],
                "parameters": [name],
                "responses": {
                    "200": {
                        "description": "The model.",
                        "content": {"application/json": {"schema": _ref("OpenAiModel")}},
                    },
                    **_errors(404, 500),
                },
            }
        },
    }


def openai_schemas() -> Json:
    """What the paths refer to."""
    _, document = TypeAdapter.json_schemas(
        [
            (model, "validation", TypeAdapter(model))
            for model in (ChatCompletionRequest, CompletionRequest)
        ],
        ref_template="#/components/schemas/{model}",
    )
    candidate = {
        "token": _STRING,
        "logprob": _NUMBER,
        "bytes": _list({"type": "integer", "minimum": 0, "maximum": 255}),
    }
    chat_logprobs = _or_null(_ref("ChatLogprobs"))
    completion_logprobs = _or_null(_ref("CompletionLogprobs"))
    head = {
        "id": _STRING,
        "object": _STRING,
        "created": _COUNT,
        "model": _STRING,
        "system_fingerprint": _STRING,
    }
    message = _object("The message.", role=_STRING, content=_STRING, refusal=_NULLABLE_STRING)
    delta = _object("What is new.", role=_STRING, content=_STRING)
    del delta["required"]
    usage = _ref("Usage")
    chunk = _object(
        "A part of a streamed message.",
        **head,
        choices=_list(
            _object(
                "News of a message.",
                index=_COUNT,
                delta=delta,
                logprobs=chat_logprobs,
                finish_reason=_REASON,
            )
        ),
        usage=_or_null(usage),
    )
    completion = _object(
        "Texts, or parts of them.",
        **head,
        choices=_list(
            _object(
                "One of the texts.",
                index=_COUNT,
                text=_STRING,
                logprobs=completion_logprobs,
                finish_reason=_REASON,
            )
        ),
        usage=_or_null(usage),
    )
    # With stream_options.include_usage only.
    chunk["required"].remove("usage")
    completion["required"].remove("usage")
    own: Json = {
        "OpenAiError": _object(
            "What went wrong, in OpenAI's shape. Never holds anything that was sent.",
            error=_object(
                "The error.",
                message=_STRING,
                type=_STRING,
                param=_NULLABLE_STRING,
                code=_NULLABLE_STRING,
            ),
        ),
        "Usage": _object(
            "Tokens.",
            prompt_tokens=_COUNT,
            completion_tokens=_COUNT,
            total_tokens=_COUNT,
            prompt_tokens_details=_object("Of the prompt.", cached_tokens=_COUNT),
            completion_tokens_details=_object(
                "Of the text.",
                accepted_prediction_tokens=_COUNT,
                rejected_prediction_tokens=_COUNT,
            ),
        ),
        "ChatLogprobs": _object(
            "Log probabilities of the text's tokens.",
            content=_list(
                _object(
                    "One token.",
                    **candidate,
                    top_logprobs=_list(_object("A candidate.", **candidate)),
                )
            ),
            refusal=_NULLABLE_STRING,
        ),
        "CompletionLogprobs": _object(
            "Log probabilities of the text's tokens.",
            tokens=_list(_STRING),
            token_logprobs=_list(_NUMBER),
            top_logprobs=_list({"type": "object", "additionalProperties": _NUMBER}),
            text_offset=_list(_COUNT),
        ),
        "ChatCompletion": _object(
            "The messages.",
            **head,
            choices=_list(
                _object(
                    "One of the messages.",
                    index=_COUNT,
                    message=message,
                    logprobs=chat_logprobs,
                    finish_reason=_REASON,
                )
            ),
            usage=usage,
        ),
        "ChatCompletionChunk": chunk,
        "Completion": completion,
    }
    schemas: Json = document["$defs"]
    return {**schemas, **own, **audio_schemas()}
