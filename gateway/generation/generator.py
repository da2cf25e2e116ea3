"""A text's way: prompt to tokens, tokens from the shards, back to text, bit by bit."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeAlias

import grpc
import numpy as np
from grpc import aio
from opentelemetry import trace
from opentelemetry.trace import SpanKind, Status, StatusCode

from gateway.cache.singleflight import SingleFlight
from gateway.calling import RETRY_PAUSE_SECONDS, Background, call_id, retried, time_left
from gateway.errors import FieldError, GatewayError, from_rpc
from gateway.generation.detokenizer import Detokenizer
from gateway.generation.memory import Collector, StoredTexts, TextCache
from gateway.generation.request import GenerationRequest, News, TokenPrompt, Usage
from gateway.generation.texts import CONTEXT_TOKENS, GrowingText
from gateway.metrics import GatewayMetrics
from gateway.models import GenerativePair
from gateway.schema import CacheStatus, invalid
from gateway.settings import GatewaySettings
from gateway.upstream import Served, Writing
from miaotui.telemetry import inject_context
from miaotui.v1 import shard_pb2 as shard_pb
from miaotui.v1 import tokenizer_pb2 as tokenizer_pb
from services.rpc.channel import call

log = logging.getLogger(__name__)
_tracer = trace.get_tracer("miaotui.gateway")

_STAGE_0 = "stage 0"

_Landing: TypeAlias = tuple[StoredTexts, CacheStatus]


@dataclass(frozen=True, slots=True)
class _Job:
    """A request that is ready for the shards."""

    request: GenerationRequest
    request_id: str
    deadline: float  # on the event loop's clock
    served: Served
    generate: shard_pb.GenerateRequest
    key: bytes | None
    """Where its texts are kept; None where they would not be the same again, or must not be."""

    def time_left(self) -> float:
        return time_left(self.deadline)


class Generator:
    """Writes text; knows nothing of HTTP or gRPC servers."""

    def __init__(
        self,
        settings: GatewaySettings,
        pair: GenerativePair,
        texts: TextCache,
        metrics: GatewayMetrics,
    ) -> None:
        self.pair = pair
        self._settings = settings
        self._texts = texts
        self._metrics = metrics
        self._detokenizer = Detokenizer(pair.decode)
        self._flights: SingleFlight[bytes, _Landing] = SingleFlight()
        self._stores = Background()
        self.in_flight = 0

    async def stream(
        self, request: GenerationRequest, request_id: str, timeout: float
    ) -> AsyncGenerator[News]:
        """The texts as they come, the usage with the last. Raises `GatewayError`.

        Closing the generator ends the work at the shards. `timeout` in seconds.
        """
        outcome, cache = "client-closed", CacheStatus.BYPASS
        self._enter()
        try:
            job = await self._prepare(request, request_id, timeout)
            cache = CacheStatus.BYPASS if job.key is None else CacheStatus.MISS
            stored = None if job.key is None else await self._texts.get(job.key, request.n)
            if stored is not None:
                cache = CacheStatus.HIT
                yield stored.replayed()
            else:
                async with aclosing(self._write(job)) as written:
                    async for news in written:
                        yield news
            outcome = "ok"
        except GatewayError as error:
            outcome = error.kind.slug
            raise
        finally:
            self._leave(outcome, cache)

    async def complete(
        self, request: GenerationRequest, request_id: str, timeout: float
    ) -> tuple[list[News], CacheStatus]:
        """All news at once; equal deterministic requests in flight are computed once.

        Raises `GatewayError`; cancelling ends the work at the shards.
        """
        outcome, cache = "client-closed", CacheStatus.BYPASS
        self._enter()
        try:
            try:
                async with asyncio.timeout(timeout):
                    job = await self._prepare(request, request_id, timeout)
                    if job.key is None:
                        async with aclosing(self._write(job)) as written:
                            news = [news async for news in written]
                    else:
                        stored, cache = await self._shared(job.key, job)
                        news = [stored.replayed()]
                        if cache is CacheStatus.MISS:
                            news[0].usage = stored.usage
            except TimeoutError:
                raise GatewayError("timeout", f"No text within {timeout:g} s.") from None
            outcome = "ok"
            return news, cache
        except GatewayError as error:
            outcome = error.kind.slug
            raise
        finally:
            self._leave(outcome, cache)

    async def spell(self, ids: Sequence[int]) -> str:
        """The text of tokens. Raises `GatewayError`."""
        request = tokenizer_pb.DecodeRequest(ids=ids, skip_special_tokens=True)
        try:
            response = await call(
                self.pair.tokenizer.Decode,
                request,
                name="miaotui.v1.TokenizerService/Decode",
                timeout=self._settings.request_timeout,
            )
        except aio.AioRpcError as error:
            raise from_rpc(error, "tokenizer") from None
        return str(response.text)

    def _enter(self) -> None:
        if self.in_flight >= self._settings.max_concurrent_requests:
            self._metrics.generated("overloaded", CacheStatus.BYPASS)
            raise GatewayError("overloaded", "The gateway works on as many requests as it may.")
        self.in_flight += 1
        self._metrics.generating(1)

    def _leave(self, outcome: str, cache: CacheStatus) -> None:
        self.in_flight -= 1
        self._metrics.generating(-1)
        self._metrics.generated(outcome, cache)

    async def _shared(self, key: bytes, job: _Job) -> _Landing:
        """From the cache, from an equal request in flight, or computed."""
        while (flight := self._flights.join(key)) is not None:
            try:
                stored, status = await self._flights.wait(key, flight)
            except GatewayError as error:
                # The other's time ran out, and perhaps not ours: then the work is ours.
                if error.kind.slug != "timeout" or job.time_left() <= 0:
                    raise
                continue
            return stored, CacheStatus.HIT if status is CacheStatus.HIT else CacheStatus.SHARED
        flight = self._flights.start(key, lambda: self._cached(key, job))
        return await self._flights.wait(key, flight)

    async def _cached(self, key: bytes, job: _Job) -> _Landing:
        stored = await self._texts.get(key, job.request.n)
        if stored is not None:
            return stored, CacheStatus.HIT
        collector, usage = Collector(job.request.n), Usage()
        async with aclosing(self._write(job)) as written:
            async for news in written:
                collector.take(news)
                usage = news.usage or usage
        return collector.result(usage), CacheStatus.MISS

    async def _prepare(self, request: GenerationRequest, request_id: str, timeout: float) -> _Job:
        deadline = asyncio.get_running_loop().time() + timeout
        served = await self.pair.verified()
        writing = served.writing
        assert writing is not None  # the pair's kind
        self._detokenizer.model(served.tokenizer_fingerprint)
        _check_tokens(request, writing.vocab_size)
        if isinstance(request.prompt, TokenPrompt):
            ids = request.prompt.ids
        else:
            ids = await self._encode(request, request_id, deadline)
        _check_length(len(ids) // 4, request.max_tokens, served.max_length)
        generate = _generate_request(request, ids, writing)
        key = None
        repeatable = generate.sampling.temperature == 0 or request.sampling.seed is not None
        if repeatable and not request.no_cache and request.sampling.logprobs is None:
            chat = isinstance(request.prompt, tokenizer_pb.ChatPrompt)
            key = self._texts.key(served.identity, generate, request.stop, chat)
        return _Job(request, request_id, deadline, served, generate, key)

    async def _encode(self, request: GenerationRequest, request_id: str, deadline: float) -> bytes:
        encode = tokenizer_pb.EncodePromptRequest()
        if isinstance(request.prompt, tokenizer_pb.ChatPrompt):
            encode.chat.CopyFrom(request.prompt)
        elif isinstance(request.prompt, str):
            encode.text = request.prompt

        async def attempt() -> tokenizer_pb.EncodePromptResponse:
            encode.request_id = call_id(request_id)
            name = "miaotui.v1.TokenizerService/EncodePrompt"
            return await call(self.pair.encode, encode, name=name, timeout=time_left(deadline))

        response = await retried(attempt, "tokenizer")
        return response.input_ids

    async def _write(self, job: _Job) -> AsyncGenerator[News]:
        """The news of a request that no cache answers."""
        collector = Collector(job.request.n)
        for attempt in (1, 2):
            begun = False
            try:
                async with aclosing(self._attempt(job)) as news_of_it:
                    async for news in news_of_it:
                        begun = True
                        if job.key is not None:
                            collector.take(news)
                            if news.usage is not None:
                                # In its own time: the caller need not wait for it.
                                self._keep(job, job.key, collector.result(news.usage))
                        yield news
                return
            except aio.AioRpcError as error:
                unavailable = error.code() is grpc.StatusCode.UNAVAILABLE
                if not unavailable or begun or attempt == 2:
                    raise from_rpc(error, _STAGE_0) from None
            await asyncio.sleep(RETRY_PAUSE_SECONDS)
            # The process behind the address may be another now.
            await self.pair.check_still(job.served)

    async def _attempt(self, job: _Job) -> AsyncGenerator[News]:
        """One call at the shards. Raises `AioRpcError` and `GatewayError`."""
        texts = _growing(job)
        job.generate.request_id = call_id(job.request_id)
        usage = Usage(prompt_tokens=len(job.generate.input_ids) // 4)
        name = "miaotui.v1.ShardService/Generate"
        # Not the current span: a generator's code runs in its caller's context.
        span = _tracer.start_span(name, kind=SpanKind.CLIENT)
        started = time.perf_counter()
        first = True
        metadata = tuple(inject_context(trace.set_span_in_context(span)).items())
        generating = self.pair.generate(job.generate, timeout=job.time_left(), metadata=metadata)
        try:
            async for response in generating:
                news = await self._news(texts, response)
                if response.HasField("usage"):
                    usage.cached_tokens = response.usage.cached_tokens
                    usage.drafted_tokens = response.usage.drafted_tokens
                    usage.accepted_tokens = response.usage.accepted_tokens
                if first and news.texts:
                    first = False
                    self._metrics.first_text(time.perf_counter() - started)
                if all(text.done for text in texts) and (
                    response.HasField("usage") or _cut_short(texts)
                ):
                    usage.completion_tokens = sum(text.count for text in texts)
                    self._metrics.tokens(usage)
                    news.usage = usage
                    yield news
                    return
                if news.texts:
                    yield news
            log.error("the shards ended the texts of %s too early", job.generate.request_id)
            raise GatewayError("service-failed", "The shards ended the text without a reason.")
        except aio.AioRpcError as error:
            span.set_status(Status(StatusCode.ERROR, error.code().name))
            raise
        finally:
            generating.cancel()
            span.set_attribute("miaotui.tokens", sum(text.count for text in texts))
            span.end()

    async def _news(self, texts: list[GrowingText], response: shard_pb.GenerateResponse) -> News:
        grown: dict[int, GrowingText] = {}
        for delta in response.deltas:
            if delta.index >= len(texts):
                raise GatewayError("service-failed", "The shards wrote a text not asked for.")
            text = texts[delta.index]
            if not text.done:
                text.take(delta)
                grown[delta.index] = text
        if not grown:
            return News([])
        pieces = {piece for text in grown.values() for piece in text.pieces()}
        decoded = await self._detokenizer.read([text.item() for text in grown.values()], pieces)
        piece = self._detokenizer.piece
        gained = [
            text.gain(item, piece) for text, item in zip(grown.values(), decoded, strict=True)
        ]
        return News([news for news in gained if news is not None])

    def _keep(self, job: _Job, key: bytes, stored: StoredTexts) -> None:
        # A model that was replaced meanwhile must not leave texts under the old name.
        if self.pair.served == job.served:
            self._stores.start(self._texts.put(key, stored))

    async def close(self) -> None:
        """Waits for cache writes that are under way."""
        await self._stores.finish()
        await self._detokenizer.close()


def _cut_short(texts: Sequence[GrowingText]) -> bool:
    """Whether a stop string ended a text, which the shards do not know of."""
    return any(text.matched for text in texts)


def _growing(job: _Job) -> list[GrowingText]:
    request, generate = job.request, job.generate
    continues = not isinstance(request.prompt, tokenizer_pb.ChatPrompt)
    context = generate.input_ids[-4 * CONTEXT_TOKENS :] if continues else b""
    ends = frozenset(token.to_bytes(4, "little") for token in generate.stop_token_ids)
    return [GrowingText(index, context, request.stop, ends) for index in range(request.n)]


def _check_tokens(request: GenerationRequest, vocab_size: int) -> None:
    beyond = f"holds a token that the model has not; its ids go from 0 to {vocab_size - 1}"
    faults = []
    if isinstance(request.prompt, TokenPrompt):
        ids = np.frombuffer(request.prompt.ids, "<i4")
        if not len(ids):
            faults.append(FieldError("/prompt", "must not be empty"))
        elif int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
            faults.append(FieldError("/prompt", beyond))
    if any(token >= vocab_size for token in request.sampling.logit_bias):
        faults.append(FieldError("/logit_bias", beyond))
    if faults:
        raise invalid(faults)


def _check_length(prompt: int, max_tokens: int, longest: int) -> None:
    if not longest or prompt + max(max_tokens, 1) <= longest:
        return
    fault = f"the prompt has {prompt} tokens"
    if prompt < longest:
        fault += f", and {max_tokens} more are asked for"
    raise GatewayError(
        "context-too-long",
        f"The model's context holds {longest} tokens; {fault}.",
        [FieldError("", f"at most {longest} tokens in all")],
    )


def _generate_request(
    request: GenerationRequest, ids: bytes, writing: Writing
) -> shard_pb.GenerateRequest:
    sampling = request.sampling.resolved(dict(writing.defaults), secrets.randbits(63))
    if sampling.temperature == 0:
        sampling.seed = 0  # nothing is drawn: equal requests are equal whatever their seeds
    return shard_pb.GenerateRequest(
        input_ids=ids,
        sampling=sampling,
        max_tokens=request.max_tokens,
        stop_token_ids=() if request.ignore_end else writing.stop_token_ids,
        n=request.n,
        draft_tokens=request.draft_tokens,
    )
