"""Text over gRPC: its requests to the generator's, and the generator's news back."""

from __future__ import annotations

import time
from array import array
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, TypeAlias

from pydantic import ValidationError

from gateway.errors import FieldError, GatewayError
from gateway.generation.generator import Generator
from gateway.generation.request import (
    MAX_STOP_CHARACTERS,
    MAX_STOPS,
    GenerationRequest,
    Prompt,
    Sampling,
    TokenPrompt,
    Usage,
)
from gateway.http.openai.schema import WritingRequest
from gateway.schema import field_errors, invalid
from gateway.settings import GatewaySettings
from miaotui.v1 import gateway_pb2 as pb
from miaotui.v1 import shard_pb2 as shard_pb

Written: TypeAlias = tuple[list[pb.WrittenText], shard_pb.GenerationUsage | None]


class WritingRpc:
    """What Write and Chat share."""

    def __init__(self, settings: GatewaySettings, generator: Generator | None) -> None:
        self._settings = settings
        self._generator = generator

    async def written(
        self, request: pb.WriteRequest | pb.ChatRequest, request_id: str, time_left: float | None
    ) -> AsyncGenerator[Written]:
        """The news as they are sent. Raises `GatewayError`."""
        if self._generator is None:
            raise GatewayError("model-not-found", "No model that writes text is loaded.")
        generation = self._parse(request)
        timeout = self._settings.generation_timeout
        if time_left is not None:
            timeout = min(max(time_left, 0.001), self._settings.max_generation_timeout)
        started = time.monotonic()
        served = await self._generator.served(timeout)
        if request.model not in ("", served.name, served.fingerprint):
            raise GatewayError("model-not-found", "No model of this name writes text here.")
        left = max(0.001, timeout - (time.monotonic() - started))
        async with aclosing(self._generator.stream(generation, request_id, left)) as stream:
            async for news in stream:
                texts = [
                    pb.WrittenText(
                        index=text.index, text=text.text, finish_reason=text.finish_reason or ""
                    )
                    for text in news.texts
                ]
                yield texts, _usage(news.usage)

    def _parse(self, request: pb.WriteRequest | pb.ChatRequest) -> GenerationRequest:
        options = request.options
        prompt, size = _prompt(request)
        most = {
            "options/n": (options.n, self._settings.max_texts),
            "options/stop": (len(options.stop), MAX_STOPS),
            "prompt": (size, self._settings.max_context_characters),
        }
        faults = [
            FieldError(f"/{name}", f"must be at most {limit}")
            for name, (value, limit) in most.items()
            if value > limit
        ]
        if not all(0 < len(stop) <= MAX_STOP_CHARACTERS for stop in options.stop):
            faults.append(
                FieldError("/options/stop", f"must have 1 to {MAX_STOP_CHARACTERS} characters each")
            )
        if faults:
            raise invalid(faults)
        return GenerationRequest(
            prompt=prompt,
            sampling=_sampling(options),
            max_tokens=options.max_tokens,
            n=options.n or 1,
            stop=tuple(options.stop),
            no_cache=options.no_cache,
        )


def _prompt(request: pb.WriteRequest | pb.ChatRequest) -> tuple[Prompt, int]:
    """The prompt, and its size in characters or tokens."""
    if isinstance(request, pb.ChatRequest):
        if not request.chat.messages:
            raise invalid([FieldError("/chat/messages", "must not be empty")])
        return request.chat, request.chat.ByteSize() // 3
    kind = request.WhichOneof("prompt")
    if kind == "text":
        return request.text, len(request.text)
    if kind == "tokens":
        if any(token >= 2**31 for token in request.tokens.ids):
            raise invalid([FieldError("/tokens", "holds a token that the model has not")])
        return TokenPrompt(array("i", request.tokens.ids).tobytes()), len(request.tokens.ids)
    raise invalid([FieldError("/prompt", "neither text nor tokens is set")])


def _sampling(options: pb.WriteOptions) -> Sampling:
    seed = options.sampling.seed if options.seeded else None
    if not options.HasField("sampling"):
        return Sampling(seed=seed)
    given = options.sampling
    values: dict[str, Any] = {
        "temperature": given.temperature,
        "top_k": given.top_k,
        "top_p": given.top_p if given.HasField("top_p") else 1.0,
        "min_p": given.min_p,
        "repetition_penalty": (
            given.repetition_penalty if given.HasField("repetition_penalty") else 1.0
        ),
        "presence_penalty": given.presence_penalty,
        "frequency_penalty": given.frequency_penalty,
        "logit_bias": {str(token): bias for token, bias in given.logit_bias.items()},
    }
    try:
        WritingRequest.model_validate(values)
    except ValidationError as error:
        raise invalid(field_errors(error, "/options/sampling", WritingRequest)) from None
    values["logit_bias"] = dict(given.logit_bias)
    return Sampling(**values, seed=seed, json_schema=given.json_schema)


def _usage(usage: Usage | None) -> shard_pb.GenerationUsage | None:
    if usage is None:
        return None
    return shard_pb.GenerationUsage(
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        completion_tokens=usage.completion_tokens,
        drafted_tokens=usage.drafted_tokens,
        accepted_tokens=usage.accepted_tokens,
    )
