"""Traces, metrics and logs of one process, by OpenTelemetry.

Spans and metrics are exported over OTLP where the standard variables ask for it
(`OTEL_EXPORTER_OTLP_ENDPOINT` and its kin); metrics can be scraped by Prometheus
besides. Without such an endpoint, spans of sampled requests can go to a place of the service's
choice (`Spans`), and otherwise only carry their ids from hop to hop. Neither ever holds a
prompt or an answer unless `MIAOTUI_TRACE_CONTENT=1`.
"""

from __future__ import annotations

import logging
import os
import random
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import cast

from opentelemetry import context as otel_context
from opentelemetry import metrics, propagate, trace
from opentelemetry.context import Context
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricReader, PeriodicExportingMetricReader
from opentelemetry.sdk.metrics.view import ExplicitBucketHistogramAggregation, View
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased, Sampler
from opentelemetry.trace import (
    INVALID_SPAN,
    Link,
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    TraceFlags,
    Tracer,
)
from opentelemetry.util.types import Attributes

from miaotui import __version__
from miaotui.durations import SECONDS_BUCKETS, ScrapedReader

# Under this key a context holds its span: the only one of a context that has just that.
_SPAN_KEY = next(iter(trace.set_span_in_context(INVALID_SPAN, Context())))
# Not sampled; the id is random (W3C Trace Context, level 2).
_DROPPED = TraceFlags(0x02)
# Between exports to `Spans.exporter`; whoever looks at a trace has just made its request.
_EXPORT_MILLISECONDS = 500.0


@dataclass(frozen=True)
class Spans:
    """Where spans go without OpenTelemetry's own settings."""

    processor: SpanProcessor | None = None
    """Takes them in this process; also where they are exported over OTLP."""
    exporter: SpanExporter | None = None
    """Takes them in the background, unless they are exported over OTLP."""
    sampler: Sampler | None = None
    """Which traces are wanted, unless they are exported over OTLP; by default those alone
    that the caller samples."""


@dataclass(frozen=True)
class Telemetry:
    """The providers of this process; `shutdown` flushes what is not exported yet."""

    tracer_provider: TracerProvider
    meter_provider: MeterProvider

    def shutdown(self) -> None:
        """Exports what is left and stops; takes at most a few seconds."""
        self.tracer_provider.shutdown()
        self.meter_provider.shutdown()


def _otlp_wanted(signal: str) -> bool:
    if os.environ.get(f"OTEL_{signal}_EXPORTER", "otlp") == "none":
        return False
    return any(
        os.environ.get(name)
        for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT")
    )


def metrics_exported() -> bool:
    """Whether metrics are exported over OTLP, beside being there to be scraped."""
    return _otlp_wanted("METRICS")


def _tracer_provider(resource: Resource, spans: Spans | None) -> TracerProvider:
    if os.environ.get("OTEL_TRACES_EXPORTER") == "none":
        spans = None
    if _otlp_wanted("TRACES"):
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        # The sampler of OTEL_TRACES_SAMPLER, by default every trace.
        provider = TracerProvider(resource=resource)
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    elif spans is None:
        # Spans carry their ids from hop to hop, which costs next to nothing.
        return TracerProvider(resource=resource, sampler=ALWAYS_OFF)
    else:
        sampler = spans.sampler or ParentBased(ALWAYS_OFF)
        provider = TracerProvider(resource=resource, sampler=sampler)
        if spans.exporter is not None:
            delay = float(os.environ.get("OTEL_BSP_SCHEDULE_DELAY") or _EXPORT_MILLISECONDS)
            provider.add_span_processor(
                BatchSpanProcessor(spans.exporter, schedule_delay_millis=delay)
            )
    if spans is not None and spans.processor is not None:
        provider.add_span_processor(spans.processor)
    return provider


