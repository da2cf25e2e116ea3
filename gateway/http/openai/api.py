"""/v1/chat/completions, /v1/completions and /v1/models/{model}."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response

from gateway.calling import time_left
from gateway.errors import FieldError, GatewayError
from gateway.generation.generator import Generator
from gateway.generation.merging import merged
from gateway.generation.request import GenerationRequest, TextNews, TokenPrompt, Usage
from gateway.http.body import read_json
from gateway.http.exchange import json_response, request_id, timeout_given, unless_gone
from gateway.http.openai.frames import Frames, chat_logprobs, completion_logprobs, usage_body
from gateway.http.openai.parse import Chat, parse_chat, parse_completion
from gateway.http.openai.pictures import TEXT_ONLY
from gateway.http.openai.schema import WritingRequest
from gateway.http.openai.stream import NewsStream, first_of
from gateway.http.views import OPENAI_MODEL, openai_model
from gateway.media.captioner import Captioner
from gateway.models import Models
from gateway.schema import CacheStatus, invalid
from gateway.served import Served
from gateway.settings import GatewaySettings

CACHE_HEADER = "X-Miaotui-Cache"


@dataclass(slots=True)
class _Choice:
    """One text of a response that is sent as a whole."""

    text: str = ""
    reason: str = "stop"
    news: list[TextNews] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Reply:
    """What a response is made of."""

    chat: bool
    read: WritingRequest
    requests: Sequence[GenerationRequest]
    n: int
    served: Served
    echoes: Sequence[str]
    """What stands before the texts of each request: its prompt, where that is to be echoed."""
    timeout: float


class OpenAiApi:
    """The endpoints."""

    def __init__(
        self,
        settings: GatewaySettings,
        models: Models,
        generator: Generator | None,
        captioner: Captioner | None = None,
    ) -> None:
        self._settings = settings
        self._chats = settings.model_copy(update={"max_body_bytes": settings.max_chat_bytes})
        self._models = models
        self._generator = generator
        self._captioner = captioner

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions"""
        timeout = self._timeout(request)
        chat = parse_chat(await read_json(request, self._chats), self._settings)
        deadline = asyncio.get_running_loop().time() + timeout
        if chat.picture is not None or self._sees(chat.read.model):
            return await self._describe(request, chat, deadline)
        generator = self._writer(chat.read.model)
        served = await served_model(request, generator, chat.read.model, deadline)
        left = time_left(deadline)
        reply = _Reply(True, chat.read, [chat.request], chat.request.n, served, [""], left)
        return await self._respond(request, generator, reply)

    def _sees(self, model: str | None) -> bool:
        """Whether a chat with this model is about a picture."""
        if self._captioner is None:
            return False
        known = self._captioner.generator.pair.last
        if model is None:
            return self._generator is None
        return known is not None and model in (known.name, known.fingerprint)

    async def _describe(self, request: Request, chat: Chat, deadline: float) -> Response:
        """The reply of the model that sees; a picture is all that it is shown of the chat."""
        captioner, picture = self._captioner, chat.picture
        if picture is None or captioner is None:
            detail = "the last message must hold a picture: this model describes pictures"
            raise invalid([FieldError("/messages", detail)])
        writer = None if self._generator is None else self._generator.pair.last
        if writer is not None and chat.read.model in (writer.name, writer.fingerprint):
            raise invalid([FieldError(picture.place, TEXT_ONLY)])
        generator = captioner.generator
        served = await served_model(request, generator, chat.read.model, deadline)
        work = captioner.about(
            chat.request, picture.data, served, request_id(request), deadline, picture.place
        )
        about = await unless_gone(request.receive, work)
        reply = _Reply(True, chat.read, [about], about.n, served, [""], time_left(deadline))
        return await self._respond(request, generator, reply)

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions"""
        timeout = self._timeout(request)
        completion = parse_completion(await read_json(request, self._settings), self._settings)
        deadline = asyncio.get_running_loop().time() + timeout
        generator = self._writer(completion.read.model)
        served = await served_model(request, generator, completion.read.model, deadline)
        echoes = [""] * len(completion.requests)
        if completion.read.echo:
            echoes = [await _echo(generator, one) for one in completion.requests]
        n = completion.requests[0].n
        left = time_left(deadline)
        reply = _Reply(False, completion.read, completion.requests, n, served, echoes, left)
        return await self._respond(request, generator, reply)

    async def model(self, request: Request) -> Response:
        """GET /v1/models/{model}"""
        name = request.path_params["model"]
        for pair in self._models.pairs:
            if pair.served is not None and name in (pair.served.name, pair.served.fingerprint):
                return json_response(OPENAI_MODEL.dump_json(openai_model(pair, pair.served)))
        raise GatewayError("model-not-found", "No model of this name is served.")

    def _timeout(self, request: Request) -> float:
        given = timeout_given(request, self._settings.max_generation_timeout)
        return self._settings.generation_timeout if given is None else given

    def _writer(self, model: str | None) -> Generator:
        if self._generator is None:
            raise GatewayError(
                "model-not-found",
                "No model that writes text is loaded; set MIAOTUI_GATEWAY_GENERATOR_TOKENIZER "
                "and _SHARD.",
                [FieldError("/model", "none is loaded")] if model is not None else (),
            )
        return self._generator

    async def _respond(self, request: Request, generator: Generator, reply: _Reply) -> Response:
        head: dict[str, Any] = {
            "id": f"{'chatcmpl' if reply.chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": reply.served.name,
            "system_fingerprint": f"fp_{reply.served.fingerprint[:16]}",
        }
        if reply.read.stream:
            return await self._stream(request, generator, reply, head)
        work = _complete(generator, reply, request_id(request))
        choices, usage, cache = await unless_gone(request.receive, work)
        body = {
            "id": head["id"],
            "object": "chat.completion" if reply.chat else "text_completion",
            **head,
            "choices": [
                _chat_choice(index, choice, reply.requests[0])
                if reply.chat
                else _completion_choice(index, choice, reply)
                for index, choice in enumerate(choices)
            ],
            "usage": usage_body(usage),
        }
        return json_response(to_json(body), {CACHE_HEADER: cache.value})

    async def _stream(
        self, request: Request, generator: Generator, reply: _Reply, head: Mapping[str, Any]
    ) -> Response:
        options = reply.read.stream_options
        with_usage = options is not None and options.include_usage
        kind = "chat.completion.chunk" if reply.chat else "text_completion"
        frames = Frames(kind, dict(head), with_usage)
        streams = [
            generator.stream(one, _part_id(request_id(request), index, reply), reply.timeout)
            for index, one in enumerate(reply.requests)
        ]
        news = streams[0] if len(streams) == 1 else merged(streams, reply.n)
        count = reply.n * len(reply.requests)
        begin = frames.begin(range(count)) if reply.chat else b""
        if any(reply.echoes):
            begin = b"".join(
                frames.text(TextNews(index, reply.echoes[index // reply.n]))
                for index in range(count)
            )
        earliest = await first_of(request.receive, news)
        return NewsStream(frames, begin, earliest, news, with_usage)


async def served_model(
    request: Request, generator: Generator, model: str | None, deadline: float
) -> Served:
    """The model that `generator` writes with, which must be `model` where that is named.

    Raises `GatewayError`.
    """
    work = generator.served(time_left(deadline))
    at_once = generator.pair.served is not None
    served = await (work if at_once else unless_gone(request.receive, work))
    if model is not None and model not in (served.name, served.fingerprint):
        raise GatewayError(
            "model-not-found",
            "No model of this name writes text here.",
            [FieldError("/model", "see /v1/models for the names")],
        )
    return served


async def _echo(generator: Generator, request: GenerationRequest) -> str:
    if isinstance(request.prompt, TokenPrompt):
        return await generator.spell(np.frombuffer(request.prompt.ids, "<i4").tolist())
    assert isinstance(request.prompt, str)  # chats are not echoed
    return request.prompt


def _part_id(request_id: str, index: int, reply: _Reply) -> str:
    return request_id if len(reply.requests) == 1 else f"{request_id}.{index}"


async def _complete(
    generator: Generator, reply: _Reply, request_id: str
) -> tuple[list[_Choice], Usage, CacheStatus]:
    tasks = [
        asyncio.create_task(
            generator.complete(one, _part_id(request_id, index, reply), reply.timeout)
        )
        for index, one in enumerate(reply.requests)
    ]
    try:
        results = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    choices = [_Choice() for _ in range(reply.n * len(tasks))]
    usage = Usage()
    for number, (all_news, _) in enumerate(results):
        for news in all_news:
            usage.add(news.usage or Usage())
            for text in news.texts:
                choice = choices[number * reply.n + text.index]
                choice.text += text.text
                choice.reason = text.finish_reason or choice.reason
                choice.news.append(text)
    return choices, usage, results[0][1]


def _chat_choice(index: int, choice: _Choice, request: GenerationRequest) -> dict[str, Any]:
    logprobs = None
    if request.sampling.logprobs is not None:
        logprobs = chat_logprobs([token for news in choice.news for token in news.tokens])
    return {
        "index": index,
        "message": {"role": "assistant", "content": choice.text, "refusal": None},
        "logprobs": logprobs,
        "finish_reason": choice.reason,
    }


def _completion_choice(index: int, choice: _Choice, reply: _Reply) -> dict[str, Any]:
    number = index // reply.n
    logprobs = None
    if reply.requests[number].sampling.logprobs is not None:
        logprobs = completion_logprobs([token for news in choice.news for token in news.tokens])
    return {
        "index": index,
        "text": reply.echoes[number] + choice.text,
        "logprobs": logprobs,
        "finish_reason": choice.reason,
    }
