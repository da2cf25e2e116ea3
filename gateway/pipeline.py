"""One question's way: answer cache, prompt cache, tokenizer, shards, and back to text."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, TypeAlias, TypeVar

import grpc
from grpc import aio
from opentelemetry import trace
from opentelemetry.trace import Link

from gateway.begun import within
from gateway.cache.lease import Lease
from gateway.cache.singleflight import SingleFlight
from gateway.cache.stores import AnswerCache, PromptCache, StoredAnswer
from gateway.calling import MARGIN_SECONDS, Background, call_id, retried, time_left
from gateway.errors import GatewayError
from gateway.explanation import WarningView
from gateway.input_warnings import warnings_about
from gateway.metrics import GatewayMetrics
from gateway.models import ExtractivePair
from gateway.reading import SpanReader
from gateway.schema import CacheStatus, Candidate, Hop, QaRequest, QaResponse
from gateway.served import Served
from gateway.settings import GatewaySettings
from gateway.slots import Slots
from miaotui.telemetry import current_span, span_within, trace_content, trace_id_of
from miaotui.v1 import shard_pb2 as shard_pb
from miaotui.v1 import tokenizer_pb2 as tokenizer_pb
from services.rpc.channel import UnaryMethod, call

log = logging.getLogger(__name__)
_tracer = trace.get_tracer("miaotui.gateway")
T = TypeVar("T")
_Request = TypeVar("_Request", tokenizer_pb.EncodeRequest, shard_pb.InferRequest)

# Reading more windows than this takes long enough to leave the event loop for it.
READ_INLINE_WINDOWS = 4

_NORMALIZATION = {
    "none": tokenizer_pb.NORMALIZATION_NONE,
    "nfc": tokenizer_pb.NORMALIZATION_NFC,
    "nfkc": tokenizer_pb.NORMALIZATION_NFKC,
}

# An answer and where it came from.
_Landing: TypeAlias = tuple[StoredAnswer, CacheStatus]


class Clock:
    """Hops' times, in the order in which they were taken."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.hops: dict[str, float] = {}

    def add(self, hop: str, seconds: float) -> None:
        """Adds time to a hop."""
        self.hops[hop] = self.hops.get(hop, 0.0) + max(seconds, 0.0)

    async def timed(self, hop: str, work: Awaitable[T]) -> T:
        """Awaits `work` and adds the time that it takes to `hop`."""
        started = time.perf_counter()
        try:
            return await work
        finally:
            self.add(hop, time.perf_counter() - started)

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.started

    def result(self) -> list[Hop]:
        """All hops and "total", in milliseconds."""
        hops = {**self.hops, "total": time.perf_counter() - self.started}
        return [Hop(hop, round(seconds * 1000, 3)) for hop, seconds in hops.items()]


@dataclass(slots=True)
class _Job:
    """One request with what is known of it."""

    request: QaRequest
    request_id: str
    deadline: float  # on the event loop's clock
    served: Served

    def time_left(self) -> float:
        return time_left(self.deadline)


@dataclass(frozen=True, slots=True)
class Readings:
    """What several passages say to one question, in the order of the requests."""

    served: Served
    answers: list[StoredAnswer]
    cache: CacheStatus


@dataclass(frozen=True, slots=True)
class Looked:
    """What was computed for a passage, and kept whole: the windows and all their logits."""

    served: Served
    windows: tokenizer_pb.EncodeResponse
    passage: tokenizer_pb.TokenizedText
    logits: shard_pb.InferResponse


_Result = TypeVar("_Result", QaResponse, Readings)