def setup_telemetry(service: str, *, instance: str = "", spans: Spans | None = None) -> Telemetry:
    """Installs this process's tracer and meter providers, once, at start.

    `service` becomes `service.name`, `instance` (such as "shard-1") `service.instance.id`.
    """
    resource = Resource.create(
        {
            "service.name": service,
            "service.namespace": "miaotui",
            "service.version": __version__,
            "service.instance.id": instance or f"{service}-{os.getpid()}",
        }
    )
    tracer_provider = _tracer_provider(resource, spans)
    trace.set_tracer_provider(tracer_provider)

    readers: list[MetricReader] = [ScrapedReader()]
    if metrics_exported():
        from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter

        readers.append(PeriodicExportingMetricReader(OTLPMetricExporter()))
    seconds = ExplicitBucketHistogramAggregation(boundaries=SECONDS_BUCKETS)
    meter_provider = MeterProvider(
        resource=resource,
        metric_readers=readers,
        views=[View(instrument_unit="s", aggregation=seconds, instrument_name="*")],
    )
    metrics.set_meter_provider(meter_provider)
    return Telemetry(tracer_provider, meter_provider)


def setup_logging(service: str, level: str = "INFO") -> None:
    """One line a record on stderr, with the service's name. Call it once, at start."""
    if sys.stderr is not None:
        # All that Python writes gets a descriptor of its own. 2 is native libraries', and may lead
        # nowhere while they work on what callers send (services/tokenizer/quiet.py).
        sys.stderr = os.fdopen(
            os.dup(sys.stderr.fileno()), "w", 1, sys.stderr.encoding, "backslashreplace"
        )
    logging.basicConfig(
        stream=sys.stderr,
        level=level.upper(),
        format=f"%(asctime)s %(levelname)-7s {service} %(name)s: %(message)s",
        force=True,
    )
    # These log each call, at a level that operators leave on.
    for noisy in ("httpx", "httpcore", "grpc._cython.cygrpc"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # This one tells of every header that is too long, and callers can send many.
    logging.getLogger("opentelemetry.trace.propagation").setLevel(logging.ERROR)


def trace_content() -> bool:
    """Whether spans may hold prompts and answers (`MIAOTUI_TRACE_CONTENT=1`)."""
    return os.environ.get("MIAOTUI_TRACE_CONTENT", "") == "1"


def inject_context(context: Context | None = None) -> dict[str, str]:
    """The W3C trace headers (`traceparent`, `tracestate`) of the current span."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier, context=context)
    return carrier


def extract_context(carrier: Mapping[str, str]) -> Context:
    """The context that W3C trace headers stand for; an empty one where they are absent."""
    return propagate.extract(dict(carrier)) if carrier else Context()


def span_within(
    tracer: Tracer,
    name: str,
    *,
    kind: SpanKind = SpanKind.INTERNAL,
    attributes: Attributes = None,
    links: Sequence[Link] | None = None,
    record_exception: bool = True,
    set_status_on_exception: bool = True,
) -> AbstractContextManager[Span]:
    """Makes a span within the current one; where nobody records that, the current one it is.

    A span takes as long to make as a look into a cache does, and most requests are not sampled.
    """
    current = current_span()
    if not current.is_recording() and current.get_span_context().is_valid:
        return nullcontext(current)
    return tracer.start_as_current_span(
        name,
        kind=kind,
        attributes=attributes,
        links=links,
        record_exception=record_exception,
        set_status_on_exception=set_status_on_exception,
    )


def current_span() -> Span:
    """As OpenTelemetry's own, which makes six calls for it."""
    return cast("Span", otel_context.get_current().get(_SPAN_KEY, INVALID_SPAN))


def context_of(span: Span) -> Context:
    """A context with this span and nothing else."""
    return Context({_SPAN_KEY: span})


def unrecorded_span() -> Span:
    """A root span that nobody records: it has ids, which OpenTelemetry takes far longer to make."""
    trace_id, span_id = random.getrandbits(128) or 1, random.getrandbits(64) or 1
    return NonRecordingSpan(SpanContext(trace_id, span_id, False, _DROPPED))


def traceparent(context: SpanContext) -> bytes:
    """The W3C header of a span's context."""
    return b"00-%032x-%016x-%02x" % (context.trace_id, context.span_id, context.trace_flags)


def trace_id_of(span: Span) -> str:
    """The id of the span's trace as 32 hex digits; empty where it belongs to none."""
    context = span.get_span_context()
    return format(context.trace_id, "032x") if context.is_valid else ""


def current_trace_id() -> str:
    """The current trace's id as 32 hex digits; empty outside of any trace."""
    return trace_id_of(current_span())
