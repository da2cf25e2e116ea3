"""What a stage reports of each batch: spans for every request in it, and metrics."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from opentelemetry import metrics, trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, SpanKind

from miaotui.engine.batch import Batch, SequenceMeta
from miaotui.engine.decode.types import GenerationUpdate, GenerationUsage
from miaotui.telemetry import extract_context


def _time_of_day(*monotonic: float) -> list[int]:
    """Readings of `time.monotonic()` as nanoseconds since the epoch, which spans want.

    The two clocks drift apart, so they are compared anew each time: processes that did it
    once, at their start, would disagree by milliseconds.
    """
    epoch = time.time_ns() - time.monotonic_ns()
    return [int(reading * 1e9) + epoch for reading in monotonic]


def _recorded(carrier: Mapping[str, str]) -> Context | None:
    """A request's trace context from W3C headers; None where its trace is not recorded."""
    context = extract_context(carrier)
    parent = trace.get_current_span(context).get_span_context()
    return context if parent.is_valid and parent.trace_flags.sampled else None


class StageObserver:
    """Spans and metrics of one stage."""

    def __init__(self, stage: int) -> None:
        self.stage = stage
        self.sequences_total = 0
        self.tokens_total = 0
        self.batches_total = 0
        self.compute_seconds = 0.0
        self._tracer = trace.get_tracer("miaotui.engine")
        meter = metrics.get_meter("miaotui.engine")
        self._queue = meter.create_histogram(
            "miaotui.stage.queue.duration", "s", "From a sequence's arrival to its computation"
        )
        self._compute = meter.create_histogram(
            "miaotui.stage.compute.duration", "s", "Computation of a batch"
        )
        self._tokens = meter.create_counter("miaotui.stage.tokens", "{token}", "Tokens computed")
        self._sequences = meter.create_counter(
            "miaotui.stage.sequences", "{sequence}", "Sequences computed"
        )
        self._dropped = meter.create_counter(
            "miaotui.stage.dropped", "{sequence}", "Sequences dropped before they were computed"
        )
        self._labels = {"miaotui.stage": stage}

    def dropped(self, code: str, count: int) -> None:
        """Counts sequences that left their batch here."""
        self._dropped.add(count, {**self._labels, "miaotui.drop.reason": code})

    def looked(self, batch: Batch, began: float, ended: float, found: int) -> None:
        """Reports a look for a batch's passages elsewhere, which took from `began` to `ended`."""
        begin, end = _time_of_day(began, ended)
        for meta in batch.sequences:
            if (context := _recorded(meta.trace)) is not None:
                attributes = {"miaotui.stage": self.stage, "miaotui.passages.found": found}
                self._tracer.start_span(
                    f"stage {self.stage} passages",
                    context=context,
                    attributes=attributes,
                    start_time=begin,
                ).end(end)

    def computed(self, batch: Batch, started: float, finished: float) -> None:
        """Reports a batch computed from `started` to `finished` (`time.monotonic()`)."""
        tokens = batch.tokens
        self.sequences_total += len(batch.sequences)
        self.tokens_total += tokens
        self.batches_total += 1
        self.compute_seconds += finished - started
        self._compute.record(finished - started, self._labels)
        self._tokens.add(tokens, self._labels)
        self._sequences.add(len(batch.sequences), self._labels)
        # Of a decoder, prompts alone: a span and a record for every token would drown the rest.
        shown = [meta for meta in batch.sequences if meta.decode is None or meta.prefill]
        for meta in shown:
            self._queue.record(started - meta.arrived, self._labels)
        if shown:
            self._spans(batch, shown, tokens, started, finished)

    def _spans(
        self,
        batch: Batch,
        shown: Sequence[SequenceMeta],
        tokens: int,
        started: float,
        finished: float,
    ) -> None:
        attributes: dict[str, int | str] = {
            "miaotui.stage": self.stage,
            "miaotui.batch.id": batch.batch_id,
            "miaotui.batch.sequences": len(batch.sequences),
            "miaotui.batch.tokens": tokens,
            "miaotui.batch.in_flight": batch.in_flight,
        }
        contexts = [extract_context(meta.trace) for meta in shown]
        parents = [trace.get_current_span(context).get_span_context() for context in contexts]
        if not any(parent.is_valid and parent.trace_flags.sampled for parent in parents):
            return
        # A batch serves many requests, so its own span has no single parent: it links to all.
        # By their ids, because a span context holds a list and so cannot be hashed.
        distinct = {(parent.trace_id, parent.span_id): parent for parent in parents}
        links = [Link(parent) for parent in distinct.values() if parent.is_valid]
        begin, end, *arrivals = _time_of_day(started, finished, *(meta.arrived for meta in shown))
        shared = self._tracer.start_span(
            f"stage {self.stage} batch",
            context=trace.set_span_in_context(trace.INVALID_SPAN),
            kind=SpanKind.INTERNAL,
            attributes=attributes,
            links=links,
            start_time=begin,
        )
        shared.end(end)
        back = [Link(shared.get_span_context())]
        for meta, context, arrived in zip(shown, contexts, arrivals, strict=True):
            own = {
                **attributes,
                "miaotui.sequence": meta.sequence,
                "miaotui.sequence.tokens": meta.length,
            }
            if meta.decode is not None:
                own["miaotui.sequence.start"] = meta.decode.start
            waited = self._tracer.start_span(
                f"stage {self.stage} queue",
                context=context,
                attributes=own,
                start_time=arrived,
            )
            waited.end(begin)
            worked = self._tracer.start_span(
                f"stage {self.stage} {'compute' if meta.decode is None else 'prefill'}",
                context=context,
                attributes=own,
                links=back,
                start_time=begin,
            )
            worked.end(end)


