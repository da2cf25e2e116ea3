"""Spans of requests that were not sampled, but turned out to be slow or to fail."""

from __future__ import annotations

import time

from opentelemetry.trace import SpanContext

from gateway.live.sampling import RateLimited
from gateway.live.traces import SERVICE, KeptSpan, TraceRing

SLOW_SECONDS = 1.0
# Few, so that they do not push the whole traces out.
_A_SECOND = 0.2


class LoneSpans:
    """Keeps one span of such a request: its services were told at its begin to record none."""

    def __init__(self, ring: TraceRing) -> None:
        self._ring = ring
        self._bucket = RateLimited(_A_SECOND)

    @staticmethod
    def wanted(status: int, took: float) -> bool:
        """Whether a request with this HTTP status, after so many seconds, is such a one."""
        return status >= 500 or took >= SLOW_SECONDS

    def add(self, context: SpanContext, method: str, route: str, status: int, took: float) -> None:
        """Such a request is over: its span's context, HTTP status, and seconds."""
        if context.trace_flags.sampled or not context.is_valid or not self._bucket.take():
            return
        end = time.time_ns()
        self._ring.add(
            KeptSpan(
                trace_id=format(context.trace_id, "032x"),
                span_id=format(context.span_id, "016x"),
                parent_id=None,
                service=SERVICE,
                name=f"{method} {route}",
                start=end - int(took * 1e9),
                end=end,
                error=status >= 500,
                attributes={
                    "http.request.method": method,
                    "http.route": route,
                    "http.response.status_code": status,
                    "miaotui.sampled": False,
                },
            )
        )