class Pipeline:
    """Answers questions; knows nothing of HTTP or gRPC servers."""

    def __init__(
        self,
        settings: GatewaySettings,
        upstream: ExtractivePair,
        answers: AnswerCache,
        prompts: PromptCache,
        reader: SpanReader,
        metrics: GatewayMetrics,
    ) -> None:
        self._settings = settings
        self._upstream = upstream
        self._answers = answers
        self._prompts = prompts
        self._reader = reader
        self._metrics = metrics
        self._flights: SingleFlight[bytes, _Landing] = SingleFlight()
        self._stores = Background()
        self._trace_content = trace_content()
        self._slots = Slots(settings.max_concurrent_requests, metrics.in_flight)

    async def answer(self, request: QaRequest, request_id: str, timeout: float) -> QaResponse:
        """Answers within `timeout` seconds. Raises `GatewayError`; cancelling frees the work."""
        response = await self._counted(
            lambda: self._answer(request, request_id, timeout, Clock()), timeout
        )
        self._metrics.hops(response.timings)
        return response

    async def served(self, timeout: float) -> Served:
        """The model served now, or again within `timeout` seconds.

        Raises `GatewayError`. Who waits counts as one of the requests that may be worked on.
        """
        return await self._upstream.served_within(timeout, self._slots.one(self._refused))

    async def read_passages(
        self, requests: Sequence[QaRequest], request_id: str, timeout: float, clock: Clock
    ) -> Readings:
        """Reads several passages for one question, all in one batch, within `timeout` seconds.

        Passages that were read for the question before come from the answer cache. Raises
        `GatewayError`; cancelling frees the work.
        """
        return await self._counted(
            lambda: self._read_passages(requests, request_id, timeout, clock), timeout
        )

    async def look_closely(
        self, request: QaRequest, request_id: str, deadline: float, clock: Clock
    ) -> Looked:
        """Computes a passage's logits, for an explanation; `deadline` on the loop's clock.

        Raises `GatewayError`; cancelling frees the work.
        """
        served = await self._upstream.verified(time_left(deadline) - MARGIN_SECONDS)
        job = _Job(request, request_id, deadline, served)
        windows, passage = await self._encode(job, clock, explain=True)
        return Looked(served, windows, passage, await self._infer(job, windows.windows, clock))

    async def _read_passages(
        self, requests: Sequence[QaRequest], request_id: str, timeout: float, clock: Clock
    ) -> Readings:
        deadline = asyncio.get_running_loop().time() + timeout
        served = await self._upstream.verified(timeout - MARGIN_SECONDS)
        jobs = [_Job(request, request_id, deadline, served) for request in requests]
        keys = [self._answers.key(served.identity, request) for request in requests]
        found: list[StoredAnswer | None] = [None] * len(jobs)
        cached = not any(request.no_cache for request in requests)
        if cached:
            looks = (
                self._answers.get(key, job.request) for key, job in zip(keys, jobs, strict=True)
            )
            found = await clock.timed("cache", asyncio.gather(*looks))
        missing = [place for place, answer in enumerate(found) if answer is None]
        if missing:
            computed = await self._compute_all([jobs[place] for place in missing], clock)
            for place, answer in zip(missing, computed, strict=True):
                found[place] = answer
                if cached and self._upstream.serves(served):
                    self._stores.start(self._answers.put(keys[place], answer))
        status = CacheStatus.MISS if missing else CacheStatus.HIT
        return Readings(
            served,
            [answer for answer in found if answer is not None],
            status if cached else CacheStatus.BYPASS,
        )

    def _refused(self) -> None:
        self._metrics.answered("overloaded", "none")

    async def _counted(
        self, work: Callable[[], Coroutine[Any, Any, _Result]], timeout: float
    ) -> _Result:
        """Does it within `timeout` seconds, as one of the requests that may be worked on."""
        outcome, cache = "client-closed", "none"
        with self._slots.one(self._refused):
            try:
                try:
                    result = await within(timeout, work())
                except TimeoutError:
                    raise GatewayError("timeout", f"No answer within {timeout:g} s.") from None
                outcome, cache = "ok", str(result.cache)
                return result
            except GatewayError as error:
                outcome = error.kind.slug
                raise
            finally:
                self._metrics.answered(outcome, cache)

    async def _answer(
        self, request: QaRequest, request_id: str, timeout: float, clock: Clock
    ) -> QaResponse:
        deadline = asyncio.get_running_loop().time() + timeout
        served = await self._upstream.verified(timeout - MARGIN_SECONDS)
        job = _Job(request, request_id, deadline, served)
        if request.no_cache:
            stored, status = await self._compute(job, clock), CacheStatus.BYPASS
        else:
            stored, status = await self._shared(job, clock)
        if (span := current_span()).is_recording():
            span.set_attribute("miaotui.cache.status", status.value)
            span.set_attribute("miaotui.request.id", request_id)
            if self._trace_content:
                span.set_attribute("miaotui.question", request.question)
        return QaResponse(
            answerable=stored.answerable,
            answers=[
                Candidate(request.context[s.start : s.end], s.start, s.end, s.score, s.logit)
                for s in stored.spans
            ],
            no_answer_score=stored.no_answer_score,
            model=served.name,
            model_fingerprint=served.fingerprint,
            cache=status,
            timings=clock.result(),
            trace_id=trace_id_of(span),
            request_id=request_id,
            warnings=_warnings(request, stored, served),
        )

    async def _shared(self, job: _Job, clock: Clock) -> tuple[StoredAnswer, CacheStatus]:
        """From the cache, from an equal request in flight, or computed."""
        key = self._answers.key(job.served.identity, job.request)
        while (flight := self._flights.join(key)) is not None:
            link = [Link(flight.context)] if flight.context.is_valid else None
            with span_within(_tracer, "wait for an equal request", links=link):
                try:
                    stored, status = await clock.timed("wait", self._flights.wait(key, flight))
                except GatewayError as error:
                    # The other's time ran out, and perhaps not ours: then the work is ours.
                    if error.kind.slug != "timeout" or job.time_left() <= 0:
                        raise
                    continue
            return stored, CacheStatus.HIT if status is CacheStatus.HIT else CacheStatus.SHARED
        if not self._settings.shares_cache:
            # A look into this process's memory waits for nothing: a hit needs no flight.
            known = await clock.timed("cache", self._answers.get(key, job.request))
            if known is not None:
                return known, CacheStatus.HIT
        flight = self._flights.start(key, lambda: self._landing(key, job, clock))
        return await self._flights.wait(key, flight)

    async def _landing(self, key: bytes, job: _Job, clock: Clock) -> _Landing:
        if not self._settings.shares_cache:
            return await self._compute_and_keep(key, job, clock), CacheStatus.MISS

        def look() -> Awaitable[StoredAnswer | None]:
            return self._answers.get(key, job.request)

        stored = await clock.timed("cache", look())
        if stored is not None:
            return stored, CacheStatus.HIT
        lease = Lease(self._answers.store.backend, key)
        try:
            stored = await clock.timed("cache", lease.take_or_wait(look))
            if stored is not None:
                return stored, CacheStatus.SHARED
            return await self._compute_and_keep(key, job, clock), CacheStatus.MISS
        finally:
            self._stores.start(lease.give_back())

    async def _compute_and_keep(self, key: bytes, job: _Job, clock: Clock) -> StoredAnswer:
        stored = await self._compute(job, clock)
        # A model that was replaced meanwhile must not leave answers under the old name.
        if self._upstream.serves(job.served):
            await clock.timed("cache", self._answers.put(key, stored))
        return stored

    async def _compute(self, job: _Job, clock: Clock) -> StoredAnswer:
        windows, passage = await self._encode(job, clock)
        logits = await self._infer(job, windows.windows, clock)
        stored = await clock.timed("read", self._read(windows, passage, logits, job.request))
        return replace(stored, warnings=_warnings(job.request, stored, job.served))

    async def _compute_all(self, jobs: Sequence[_Job], clock: Clock) -> list[StoredAnswer]:
        """The same for several passages, in one batch."""
        # They are tokenised side by side: the hop's time is that of all, not the sum.
        encoding = asyncio.gather(*(self._encode(job, Clock()) for job in jobs))
        encoded = await clock.timed("tokenizer", encoding)
        every = [window for windows, _ in encoded for window in windows.windows]
        logits = iter((await self._infer(jobs[0], every, clock)).logits)
        answers = []
        for job, (windows, passage) in zip(jobs, encoded, strict=True):
            own = shard_pb.InferResponse(logits=islice(logits, len(windows.windows)))
            reading = self._read(windows, passage, own, job.request)
            answers.append(await clock.timed("read", reading))
        return answers

    async def _infer(
        self, job: _Job, windows: Iterable[tokenizer_pb.Window], clock: Clock
    ) -> shard_pb.InferResponse:
        infer = shard_pb.InferRequest(
            sequences=[
                shard_pb.TokenSequence(input_ids=w.input_ids, token_type_ids=w.token_type_ids)
                for w in windows
            ],
            cache_salt=self._prompts.store.salt(),
        )
        started = time.perf_counter()
        logits = await self._rpc(
            job, "stage 0", "miaotui.v1.ShardService/Infer", self._upstream.infer(job.served), infer
        )
        _add_stages(clock, logits, time.perf_counter() - started)
        return logits

    async def _encode(
        self, job: _Job, clock: Clock, *, explain: bool = False
    ) -> tuple[tokenizer_pb.EncodeResponse, tokenizer_pb.TokenizedText]:
        request = job.request
        key = self._prompts.key(job.served.tokenizer_fingerprint, request)
        known = await clock.timed("cache", self._prompts.get(key, request))
        encode = tokenizer_pb.EncodeRequest(
            question=request.question,
            options=tokenizer_pb.TextOptions(
                normalization=_NORMALIZATION[request.normalization],
                strip_markup=request.strip_markup,
            ),
            explain=explain,
        )
        if known is not None:
            encode.tokenized.CopyFrom(known)
            # Refused: by a tokenizer of other files or options than the one that made it.
            with suppress(_RefusedPromptError):
                return await clock.timed("tokenizer", self._tokenize(job, encode)), known
        encode.text = request.context
        windows = await clock.timed("tokenizer", self._tokenize(job, encode))
        self._stores.start(self._prompts.put(key, windows.passage))
        return windows, windows.passage

    async def _tokenize(
        self, job: _Job, encode: tokenizer_pb.EncodeRequest
    ) -> tokenizer_pb.EncodeResponse:
        name = "miaotui.v1.TokenizerService/Encode"
        return await self._rpc(job, "tokenizer", name, self._upstream.encode(job.served), encode)

    async def _rpc(
        self,
        job: _Job,
        service: str,
        name: str,
        method: UnaryMethod[_Request, T],
        request: _Request,
    ) -> T:
        async def attempt() -> T:
            request.request_id = call_id(job.request_id)
            try:
                return await call(method, request, name=name, timeout=job.time_left())
            except aio.AioRpcError as error:
                if _is_refused_prompt(error, request):
                    raise _RefusedPromptError from None
                raise

        # The process behind the address may be another by the second time.
        return await retried(
            attempt,
            service,
            lambda: self._upstream.check_still(job.served, job.time_left() - MARGIN_SECONDS),
            self._upstream.budget,
        )

    async def _read(
        self,
        windows: tokenizer_pb.EncodeResponse,
        passage: tokenizer_pb.TokenizedText,
        logits: shard_pb.InferResponse,
        request: QaRequest,
    ) -> StoredAnswer:
        try:
            with span_within(_tracer, "read spans"):
                if len(windows.windows) <= READ_INLINE_WINDOWS:
                    return self._reader(windows, passage, logits, request)
                return await asyncio.to_thread(self._reader, windows, passage, logits, request)
        except ValueError as error:
            log.error("reading spans failed: %s", type(error).__name__)
            raise GatewayError(
                "service-failed", "Tokenizer and shards gave replies that do not fit each other."
            ) from None

    async def close(self) -> None:
        """Waits for cache writes that are under way."""
        await self._stores.finish()


def _warnings(request: QaRequest, stored: StoredAnswer, served: Served) -> list[WarningView]:
    if stored.warnings is not None:
        return stored.warnings
    return warnings_about(request.question, request.context, stored.unknown, served)


class _RefusedPromptError(Exception):
    """The tokenizer does not take a passage that was tokenised before."""


def _is_refused_prompt(error: aio.AioRpcError, request: object) -> bool:
    return (
        error.code() is grpc.StatusCode.FAILED_PRECONDITION
        and isinstance(request, tokenizer_pb.EncodeRequest)
        and request.HasField("tokenized")
    )


def _add_stages(clock: Clock, logits: shard_pb.InferResponse, elapsed: float) -> None:
    """Splits the time of an Infer call: queues, each stage's work, and the rest ("links")."""
    queued = sum(timing.queue_micros for timing in logits.timings) / 1e6
    clock.add("queue", queued)
    computed = 0.0
    for timing in logits.timings:
        clock.add(f"stage {timing.stage}", timing.compute_micros / 1e6)
        computed += timing.compute_micros / 1e6
    clock.add("links", elapsed - queued - computed)
