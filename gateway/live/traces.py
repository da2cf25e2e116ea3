"""The traces of recent requests, in a bounded piece of memory."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from opentelemetry.context import Context
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1 import trace_pb2 as otlp
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.trace import Span, SpanKind, StatusCode

Scalar: TypeAlias = str | int | float | bool

SERVICE = "miaotui-gateway"
MOST_SPANS = 512
"""Of one trace; more are counted by nobody and dropped."""
_MOST_BYTES = 16 * 1024 * 1024
_SPAN_BYTES = 300  # of an empty span, about
_LONGEST_NAME = 120
_LONGEST_VALUE = 200
_MOST_ATTRIBUTES = 32
_KEPT = ("miaotui.", "http.", "rpc.", "error.", "network.", "url.scheme")
# Of MIAOTUI_TRACE_CONTENT=1: for whoever has asked for it, not for a page.
_CONTENT = frozenset(
    ("question", "context", "passage", "answer", "prompt", "text", "content", "header", "query")
)
# These say how much, not what.
_COUNTS = (".tokens", "_tokens", ".seconds")


@dataclass(frozen=True, slots=True)
class KeptSpan:
    """A span; times in nanoseconds since the epoch, ids as hex digits."""

    trace_id: str
    span_id: str
    parent_id: str | None
    service: str
    name: str
    start: int
    end: int
    error: bool
    attributes: Mapping[str, Scalar]

    @property
    def bytes(self) -> int:
        """Memory held, about."""
        texts = sum(
            len(key) + (len(value) if isinstance(value, str) else 8)
            for key, value in self.attributes.items()
        )
        return _SPAN_BYTES + len(self.name) + texts


@dataclass(slots=True)
class KeptTrace:
    """The spans of one request that have come so far."""

    trace_id: str
    spans: dict[str, KeptSpan] = field(default_factory=dict)
    bytes: int = 0

    @property
    def start(self) -> int:
        """In nanoseconds since the epoch."""
        return min(span.start for span in self.spans.values())

    @property
    def milliseconds(self) -> float:
        """From the first span's start to the last one's end."""
        return (max(span.end for span in self.spans.values()) - self.start) / 1e6

    @property
    def top(self) -> KeptSpan:
        """The span that the others stand under; the gateway's, if there are several."""
        roots = [span for span in self.spans.values() if span.parent_id not in self.spans]
        return min(roots, key=lambda span: (span.service != SERVICE, span.start))

    @property
    def error(self) -> bool:
        """Whether the request failed."""
        return self.top.error


def kept_attributes(given: Iterable[tuple[str, object]]) -> dict[str, Scalar]:
    """What is kept of a span's attributes: scalars under known names that hold no content."""
    kept: dict[str, Scalar] = {}
    for name, value in given:
        if len(kept) >= _MOST_ATTRIBUTES:
            break
        if not isinstance(value, (str, bool, int, float)) or not name.startswith(_KEPT):
            continue
        if isinstance(value, float) and not math.isfinite(value):
            continue  # JSON has no such number
        counts = not isinstance(value, str) and name.endswith(_COUNTS)
        if not counts and not _CONTENT.isdisjoint(name.split(".")):
            continue
        kept[name[:_LONGEST_NAME]] = value[:_LONGEST_VALUE] if isinstance(value, str) else value
    return kept


class TraceRing:
    """The traces of the last requests, oldest dropped first. Thread-safe."""

    def __init__(self, most: int) -> None:
        """`most`: traces kept; 0: none."""
        self._most = most
        self._traces: OrderedDict[str, KeptTrace] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def add(self, span: KeptSpan) -> None:
        """Keeps a span."""
        size = span.bytes
        with self._lock:
            kept = self._traces.get(span.trace_id)
            if kept is None:
                if not self._most:
                    return
                kept = self._traces[span.trace_id] = KeptTrace(span.trace_id)
            if len(kept.spans) >= MOST_SPANS or span.span_id in kept.spans:
                return
            kept.spans[span.span_id] = span
            kept.bytes += size
            self._bytes += size
            while len(self._traces) > self._most or self._bytes > _MOST_BYTES:
                _, dropped = self._traces.popitem(last=False)
                self._bytes -= dropped.bytes

    def newest(self, count: int) -> list[KeptTrace]:
        """The traces that began last, newest first."""
        with self._lock:
            traces = [_copy(trace) for trace in self._traces.values()]
        return sorted(traces, key=lambda trace: trace.start, reverse=True)[:count]

    def get(self, trace_id: str) -> KeptTrace | None:
        """One trace; `None` where it is not kept."""
        with self._lock:
            kept = self._traces.get(trace_id)
            return None if kept is None else _copy(kept)


def _copy(trace: KeptTrace) -> KeptTrace:
    return KeptTrace(trace.trace_id, dict(trace.spans), trace.bytes)


class RingProcessor(SpanProcessor):
    """Feeds the ring with this process's own spans as they end."""

    def __init__(self, ring: TraceRing) -> None:
        self._ring = ring

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        """Nothing: a span is kept once it has ended."""

    def on_end(self, span: ReadableSpan) -> None:
        """Keeps a span of a request."""
        context = span.get_span_context()
        if context is None or span.start_time is None or span.end_time is None:
            return
        if span.parent is None and span.kind is not SpanKind.SERVER:
            return  # of work that belongs to no request
        self._ring.add(
            KeptSpan(
                trace_id=format(context.trace_id, "032x"),
                span_id=format(context.span_id, "016x"),
                parent_id=None if span.parent is None else format(span.parent.span_id, "016x"),
                service=SERVICE,
                name=span.name[:_LONGEST_NAME],
                start=span.start_time,
                end=span.end_time,
                error=span.status.status_code is StatusCode.ERROR,
                attributes=kept_attributes((span.attributes or {}).items()),
            )
        )


def add_exported(ring: TraceRing, batches: Iterable[otlp.ResourceSpans]) -> None:
    """Keeps spans that another service has exported."""
    for batch in batches:
        service = next(
            (
                pair.value.string_value
                for pair in batch.resource.attributes
                if pair.key == "service.name"
            ),
            "",
        )
        instance = next(
            (
                pair.value.string_value
                for pair in batch.resource.attributes
                if pair.key == "service.instance.id"
            ),
            "",
        )
        # "shard-1" says more than "miaotui-shard".
        named = instance if instance.startswith("shard-") else service
        for scope in batch.scope_spans:
            for span in scope.spans:
                kept = _from_otlp(span, named[:_LONGEST_NAME] or "unknown")
                if kept is not None:
                    ring.add(kept)


def _from_otlp(span: otlp.Span, service: str) -> KeptSpan | None:
    if len(span.trace_id) != 16 or len(span.span_id) != 8:
        return None
    if not span.parent_span_id and span.kind != otlp.Span.SPAN_KIND_SERVER:
        # A batch's own span: it serves many requests and so has no parent.
        return None
    return KeptSpan(
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex() or None,
        service=service,
        name=span.name[:_LONGEST_NAME],
        start=span.start_time_unix_nano,
        end=max(span.end_time_unix_nano, span.start_time_unix_nano),
        error=span.status.code == otlp.Status.STATUS_CODE_ERROR,
        attributes=kept_attributes((pair.key, _value(pair.value)) for pair in span.attributes),
    )


def _value(value: AnyValue) -> object:
    kind = value.WhichOneof("value")
    if kind in ("string_value", "bool_value", "int_value", "double_value"):
        return getattr(value, kind)
    return None
