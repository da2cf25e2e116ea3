"""Live figures and traces as the HTTP API tells them."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, TypeAdapter

from gateway.live.counters import Figures, LiveCounters
from gateway.live.rings import KnownStage, Ring, Rings
from gateway.live.stages import StageWatch, State
from gateway.live.traces import KeptTrace, Scalar
from gateway.served import WRITING_ROLES, Role

_WINDOW_SECONDS = 60
_STEP_SECONDS = 5
MOST_TRACES = 100


@dataclass(frozen=True, slots=True)
class GatewayFigures:
    """Requests for answers and texts, over HTTP and gRPC, in the last minute."""

    requests_per_second: float
    errors_per_second: Annotated[float, Field(description="Failed, not by their callers' fault.")]
    in_flight: Annotated[int, Field(description="Worked on now.")]
    p50_milliseconds: float | None
    p99_milliseconds: float | None
    cache_hit_rate: Annotated[
        float | None, Field(description="0 to 1, of the answers that a cache was asked for.")
    ]


@dataclass(frozen=True, slots=True)
class StageFigures:
    """One stage; rates are of the last seconds, null where it was not seen for long enough."""

    index: int
    replica: Annotated[int, Field(description="Counts the stages of one index, from 0.")]
    address: str
    state: Annotated[
        State, Field(description="starting: it answers, but waits for its neighbours, or stops.")
    ]
    layers: Annotated[tuple[int, int], Field(description="The first, and one past the last.")]
    memory_bytes: Annotated[int | None, Field(description="Resident memory of the process.")]
    parameter_bytes: Annotated[int, Field(description="Of that, the stage's own parameters.")]
    queue: Annotated[
        int | None, Field(description="Sequences that wait; of later stages: batches.")
    ]
    batch_size: Annotated[float | None, Field(description="Mean sequences in a batch.")]
    batches_per_second: float | None
    tokens_per_second: Annotated[float | None, Field(description="Computed, prompts included.")]
    busy: Annotated[float | None, Field(description="Share of the time that it computes.")]
    link_milliseconds: Annotated[
        float | None, Field(description="To the next stage, one way, with a batch's bytes.")
    ]


@dataclass(frozen=True, slots=True)
class GenerationFigures:
    """A model that writes."""

    tokens_per_second: Annotated[float | None, Field(description="Tokens written.")]
    kv_use: Annotated[float, Field(description="Share of the KV blocks that texts hold.")]
    running: Annotated[int, Field(description="Texts that are written now.")]
    waiting: Annotated[int, Field(description="Texts that wait for their turn.")]


@dataclass(frozen=True, slots=True)
class ModelFigures:
    """A model and its stages."""

    name: str
    kind: Role
    ready: bool
    reason: Annotated[str | None, Field(description="Why it does not answer; null when ready.")]
    stages: list[StageFigures]
    generation: GenerationFigures | None


@dataclass(frozen=True, slots=True)
class HistoryPoint:
    """Five seconds."""

    time: Annotated[float, Field(description="Their end, in seconds since the epoch.")]
    requests_per_second: float
    p50_milliseconds: float | None


@dataclass(frozen=True, slots=True)
class Live:
    """What is going on."""

    time: Annotated[float, Field(description="In seconds since the epoch.")]
    uptime_seconds: float
    gateway: GatewayFigures
    models: list[ModelFigures]
    history: Annotated[list[HistoryPoint], Field(description="The last 5 minutes, oldest first.")]


@dataclass(frozen=True, slots=True)
class TraceEntry:
    """A trace that is kept."""

    trace_id: str
    name: str
    time: Annotated[float, Field(description="Its begin, in seconds since the epoch.")]
    milliseconds: float
    spans: int
    error: bool


@dataclass(frozen=True, slots=True)
class TraceList:
    """Recent traces."""

    traces: Annotated[list[TraceEntry], Field(description="Newest first, at most 100.")]


@dataclass(frozen=True, slots=True)
class SpanView:
    """Where a part of the time went."""

    span_id: str
    parent_id: str | None
    service: str
    name: str
    start_milliseconds: Annotated[float, Field(description="From the trace's begin.")]
    milliseconds: float
    error: bool
    attributes: dict[str, Scalar]


@dataclass(frozen=True, slots=True)
class TraceView:
    """One trace."""

    trace_id: str
    milliseconds: float
    spans: Annotated[list[SpanView], Field(description="In the order in which they began.")]


LIVE: TypeAdapter[Live] = TypeAdapter(Live)
TRACES: TypeAdapter[TraceList] = TypeAdapter(TraceList)
TRACE: TypeAdapter[TraceView] = TypeAdapter(TraceView)


def live_of(counters: LiveCounters, rings: Rings, watch: StageWatch) -> Live:
    """All figures, as of now."""
    now = time.time()
    last = counters.last(_WINDOW_SECONDS)
    return Live(
        time=now,
        uptime_seconds=round(counters.uptime, 3),
        gateway=GatewayFigures(
            requests_per_second=_rate(last),
            errors_per_second=round(last.errors / last.seconds, 3),
            in_flight=counters.in_flight,
            p50_milliseconds=_milliseconds(last.p50),
            p99_milliseconds=_milliseconds(last.p99),
            cache_hit_rate=None if last.hit_rate is None else round(last.hit_rate, 4),
        ),
        models=[_model(ring, watch) for ring in rings.now()],
        history=[
            HistoryPoint(round(now - age, 3), _rate(figures), _milliseconds(figures.p50))
            for age, figures in counters.history(_STEP_SECONDS)
        ],
    )


def trace_list(traces: list[KeptTrace]) -> TraceList:
    """Traces in short."""
    return TraceList(
        [
            TraceEntry(
                trace_id=trace.trace_id,
                name=trace.top.name,
                time=trace.start / 1e9,
                milliseconds=round(trace.milliseconds, 3),
                spans=len(trace.spans),
                error=trace.error,
            )
            for trace in traces
        ]
    )


def trace_of(trace: KeptTrace) -> TraceView:
    """A trace with its spans."""
    start = trace.start
    return TraceView(
        trace_id=trace.trace_id,
        milliseconds=round(trace.milliseconds, 3),
        spans=[
            SpanView(
                span_id=span.span_id,
                # Of a caller's own span there is nothing to be shown.
                parent_id=span.parent_id if span.parent_id in trace.spans else None,
                service=span.service,
                name=span.name,
                start_milliseconds=round((span.start - start) / 1e6, 3),
                milliseconds=round((span.end - span.start) / 1e6, 3),
                error=span.error,
                attributes=dict(span.attributes),
            )
            for span in sorted(trace.spans.values(), key=lambda span: (span.start, -span.end))
        ],
    )


def _rate(figures: Figures) -> float:
    return round(figures.requests / figures.seconds, 3)


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 3)


def _model(ring: Ring, watch: StageWatch) -> ModelFigures:
    stages: list[StageFigures] = []
    replicas: defaultdict[int, int] = defaultdict(int)
    for known in ring.stages:
        index = known.info.index
        stages.append(_stage(known, replicas[index], watch))
        replicas[index] += 1
    return ModelFigures(
        name=ring.name,
        kind=ring.kind,
        ready=ring.ready,
        reason=ring.reason or None,
        stages=stages,
        generation=_generation(ring, watch) if ring.kind in WRITING_ROLES else None,
    )


def _stage(known: KnownStage, replica: int, watch: StageWatch) -> StageFigures:
    stage = watch.stage(known.address)
    told = stage.told if stage else None
    rates = stage.rates() if stage else None
    info = told.stage if told else known.info
    return StageFigures(
        index=info.index,
        replica=replica,
        address=known.address,
        state=stage.state(known.named) if stage else "starting",
        layers=(info.first_layer, info.end_layer),
        memory_bytes=told.resident_bytes if told else None,
        parameter_bytes=info.parameter_bytes,
        queue=told.queued_sequences if told else None,
        batch_size=_rounded(rates.batch_size) if rates else None,
        batches_per_second=_rounded(rates.batches) if rates else None,
        tokens_per_second=_rounded(rates.tokens) if rates else None,
        # Finer than a thousandth: a little work is not none.
        busy=round(rates.busy, 6) if rates else None,
        link_milliseconds=told.link_micros / 1000 if told and told.link_micros else None,
    )


def _generation(ring: Ring, watch: StageWatch) -> GenerationFigures | None:
    heads = [
        stage
        for known in ring.stages
        if known.info.index == 0 and (stage := watch.stage(known.address)) is not None
    ]
    told = [head.told for head in heads if head.told is not None]
    if not told:
        return None
    rates = [known for head in heads if (known := head.rates()) is not None]
    blocks = min((known.info.kv_blocks for known in ring.stages), default=0) * len(told)
    return GenerationFigures(
        tokens_per_second=_rounded(sum(r.written for r in rates)) if rates else None,
        kv_use=round(sum(t.kv_blocks_used for t in told) / blocks, 4) if blocks else 0.0,
        running=sum(t.running_sequences for t in told),
        waiting=sum(t.queued_sequences for t in told),
    )


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