class RequestObserver:
    """Spans and metrics of one request for text: of its prompt, and of all that is written.

    A span a step would drown a trace, so there are two: "prefill", from the request's arrival
    to its first token, and "decode", from there to the last.
    """

    def __init__(self, carrier: Mapping[str, str]) -> None:
        """`carrier`: W3C trace context of the request."""
        self._carrier = carrier
        self._started = time.monotonic()
        self._first = self._last = 0.0
        self._steps = 0
        self._tokens = 0
        self._ended = False

    def news(self, update: GenerationUpdate | Exception) -> None:
        """Takes what the request's sink is told."""
        now = time.monotonic()
        if isinstance(update, Exception):
            self._end(now, type(update).__name__)
            return
        tokens = sum(len(delta.token_ids) for delta in update.deltas)
        if tokens:
            if not self._first:
                self._first = now
                _instruments().first.record(now - self._started)
            else:
                # Tokens of one step come together; each took its share of the time.
                _instruments().between.record((now - self._last) / tokens)
            self._last = now
            self._steps += 1
            self._tokens += tokens
        if update.usage is not None:
            self._end(now, "", update.usage)

    def cancelled(self) -> None:
        """The caller went away."""
        self._end(time.monotonic(), "cancelled")

    def _end(self, now: float, problem: str, usage: GenerationUsage | None = None) -> None:
        if self._ended:
            return
        self._ended = True
        if (context := _recorded(self._carrier)) is None:
            return
        attributes: dict[str, int | float | str] = {}
        if usage is not None:
            attributes = {
                "miaotui.prompt.tokens": usage.prompt_tokens,
                "miaotui.prompt.cached_tokens": usage.cached_tokens,
                "miaotui.queue.seconds": usage.queue_seconds,
                "miaotui.drafted_tokens": usage.drafted_tokens,
                "miaotui.accepted_tokens": usage.accepted_tokens,
                "miaotui.preemptions": usage.preemptions,
            }
        if problem:
            attributes["miaotui.ended_by"] = problem
        begin, first, end = _time_of_day(self._started, self._first or now, now)
        tracer = trace.get_tracer("miaotui.engine")
        prefill = tracer.start_span(
            "prefill", context=context, attributes=attributes, start_time=begin
        )
        prefill.end(first)
        if self._first:
            written: dict[str, int | float] = {
                "miaotui.text.tokens": self._tokens,
                "miaotui.steps": self._steps,
                "miaotui.first_token.seconds": self._first - self._started,
            }
            decode = tracer.start_span(
                "decode", context=context, attributes={**attributes, **written}, start_time=first
            )
            decode.end(end)


@dataclass(frozen=True)
class _Instruments:
    first: metrics.Histogram
    between: metrics.Histogram


@cache
def _instruments() -> _Instruments:
    meter = metrics.get_meter("miaotui.engine")
    return _Instruments(
        meter.create_histogram(
            "miaotui.generate.first_token.duration", "s", "From arrival to the first token"
        ),
        meter.create_histogram(
            "miaotui.generate.token.duration", "s", "From a token of a request to its next"
        ),
    )
