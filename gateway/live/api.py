"""The endpoints of live figures and traces."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway.errors import GatewayError
from gateway.http.exchange import json_response
from gateway.live.counters import LiveCounters
from gateway.live.rings import Rings
from gateway.live.stages import StageWatch
from gateway.live.traces import TraceRing
from gateway.live.views import LIVE, MOST_TRACES, TRACE, TRACES, live_of, trace_list, trace_of
from gateway.models import Models
from gateway.settings import GatewaySettings


class LiveFigures:
    """What is going on, from all who know."""

    def __init__(
        self,
        settings: GatewaySettings,
        models: Models,
        counters: LiveCounters,
        traces: TraceRing,
    ) -> None:
        """`traces` is fed by telemetry, `counters` by whoever handles requests."""
        self._counters = counters
        self._traces = traces
        self._rings = Rings(models, settings)
        self._watch = StageWatch(self._addresses, settings.poll_seconds)

    def start(self) -> None:
        """Begins to watch the stages."""
        self._watch.start()

    async def close(self) -> None:
        """Stops watching."""
        await self._watch.close()

    def _addresses(self) -> set[str]:
        return {stage.address for ring in self._rings.now() for stage in ring.stages}

    async def live(self, _: Request) -> Response:
        """GET /v1/live"""
        figures = live_of(self._counters, self._rings, self._watch)
        return json_response(LIVE.dump_json(figures))

    async def traces(self, _: Request) -> Response:
        """GET /v1/traces"""
        return json_response(TRACES.dump_json(trace_list(self._traces.newest(MOST_TRACES))))

    async def trace(self, request: Request) -> Response:
        """GET /v1/traces/{trace_id}"""
        kept = self._traces.get(request.path_params["trace_id"].lower())
        if kept is None:
            raise GatewayError(
                "not-found",
                "No such trace is kept: some requests a second are traced, and the last ones "
                "kept. A request with a sampled traceparent always is.",
            )
        return json_response(TRACE.dump_json(trace_of(kept)))

    def routes(self) -> list[Route]:
        """All routes."""
        return [
            Route("/v1/live", self.live),
            Route("/v1/traces", self.traces),
            Route("/v1/traces/{trace_id}", self.trace),
        ]
