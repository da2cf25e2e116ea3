"""Stage 0 as the head of a decoder's pipeline: requests, batches in flight, and replay."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

from miaotui.engine.batch import Batch
from miaotui.engine.decode.flight import Flights, fits, load
from miaotui.engine.decode.observe import GenerationObserver
from miaotui.engine.decode.requests import OpenRequest, Sink, ending
from miaotui.engine.decode.scheduler import DecodeScheduler, Plan, Slice
from miaotui.engine.decode.sequence import NO_TOKENS, State, Text
from miaotui.engine.decode.settings import GenerationSettings
from miaotui.engine.decode.types import (
    FinishReason,
    GenerationRequest,
    GenerationUpdate,
    GenerationUsage,
    SampledTokens,
    TokenIds,
)
from miaotui.engine.decode.validation import InvalidRequestError, check_fits, check_request
from miaotui.engine.head import ComputeError, DeadlineError
from miaotui.engine.readiness import PipelineUnavailableError, Readiness

log = logging.getLogger(__name__)


class Handle:
    """A request that was taken."""

    __slots__ = ("_work",)

    def __init__(self, work: OpenRequest) -> None:
        self._work = work

    @property
    def request_id(self) -> str:
        """As the pipeline knows it."""
        return self._work.key

    def cancel(self) -> None:
        """Frees what the request holds; its sink is not called again. Harmless after its end."""
        self._work.muted = True
        self._work.abandon()


class GenerationHead:
    """Holds requests from arrival to the last token. The event loop owns it; nothing here
    computes.

    `compute(batch, input_ids)` runs a batch through stage 0 (`input_ids`: int32 [tokens], the
    sequences laid end to end). It is entered in the order of the batches and must compute them
    in this order. It does not raise for a batch's sake but fails the batch. `send(batch)`
    passes one to stage 1, in the same order and not before the call before has returned; None
    where there is only one stage: then `batch.sampled` is there after `compute`.
    """

    def __init__(
        self,
        settings: GenerationSettings,
        *,
        compute: Callable[[Batch, TokenIds], Awaitable[None]],
        send: Callable[[Batch], Awaitable[None]] | None,
        observer: GenerationObserver | None = None,
    ) -> None:
        """`observer`: of the other lanes' heads, which this one joins."""
        self.settings = settings
        self.scheduler = DecodeScheduler(settings)
        self.observer = observer or GenerationObserver(self.scheduler)
        self.observer.add(self.scheduler)
        self._flights = Flights(
            compute=compute, send=send, landed=self._unsent, broke=self.pipeline_down
        )
        self._requests: dict[str, OpenRequest] = {}
        self._batch_ids = itertools.count(1)
        self._request_ids = itertools.count(1)
        self._texts = 0
        self._news: dict[OpenRequest, None] = {}
        self._pumping = False
        self._delivery: asyncio.Handle | None = None
        self._due = math.inf
        self._delivered = -math.inf
        self._urgent = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._pipeline = Readiness(settings.grace, self._fail_all)

    @property
    def ready(self) -> bool:
        """Whether the pipeline is complete."""
        return self._pipeline.ready

    @property
    def patient(self) -> bool:
        """Whether requests are taken: now, or for as long as they wait for the pipeline."""
        return self._pipeline.patient

    @property
    def running_sequences(self) -> int:
        """Texts that hold KV blocks."""
        return self.scheduler.running

    @property
    def queued(self) -> int:
        """Texts that wait."""
        return len(self.scheduler.waiting)

    @property
    def open_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._requests)

    # -- requests --------------------------------------------------------------------------

    def submit(
        self,
        request_id: str,
        request: GenerationRequest,
        sink: Sink,
        *,
        deadline: float = math.inf,
        trace: Mapping[str, str] | None = None,
    ) -> Handle:
        """Takes a request, or raises.

        `sink` is called on the event loop, at most once a step, with what is new (a text's first
        token and its end at once, the others within `settings.news_seconds`); after an
        update with `usage`, or an exception (`PipelineUnavailableError`, `DeadlineError`,
        `ComputeError`, `InvalidRequestError`), no more. `deadline` on `time.monotonic()`.

        Raises `InvalidRequestError` (a ValueError), `QueueFullError`,
        `PipelineUnavailableError` or `DeadlineError`.
        """
        self._pipeline.check()
        now = time.monotonic()
        if deadline <= now:
            raise DeadlineError("the deadline has passed already")
        settings = self.settings
        capacity = self.scheduler.tables.capacity
        check_request(
            request,
            vocabulary=settings.vocabulary,
            context=settings.context,
            capacity=capacity,
            texts=settings.queue_sequences,
            source_shape=settings.source_shape,
        )
        work = OpenRequest(
            # Callers may reuse their ids; the pipeline's must be unique while in flight.
            key=f"{request_id}#{next(self._request_ids)}",
            request=request,
            trace=trace or {},
            arrived=now,
            usage=GenerationUsage(prompt_tokens=len(request.prompt)),
            sink=sink,
            head=self,
        )
        self.scheduler.waiting.check(request.n, request.n * len(request.prompt))
        texts = work.add_texts(self._texts, settings.draft_tokens)
        self._texts += len(texts)
        work.bound(settings.context, capacity)
        self.scheduler.add([text for text in texts if text.state is State.WAITING])
        self._requests[work.key] = work
        self._idle.clear()
        if request.written:
            self._end_full(work)
        self.observer.totals.prompt_tokens += request.n * len(request.prompt)
        if not math.isinf(deadline):
            error = DeadlineError("the deadline passed before the text was complete")
            loop = asyncio.get_running_loop()
            work.timer = loop.call_later(deadline - now, self._fail, work, error)
        # What else arrives in this turn of the loop may join the batch.
        self._pump_soon()
        return Handle(work)

    async def generate(
        self,
        request_id: str,
        request: GenerationRequest,
        *,
        deadline: float = math.inf,
        trace: Mapping[str, str] | None = None,
    ) -> AsyncIterator[GenerationUpdate]:
        """Yields a request's updates; raises what `submit` raises and its sink is told.

        Closing the iterator, or cancelling the task that waits for it, cancels the request.
        """
        updates: asyncio.Queue[GenerationUpdate | Exception] = asyncio.Queue()
        handle = self.submit(
            request_id, request, updates.put_nowait, deadline=deadline, trace=trace
        )
        try:
            while True:
                update = await updates.get()
                if isinstance(update, Exception):
                    raise update
                yield update
                if update.usage is not None:
                    return
        finally:
            handle.cancel()

    def abandon(self, work: OpenRequest) -> None:
        """Ends a request that nobody waits for any more."""
        if work.key in self._requests:
            self._close(work, "cancelled")

    async def drain(self, seconds: float) -> None:
        """Waits until nothing is open, for at most `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            log.info("%d requests are still open", len(self._requests))

    # -- the pipeline ----------------------------------------------------------------------

    def pipeline_up(self, blocks: int, block_tokens: int) -> None:
        """All stages are there and fit together; each has at least so many KV blocks."""
        tables = self.scheduler.tables
        if (blocks, block_tokens) != (tables.blocks, tables.block_tokens):
            self.pipeline_down("the KV cache has another size now")
            self.scheduler.configure(blocks, block_tokens)
            self._refit()
        self._pipeline.up()
        self._pump_soon()

    def pipeline_down(self, reason: str) -> None:
        """A link broke: texts go on where they were once the pipeline is back."""
        if not self._pipeline.down(reason):
            return
        self._flights.lose()
        replay = self.scheduler.reset()
        for text in replay:
            text.attempts += 1
            if text.attempts >= self.settings.max_attempts:
                error = PipelineUnavailableError(
                    f"the pipeline broke {text.attempts} times under this request: {reason}"
                )
                self._fail(_request(text), error)
        if replay:
            log.warning("%d texts will be computed again: %s", len(replay), reason)

    def complete(self, batch: Batch) -> None:
        """Takes a batch's results."""
        plan = self._flights.land(batch.batch_id)
        if plan is None:
            return  # of a pipeline that broke meanwhile: its texts are computed again
        live = [item for item in plan.slices if item.live]
        sampled = {item.sequence_id: item for item in batch.sampled or ()}
        problem = batch.dropped[0].message if batch.dropped else ""
        if not problem and not all(fits(item, sampled.get(item.sequence_id)) for item in live):
            problem = "the stages returned something else than they were asked for"
            log.error("batch %d: %s", batch.batch_id, problem)
        if problem:
            self._failed(live, problem)
        else:
            now = time.monotonic()
            for item in live:
                if item.samples:
                    self._take(item, sampled[item.sequence_id], now)
                else:
                    self.scheduler.advance(item, NO_TOKENS, 0)
        # First the next batch: the stages compute it while the news are delivered.
        self._pump()
        self._deliver_soon()

    def surrender(self) -> list[OpenRequest]:
        """Gives all requests up, for other heads to adopt. Only while the pipeline is down."""
        given, self._requests = list(self._requests.values()), {}
        for work in given:
            for text in work.texts:
                if text.state is State.WAITING:
                    self.scheduler.waiting.remove(text)
        self._idle.set()
        return given

    def adopt(self, work: OpenRequest) -> None:
        """Goes on with a request that another head has surrendered, from the tokens it has."""
        if work.timer is not None:
            error = DeadlineError("the deadline passed before the text was complete")
            loop = asyncio.get_running_loop()
            due = work.timer.when()
            work.timer.cancel()
            work.timer = loop.call_at(due, self._fail, work, error)
        # Its old key and places in the order of arrival may be taken here.
        work.key = f"{work.key.rpartition('#')[0]}#{next(self._request_ids)}"
        work.head = self
        work.prompt_digests = []
        self._requests[work.key] = work
        self._idle.clear()
        for text in work.texts:
            if text.state is State.WAITING:
                text.order, self._texts = self._texts, self._texts + 1
                text.digests = []  # keyed by the other's hasher
                self.scheduler.waiting.add(text)
        if self._fit(work):
            self._end_full(work)
        self._pump_soon()

    # -- batches -----------------------------------------------------------------------------

    def _pump_soon(self) -> None:
        if not self._pumping:
            self._pumping = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        self._pumping = False
        scheduler = self.scheduler
        while self._pipeline.ready:
            plan = scheduler.plan(in_flight=len(self._flights), decoding=self._flights.decoding)
            if plan is None:
                return
            batch, input_ids = load(next(self._batch_ids), plan, scheduler.tables)
            batch.released, scheduler.released = scheduler.released, []
            self._departs(plan)
            self._flights.start(batch, input_ids, plan)

    def _unsent(self, batch: Batch) -> None:
        """Takes a batch that went no further than stage 0."""
        if batch.dropped:
            # The stages behind have not heard of these yet.
            self.scheduler.released.extend(batch.released)
        self.complete(batch)

    def _departs(self, plan: Plan) -> None:
        self.observer.sent(plan)
        for item in plan.slices:
            work = item.text.work
            if item.first and not work.started:
                work.started = True
                work.usage.cached_tokens = item.start
                work.usage.queue_seconds = time.monotonic() - work.arrived
                self.observer.begun(work.usage.queue_seconds)

    # -- results -----------------------------------------------------------------------------

    def _take(self, item: Slice, sampled: SampledTokens, now: float) -> None:
        text = item.text
        work = _request(text)
        accepted = len(sampled.token_ids) - 1
        tokens, reason = ending(text, sampled)
        self.scheduler.advance(item, tokens, accepted)
        self.observer.wrote(len(tokens), len(item.draft), accepted)
        text.ready_since = now
        text.attempts = 0  # they count what breaks without any progress between
        work.usage.drafted_tokens += len(item.draft)
        work.usage.accepted_tokens += accepted
        work.usage.completion_tokens += len(tokens)
        work.note(text, sampled, tokens, reason)
        self._news[work] = None
        if text.length == text.prompt_length + len(tokens):
            self._urgent = True  # a text's first
        if reason is not None:
            self._finish(work, text)

    def _failed(self, live: list[Slice], problem: str) -> None:
        """A batch was not computed: whose fault it was shows when its texts run alone."""
        if not live:
            return
        suspects = [item.text for item in live]
        for text in suspects:
            text.attempts += 1
            if len(suspects) == 1 or text.attempts >= self.settings.max_attempts:
                self._fail(_request(text), ComputeError(problem))
        # What the KV cache holds is in doubt now.
        replay = self.scheduler.reset(text for text in suspects if text.state is not State.DONE)
        log.warning("%d texts will be computed again: %s", len(replay), problem)

    def _refit(self) -> None:
        """Bounds all texts by the KV cache's size, and ends what no longer fits."""
        for work in list(self._requests.values()):
            if self._fit(work):
                self._end_full(work)

    def _fit(self, work: OpenRequest) -> bool:
        """Bounds a request's texts by the KV cache's size; whether there is room for any."""
        context, capacity = self.settings.context, self.scheduler.tables.capacity
        try:
            check_fits(len(work.request.prompt), context=context, capacity=capacity)
        except InvalidRequestError as error:
            self._fail(work, error)
            return False
        work.bound(context, capacity)
        return True

    def _end_full(self, work: OpenRequest) -> None:
        """Ends those of a request's texts that are as long as they may be."""
        for text in work.texts:
            if text.state is not State.DONE and text.length >= text.limit:
                work.note(text, SampledTokens(0, NO_TOKENS), NO_TOKENS, FinishReason.LENGTH)
                self._finish(work, text)

    def _finish(self, work: OpenRequest, text: Text) -> None:
        self.scheduler.release(text)
        work.left -= 1
        self._news[work] = None
        self._urgent = True
        if not work.left:
            self._close(work, "complete")

    def _fail(self, work: OpenRequest, error: Exception) -> None:
        """Ends a request with an error."""
        if work.key in self._requests:
            work.error = error
            self._news[work] = None
            self._close(work, "failed")

    def _fail_all(self) -> None:
        for work in list(self._requests.values()):
            self._fail(work, PipelineUnavailableError(self._pipeline.reason))

    def _close(self, work: OpenRequest, outcome: str) -> None:
        """Frees what a request holds. There may still be news to deliver."""
        del self._requests[work.key]
        self._urgent = True
        self.observer.totals.requests[outcome] += 1
        if work.timer is not None:
            work.timer.cancel()
        for text in work.texts:
            self.scheduler.release(text)
        self._pump_soon()
        self._deliver_soon()

    # -- news --------------------------------------------------------------------------------

    def _deliver_soon(self) -> None:
        loop = asyncio.get_running_loop()
        due = -math.inf if self._urgent else self._delivered + self.settings.news_seconds
        if due >= self._due:
            return
        if self._delivery is not None:
            self._delivery.cancel()
        self._due = due
        if due <= loop.time():
            self._due = -math.inf
            self._delivery = loop.call_soon(self._deliver)
        else:
            self._delivery = loop.call_at(due, self._deliver)

    def _deliver(self) -> None:
        self._delivery, self._due, self._urgent = None, math.inf, False
        self._delivered = asyncio.get_running_loop().time()
        while self._news:
            work = next(iter(self._news))
            del self._news[work]
            work.deliver()
        if not self._requests:
            self._idle.set()


def _request(text: Text) -> OpenRequest:
    assert isinstance(text.work, OpenRequest)
    return text.work
