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

from gateway.access.caller import current_caller, require
from gateway.cache.singleflight import SingleFlight
from gateway.calling import (
    MARGIN_SECONDS,
    RETRY_PAUSE_SECONDS,
    Background,
    call_id,
    retried,
    time_left,
)
from gateway.errors import FieldError, GatewayError, from_rpc
from gateway.generation.detokenizer import Detokenizer
from gateway.generation.memory import Collector, StoredTexts, TextCache
from gateway.generation.request import GenerationRequest, News, TokenPrompt, Usage
from gateway.generation.texts import CONTEXT_TOKENS, GrowingText
from gateway.metrics import GatewayMetrics
from gateway.models import GenerativePair
from gateway.schema import CacheStatus, invalid
from gateway.served import Served, Writing
from gateway.settings import GatewaySettings
from gateway.slots import Slots
from miaotui.telemetry import inject_context
from miaotui.v1 import shard_pb2 as shard_pb
from miaotui.v1 import tokenizer_pb2 as tokenizer_pb
from services.rpc.channel import call

log = logging.getLogger(__name__)
_tracer = trace.get_tracer("miaotui.gateway")

_STAGE_0 = "stage 0"
# Tries of a text that add no token to it.
TRIES_IN_VAIN = 2

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
        self._detokenizers: dict[Served, Detokenizer] = {}
        self._flights: SingleFlight[bytes, _Landing] = SingleFlight()
        self._stores = Background()
        self._slots = Slots(
            settings.max_concurrent_requests, lambda change: metrics.generating(pair.role, change)
        )

    async def served(self, timeout: float) -> Served:
        """The model served now, or again within `timeout` seconds.

        Raises `GatewayError`. Who waits counts as one of the requests that may be worked on.
        """
        return await self.pair.served_within(timeout, self._slots.one(self.refused))

    def refused(self) -> None:
        """Counts a request that was turned away before its text was begun: there are too many."""
        self._metrics.generated(self.pair.role, "overloaded", CacheStatus.BYPASS)

    async def stream(
        self, request: GenerationRequest, request_id: str, timeout: float
    ) -> AsyncGenerator[News]:
        """The texts as they come, the usage with the last. Raises `GatewayError`.

        Closing the generator ends the work at the shards. `timeout` in seconds.
        """
        outcome, cache = "client-closed", CacheStatus.BYPASS
        with self._slots.one(self.refused):
            try:
                job = await self._prepare(request, request_id, timeout)
                cache = CacheStatus.BYPASS if job.key is None else CacheStatus.MISS
                stored = None if job.key is None else await self._texts.get(job.key, request.n)
                if stored is not None:
                    cache = CacheStatus.HIT
                    yield stored.replayed()
                else:
                    async with aclosing(self._streamed(job)) as written:
                        async for news in written:
                            yield news
                outcome = "ok"
            except GatewayError as error:
                outcome = error.kind.slug
                raise
            finally:
                self._metrics.generated(self.pair.role, outcome, cache)

    async def complete(
        self, request: GenerationRequest, request_id: str, timeout: float
    ) -> tuple[list[News], CacheStatus]:
        """All news at once; equal deterministic requests in flight are computed once.

        Raises `GatewayError`; cancelling ends the work at the shards.
        """
        outcome, cache = "client-closed", CacheStatus.BYPASS
        with self._slots.one(self.refused):
            try:
                try:
                    async with asyncio.timeout(timeout):
                        job = await self._prepare(request, request_id, timeout)
                        if job.key is None:
                            async with aclosing(self._write(job, at_once=True)) as written:
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
                self._metrics.generated(self.pair.role, outcome, cache)

    async def spell(self, ids: Sequence[int]) -> str:
        """The text of tokens. Raises `GatewayError`."""
        request = tokenizer_pb.DecodeRequest(ids=ids, skip_special_tokens=True)
        try:
            response = await call(
                self.pair.tokenizer(await self.pair.verified()).stub.Decode,
                request,
                name="miaotui.v1.TokenizerService/Decode",
                timeout=self._settings.request_timeout,
            )
        except aio.AioRpcError as error:
            raise from_rpc(error, "tokenizer") from None
        return str(response.text)

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
        async with aclosing(self._write(job, at_once=True)) as written:
            async for news in written:
                collector.take(news)
                usage = news.usage or usage
        stored = collector.result(usage)
        self._keep(job, key, stored)
        return stored, CacheStatus.MISS

    async def _streamed(self, job: _Job) -> AsyncGenerator[News]:
        """The news of a request that no cache answers; its texts are kept where they may be."""
        collector = Collector(job.request.n)
        async with aclosing(self._write(job)) as written:
            async for news in written:
                if job.key is not None:
                    collector.take(news)
                    if news.usage is not None:
                        self._keep(job, job.key, collector.result(news.usage))
                yield news

    async def _prepare(self, request: GenerationRequest, request_id: str, timeout: float) -> _Job:
        deadline = asyncio.get_running_loop().time() + timeout
        require("write")
        served = await self.pair.verified(timeout - MARGIN_SECONDS)
        writing = served.writing
        assert writing is not None  # the pair's kind
        _check_tokens(request, writing.vocab_size)
        if isinstance(request.prompt, TokenPrompt):
            ids = request.prompt.ids
        else:
            ids = await self._encode(served, request, request_id, deadline)
        _check_length(len(ids) // 4, request.max_tokens, served.max_length)
        generate = _generate_request(request, ids, writing)
        generate.cache_salt = self._texts.salt()
        key = None
        repeatable = generate.sampling.temperature == 0 or request.sampling.seed is not None
        if repeatable and not request.no_cache and request.sampling.logprobs is None:
            chat = isinstance(request.prompt, tokenizer_pb.ChatPrompt)
            key = self._texts.key(served.identity, generate, request.stop, chat)
        return _Job(request, request_id, deadline, served, generate, key)

    async def _encode(
        self, served: Served, request: GenerationRequest, request_id: str, deadline: float
    ) -> bytes:
        encode = tokenizer_pb.EncodePromptRequest()
        if isinstance(request.prompt, tokenizer_pb.ChatPrompt):
            encode.chat.CopyFrom(request.prompt)
        elif isinstance(request.prompt, tokenizer_pb.MediaPrompt):
            encode.media.CopyFrom(request.prompt)
        elif isinstance(request.prompt, str):
            encode.text = request.prompt

        async def attempt() -> tokenizer_pb.EncodePromptResponse:
            encode.request_id = call_id(request_id)
            name = "miaotui.v1.TokenizerService/EncodePrompt"
            return await call(
                self.pair.encode(served), encode, name=name, timeout=time_left(deadline)
            )

        response = await retried(
            attempt,
            "tokenizer",
            lambda: self.pair.check_still(served, time_left(deadline) - MARGIN_SECONDS),
            self.pair.budget,
        )
        return response.input_ids

    async def _write(self, job: _Job, *, at_once: bool = False) -> AsyncGenerator[News]:
        """The news of a request, from the shards.

        `at_once`: nobody reads along, so tokens become text when all are here, where neither a
        stop string is to be found in it nor a log probability to be put to its place. Where a
        stage 0 is gone in mid-text, another one, or the same one when it is back, goes on from
        the tokens that are here.
        """
        at_once = at_once and not job.request.stop and job.request.sampling.logprobs is None
        texts = _growing(job)
        usage = Usage(prompt_tokens=len(job.generate.input_ids) // 4)
        self.pair.budget.first()
        in_vain = 0
        while True:
            begun = sum(text.count for text in texts)
            try:
                async with aclosing(self._attempt(job, texts, usage, at_once)) as news_of_it:
                    async for news in news_of_it:
                        yield news
                return
            except aio.AioRpcError as error:
                in_vain = 0 if sum(text.count for text in texts) > begun else in_vain + 1
                unavailable = error.code() is grpc.StatusCode.UNAVAILABLE
                if not unavailable or in_vain > TRIES_IN_VAIN or not self.pair.budget.spend():
                    raise from_rpc(error, _STAGE_0) from None
            if in_vain:
                await asyncio.sleep(RETRY_PAUSE_SECONDS)
            # Perhaps no other serves this model now.
            await self.pair.check_still(job.served, job.time_left() - MARGIN_SECONDS)
            if any(text.count for text in texts):
                del job.generate.resumed[:]
                job.generate.resumed.extend(text.resumed() for text in texts)

    async def _attempt(
        self, job: _Job, texts: list[GrowingText], usage: Usage, at_once: bool
    ) -> AsyncGenerator[News]:
        """One call at the shards, for what `texts` lack. Raises `AioRpcError`, `GatewayError`."""
        if all(text.done for text in texts):  # only the usage was missing
            yield self._last(texts, usage, News([]))
            return
        job.generate.request_id = call_id(job.request_id)
        name = "miaotui.v1.ShardService/Generate"
        # Not the current span: a generator's code runs in its caller's context.
        span = _tracer.start_span(name, kind=SpanKind.CLIENT)
        started, before = time.perf_counter(), sum(text.count for text in texts)
        first = not before
        caller = current_caller()
        metadata = tuple(inject_context(trace.set_span_in_context(span)).items())
        head = self.pair.head(job.served)
        head.breaker.begin()
        failure: aio.AioRpcError | None = None
        generating = head.generate(job.generate, timeout=job.time_left(), metadata=metadata)
        try:
            async for response in generating:
                news = await self._news(job, texts, response, at_once)
                if response.HasField("usage"):
                    usage.cached_tokens = response.usage.cached_tokens
                    usage.drafted_tokens += response.usage.drafted_tokens
                    usage.accepted_tokens += response.usage.accepted_tokens
                if first and (news.texts or (at_once and response.deltas)):
                    first = False
                    self._metrics.first_text(self.pair.role, time.perf_counter() - started)
                if all(text.done for text in texts) and (
                    response.HasField("usage") or _cut_short(texts)
                ):
                    yield self._last(texts, usage, news)
                    return
                if news.texts:
                    yield news
            log.error("the shards ended the texts of %s too early", job.generate.request_id)
            raise GatewayError("service-failed", "The shards ended the text without a reason.")
        except aio.AioRpcError as error:
            failure = error
            span.set_status(Status(StatusCode.ERROR, error.code().name))
            raise
        finally:
            generating.cancel()
            head.ended(failure)
            wrote = sum(text.count for text in texts) - before
            if caller is not None:
                caller.wrote(wrote)
            span.set_attribute("miaotui.tokens", wrote)
            span.end()

    def _last(self, texts: list[GrowingText], usage: Usage, news: News) -> News:
        usage.completion_tokens = sum(text.count for text in texts)
        self._metrics.tokens(self.pair.role, usage)
        news.usage = usage
        return news

    async def _news(
        self,
        job: _Job,
        texts: list[GrowingText],
        response: shard_pb.GenerateResponse,
        at_once: bool,
    ) -> News:
        grown: dict[int, GrowingText] = {}
        for delta in response.deltas:
            if delta.index >= len(texts):
                raise GatewayError("service-failed", "The shards wrote a text not asked for.")
            text = texts[delta.index]
            if not text.done:
                text.take(delta)
                grown[delta.index] = text
        if at_once:
            ended = grown and all(text.ended for text in texts)
            grown = {text.index: text for text in texts if ended and not text.done}
        if not grown:
            return News([])
        pieces = {piece for text in grown.values() for piece in text.pieces()}
        detokenizer = self._detokenizer(job.served)
        items = [text.item() for text in grown.values()]
        try:
            async with asyncio.timeout(job.time_left()):
                decoded = await detokenizer.read(items, pieces)
        except TimeoutError:
            raise GatewayError("timeout", "The request's time ran out.") from None
        piece = detokenizer.piece
        gained = [
            text.gain(item, piece) for text, item in zip(grown.values(), decoded, strict=True)
        ]
        return News([news for news in gained if news is not None])

    def _detokenizer(self, served: Served) -> Detokenizer:
        """That of a model: during an upgrade there may be two."""
        if (known := self._detokenizers.get(served)) is None:
            known = self._detokenizers[served] = Detokenizer(
                self.pair.decode(served),
                # Each text waits as long as its own time allows.
                lambda: self.pair.check_still(served, self._settings.max_generation_timeout),
                self.pair.budget,
            )
        return known

    def _keep(self, job: _Job, key: bytes, stored: StoredTexts) -> None:
        # In its own time: the caller need not wait for it.
        # A model that was replaced meanwhile must not leave texts under the old name.
        if self.pair.serves(job.served):
            self._stores.start(self._texts.put(key, stored))

    async def close(self) -> None:
        """Waits for cache writes that are under way."""
        await self._stores.finish()
        await asyncio.gather(*(one.close() for one in self._detokenizers.values()))


def _cut_short(texts: Sequence[GrowingText]) -> bool:
    """Whether a stop string ended a text, which the shards do not know of."""
    return any(text.matched for text in texts)


def _growing(job: _Job) -> list[GrowingText]:
    request, generate = job.request, job.generate
    continues = isinstance(request.prompt, str | TokenPrompt)
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
        features=request.features,
    )
