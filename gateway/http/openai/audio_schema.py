"""Requests for transcripts, as OpenAI's API takes them, and what the OpenAPI document says."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from gateway.settings import GatewaySettings

Json = dict[str, Any]

_NUMBER: Json = {"type": "number"}
_STRING: Json = {"type": "string"}
# Without a type: some take it for the body's, others for an event's.
EVENTS: Json = {"description": "Server-sent events."}


class SoundRequest(BaseModel):
    """What a form holds beside the file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = Field(None, description="The model's name; absent: the one served.")
    language: str | None = Field(
        None,
        max_length=40,
        description='What is spoken, such as "zh" or "english". Absent: found out from the '
        "first window.",
    )
    prompt: str | None = Field(
        None,
        max_length=20_000,
        description="A text that stands before, for its spelling and style; its end is kept.",
    )
    response_format: Literal["json", "text", "verbose_json", "srt", "vtt"] = Field(
        "json",
        description="Segments of verbose_json, srt and vtt are windows of at most 30 s, cut "
        "where it is quiet; there are no times of words.",
    )
    temperature: float | None = Field(
        None, ge=0, le=1, allow_inf_nan=False, description="0, the default: the likeliest text."
    )
    stream: bool = Field(False, description="Server-sent events, a window's text each.")
    timestamp_granularities: list[Literal["segment"]] | None = None
    chunking_strategy: Literal["auto"] | None = None


def audio_paths(settings: GatewaySettings, parameters: list[Json], errors: Json) -> Json:
    """The paths; `parameters` and `errors` as of the other paths of OpenAI's."""

    def post(operation: str, summary: str, more: str) -> Json:
        return {
            "post": {
                "operationId": operation,
                "summary": summary,
                "description": "As OpenAI's endpoint of this path; its clients work unchanged. "
                f"WAV, FLAC, OGG and MP3 of at most {settings.max_sound_bytes} bytes. {more}"
                "With `stream`, events hold `transcript.text.delta` each as data, and the last "
                "one `transcript.text.done`; after a failure one holds an OpenAiError.",
                "tags": ["texts"],
                "parameters": parameters,
                "requestBody": {
                    "required": True,
                    "content": {
                        "multipart/form-data": {
                            "schema": {
                                "type": "object",
                                "properties": {
                                    "file": {"type": "string", "format": "binary"},
                                    **_fields(),
                                },
                                "required": ["file"],
                                "additionalProperties": False,
                            }
                        }
                    },
                },
                "responses": {
                    "200": {
                        "description": "What is said.",
                        "content": {
                            "application/json": {
                                "schema": {"$ref": "#/components/schemas/Transcript"}
                            },
                            "text/plain": {"schema": _STRING},
                            "application/x-subrip": {"schema": _STRING},
                            "text/vtt": {"schema": _STRING},
                            "text/event-stream": {"schema": EVENTS},
                        },
                    },
                    **errors,
                },
            }
        }

    return {
        "/v1/audio/transcriptions": post("transcribe", "Write down what is said", ""),
        "/v1/audio/translations": post(
            "translate",
            "Write down in English what is said in another language",
            "For models that know several languages. ",
        ),
    }


def _fields() -> Json:
    fields = TypeAdapter(SoundRequest).json_schema()["properties"]
    # Forms name what may stand in them several times so.
    fields["timestamp_granularities[]"] = fields.pop("timestamp_granularities")
    return dict(fields)


def audio_schemas() -> Json:
    """What the paths refer to."""
    segment: Json = {
        "type": "object",
        "description": "What is said in a window.",
        "properties": {
            "id": {"type": "integer", "minimum": 0},
            "start": {**_NUMBER, "description": "In seconds."},
            "end": _NUMBER,
            "text": _STRING,
            "temperature": _NUMBER,
            "avg_logprob": {
                "type": ["number", "null"],
                "description": "Of its tokens; far below 0 where the model guessed.",
            },
            "compression_ratio": {
                **_NUMBER,
                "description": "High where the text repeats itself.",
            },
        },
        "required": ["id", "start", "end", "text"],
        "additionalProperties": False,
    }
    usage: Json = {
        "type": "object",
        "description": "How long the recording is.",
        "properties": {"type": {"const": "duration"}, "seconds": _NUMBER},
        "required": ["type", "seconds"],
        "additionalProperties": False,
    }
    transcript: Json = {
        "type": "object",
        "description": "What is said; all but text and usage with verbose_json only.",
        "properties": {
            "text": _STRING,
            "usage": usage,
            "task": {"enum": ["transcribe", "translate"]},
            "language": {**_STRING, "description": "In English: chinese."},
            "duration": {**_NUMBER, "description": "In seconds."},
            "segments": {"type": "array", "items": segment},
        },
        "required": ["text", "usage"],
        "additionalProperties": False,
    }
    return {"Transcript": transcript}
