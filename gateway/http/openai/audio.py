"""/v1/audio/transcriptions and /v1/audio/translations."""

from __future__ import annotations

import asyncio
from typing import Any

from pydantic import ValidationError
from pydantic_core import to_json
from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Send

from gateway.calling import time_left
from gateway.errors import FieldError, GatewayError
from gateway.http.exchange import json_response, request_id, timeout_given, unless_gone
from gateway.http.forms import is_form, read_form
from gateway.http.openai.api import served_model
from gateway.http.openai.audio_schema import SoundRequest
from gateway.http.openai.frames import error_event, event
from gateway.http.openai.stream import EventStream, first_of
from gateway.media.subtitles import srt, vtt
from gateway.media.transcriber import Segment, Speech, Transcriber, Transcript
from gateway.schema import field_errors, invalid
from gateway.settings import GatewaySettings

# The form's fields beside the sound take little.
_FORM_BYTES = 64 * 1024
_MOST_FIELDS = 20
_TEXTS = {"srt": "application/x-subrip", "vtt": "text/vtt", "text": "text/plain"}


class AudioApi:
    """The endpoints."""

    def __init__(self, settings: GatewaySettings, transcriber: Transcriber | None) -> None:
        self._settings = settings
        most = settings.max_sound_bytes + _FORM_BYTES
        self._uploads = settings.model_copy(update={"max_body_bytes": most})
        self._transcriber = transcriber

    def routes(self) -> list[Route]:
        """The routes."""
        return [
            Route("/v1/audio/transcriptions", self.transcriptions, methods=["POST"]),
            Route("/v1/audio/translations", self.translations, methods=["POST"]),
        ]

    async def transcriptions(self, request: Request) -> Response:
        """POST /v1/audio/transcriptions"""
        return await self._told(request, translate=False)

    async def translations(self, request: Request) -> Response:
        """POST /v1/audio/translations"""
        return await self._told(request, translate=True)

    async def _told(self, request: Request, *, translate: bool) -> Response:
        settings = self._settings
        given = timeout_given(request, settings.max_generation_timeout)
        transcriber = self._transcriber
        if transcriber is None:
            raise GatewayError(
                "model-not-found",
                "No model that hears is loaded; set MIAOTUI_GATEWAY_TRANSCRIBER_TOKENIZER and "
                "_SHARD.",
            )
        if not is_form(request):
            raise GatewayError("unsupported-media-type", "The body must be multipart/form-data.")
        async with read_form(request, self._uploads, max_files=1, max_fields=_MOST_FIELDS) as form:
            read = _read(form)
            data = await _sound(form, settings.max_sound_bytes)
        timeout = settings.generation_timeout if given is None else given
        deadline = asyncio.get_running_loop().time() + timeout
        await served_model(request, transcriber.generator, read.model, deadline)
        speech = Speech(
            data=data,
            language=read.language or "",
            translate=translate,
            previous=read.prompt or "",
            temperature=read.temperature or 0.0,
            confidence=read.response_format == "verbose_json",
        )
        left, identifier = time_left(deadline), request_id(request)
        if read.stream:
            news = transcriber.stream(speech, identifier, left)
            return _TextStream(await first_of(request.receive, news), news)
        work = transcriber.transcribe(speech, identifier, left)
        transcript = await unless_gone(request.receive, work)
        return _response(transcript, read, "translate" if translate else "transcribe")


def _read(form: FormData) -> SoundRequest:
    fields: dict[str, Any] = {}
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            if name != "file":
                raise invalid([FieldError("/file", "the sound's field must be named file")])
        elif name.endswith("[]"):
            fields.setdefault(name[:-2], []).append(value)
        elif name in fields:
            raise invalid([FieldError("", "a field stands in the form twice")])
        else:
            fields[name] = value
    try:
        read = SoundRequest.model_validate(fields)
    except ValidationError as error:
        raise invalid(field_errors(error, model=SoundRequest)) from None
    if read.stream and read.response_format not in ("json", "text"):
        raise invalid([FieldError("/stream", "goes with response_format json or text only")])
    return read


async def _sound(form: FormData, most: int) -> bytes:
    file = form.get("file")
    if not isinstance(file, UploadFile):
        raise invalid([FieldError("/file", "is missing: send the sound as a file")])
    if file.size is not None and file.size > most:
        raise invalid([FieldError("/file", f"has more than {most} bytes")])
    return await file.read()


def _response(transcript: Transcript, read: SoundRequest, task: str) -> Response:
    if read.response_format in ("text", "srt", "vtt"):
        text = {
            "text": lambda: transcript.text + "\n",
            "srt": lambda: srt(transcript.segments),
            "vtt": lambda: vtt(transcript.segments),
        }[read.response_format]()
        media_type = f"{_TEXTS[read.response_format]}; charset=utf-8"
        return Response(text, headers={"Cache-Control": "no-store"}, media_type=media_type)
    body: dict[str, Any] = {"text": transcript.text, "usage": _usage(transcript)}
    if read.response_format == "verbose_json":
        body |= {
            "task": task,
            "language": transcript.language,
            "duration": round(transcript.seconds, 3),
            "segments": [
                _segment(index, one, read.temperature or 0.0)
                for index, one in enumerate(transcript.segments)
            ],
        }
    return json_response(to_json(body))


def _usage(transcript: Transcript) -> dict[str, Any]:
    return {"type": "duration", "seconds": round(transcript.seconds, 3)}


def _segment(index: int, segment: Segment, temperature: float) -> dict[str, Any]:
    return {
        "id": index,
        "start": round(segment.start, 3),
        "end": round(segment.end, 3),
        "text": segment.text,
        "temperature": temperature,
        "avg_logprob": segment.average_logprob,
        "compression_ratio": segment.compression,
    }


class _TextStream(EventStream[tuple[str, Transcript]]):
    """Sends what is said as it is written down."""

    async def _stream(self, send: Send) -> None:
        piece, transcript = self._first
        await self._send(send, piece)
        try:
            async for piece, told in self._news:
                await self._send(send, piece)
                transcript = told
        except GatewayError as error:
            last = error_event(error)
        else:
            done = {
                "type": "transcript.text.done",
                "text": transcript.text,
                "usage": _usage(transcript),
            }
            last = event(done)
        await send({"type": "http.response.body", "body": last, "more_body": False})

    @staticmethod
    async def _send(send: Send, piece: str) -> None:
        if piece:
            body = event({"type": "transcript.text.delta", "delta": piece})
            await send({"type": "http.response.body", "body": body, "more_body": True})
