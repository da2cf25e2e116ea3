"""What a stage reports of each batch: spans for every request in it, and metrics."""

from __future__ import annotations

import time

from opentelemetry import metrics, trace
from opentelemetry.trace import Link, SpanKind

from miaotui.engine.batch import Batch
from miaotui.telemetry import extract_context


def _time_of_day(*monotonic: float) -> list[int]:
    """Readings of `time.monotonic()` as nanoseconds since the epoch, which spans want.

    The two clocks drift apart, so they are compared anew each time: processes that did it
    once, at their start, would disagree by milliseconds.
    """
    epoch = time.time_ns() - time.monotonic_ns()
    return [int(reading * 1e9) + epoch for reading in monotonic]


class StageObserver:
    """Spans and metrics of one stage."""

    def __init__(self, stage: int) -> None:
        self.stage = stage
        self.sequences_total = 0
        self.tokens_total = 0
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

    def computed(self, batch: Batch, started: float, finished: float) -> None:
        """Reports a batch computed from `started` to `finished` (`time.monotonic()`)."""
        tokens = batch.tokens
        self.sequences_total += len(batch.sequences)
        self.tokens_total += tokens
        self._compute.record(finished - started, self._labels)
        self._tokens.add(tokens, self._labels)
        self._sequences.add(len(batch.sequences), self._labels)
        for meta in batch.sequences:
            self._queue.record(started - meta.arrived, self._labels)
        self._spans(batch, tokens, started, finished)

    def _spans(self, batch: Batch, tokens: int, started: float, finished: float) -> None:
        attributes: dict[str, int | str] = {
            "miaotui.stage": self.stage,
            "miaotui.batch.id": batch.batch_id,
            "miaotui.batch.sequences": len(batch.sequences),
            "miaotui.batch.tokens": tokens,
            "miaotui.batch.in_flight": batch.in_flight,
        }
        contexts = [extract_context(meta.trace) for meta in batch.sequences]
        parents = [trace.get_current_span(context).get_span_context() for context in contexts]
        if not any(parent.is_valid and parent.trace_flags.sampled for parent in parents):
            return
        # A batch serves many requests, so its own span has no single parent: it links to all.
        # By their ids, because a span context holds a list and so cannot be hashed.
        distinct = {(parent.trace_id, parent.span_id): parent for parent in parents}
        links = [Link(parent) for parent in distinct.values() if parent.is_valid]
        begin, end, *arrivals = _time_of_day(
            started, finished, *(meta.arrived for meta in batch.sequences)
        )
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
        for meta, context, arrived in zip(batch.sequences, contexts, arrivals, strict=True):
            own = {
                **attributes,
                "miaotui.sequence": meta.sequence,
                "miaotui.sequence.tokens": meta.length,
            }
            waited = self._tracer.start_span(
                f"stage {self.stage} queue",
                context=context,
                attributes=own,
                start_time=arrived,
            )
            waited.end(begin)
            worked = self._tracer.start_span(
                f"stage {self.stage} compute",
                context=context,
                attributes=own,
                links=back,
                start_time=begin,
            )
            worked.end(end)
