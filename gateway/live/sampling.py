"""Which requests are traced in full: a few a second, whatever the load."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from opentelemetry.context import Context
from opentelemetry.sdk.trace.sampling import Decision, ParentBased, Sampler, SamplingResult
from opentelemetry.trace import Link, SpanKind, TraceState
from opentelemetry.util.types import Attributes

# So many requests in a row are traced after a pause: whoever tries things out sees all.
_BURST = 5.0


class RateLimited:
    """A token bucket."""

    def __init__(
        self, a_second: float, burst: float = _BURST, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._rate = a_second
        self._burst = self._tokens = burst
        self._clock = clock
        self._then = clock()

    def empty(self) -> bool:
        """Whether there is no room now."""
        now = self._clock()
        self._tokens = min(self._burst, self._tokens + (now - self._then) * self._rate)
        self._then = now
        return self._tokens < 1

    def take(self) -> bool:
        """Whether there is room for one more now."""
        if self.empty():
            return False
        self._tokens -= 1
        return True


class _RootSampler(Sampler):
    """Samples requests for answers and texts while there is room; reads (GET) never."""

    def __init__(self, bucket: RateLimited) -> None:
        self._bucket = bucket

    def should_sample(
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: Attributes = None,
        links: Sequence[Link] | None = None,
        trace_state: TraceState | None = None,
    ) -> SamplingResult:
        """Decides for a request that belongs to no trace yet."""
        wanted = kind is SpanKind.SERVER and name not in ("GET", "HEAD") and self._bucket.take()
        decision = Decision.RECORD_AND_SAMPLE if wanted else Decision.DROP
        return SamplingResult(decision, attributes if wanted else None, trace_state)

    def get_description(self) -> str:
        """For logs."""
        return "RequestSampler"


class RequestSampler(ParentBased):
    """A caller's decision (`traceparent`) holds; others are sampled, at most so many a second."""

    def __init__(self, a_second: float) -> None:
        self._bucket = RateLimited(a_second)
        super().__init__(_RootSampler(self._bucket))

    def drops_next(self) -> bool:
        """Whether a request whose caller decides nothing is not sampled now, whatever it is."""
        return self._bucket.empty()
