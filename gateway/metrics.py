"""What the gateway counts and times. No label ever holds what a caller sent."""

from __future__ import annotations

from collections.abc import Iterable

from opentelemetry import metrics

from gateway.counts import Counts, Level
from gateway.generation.request import Usage
from gateway.live.counters import LiveCounters
from gateway.live.lone import LoneSpans
from gateway.live.traces import TraceRing
from gateway.schema import Hop
from gateway.served import Role
from miaotui.durations import Durations
from miaotui.telemetry import metrics_exported

_SCOPE = "miaotui.gateway"


class GatewayMetrics:
    """The gateway's instruments; make one after telemetry is set up.

    The label `model` tells what a model is there for ("generative", "transcribing"…), as
    /v1/models does by `kind`: the gateway serves one of each, and it stays the same over upgrades.
    """

    def __init__(self, traces: TraceRing | None = None) -> None:
        """`traces`: where slow and failed requests are kept that were not sampled."""
        self.live = LiveCounters()
        self.lone = LoneSpans(traces or TraceRing(0))
        meter = metrics.get_meter(_SCOPE)
        exported = metrics_exported()
        self.request_duration = Durations(
            _SCOPE,
            "http.server.request.duration",
            *("http.request.method", "http.response.status_code", "http.route", "url.scheme"),
            description="HTTP requests by route, status",
            exported=exported,
        )
        self.active_requests = Level(
            meter,
            *("http.server.active_requests", "http.request.method"),
            unit="{request}",
            description="HTTP requests in flight",
        )
        self._answers = Counts(
            meter,
            *("miaotui.gateway.answers", "outcome", "cache"),
            description="Questions by outcome and cache status",
        )
        self._in_flight = Level(
            meter,
            "miaotui.gateway.questions_in_flight",
            description="Questions worked on now",
        )
        self._hops = Durations(
            _SCOPE,
            *("miaotui.gateway.hop.duration", "hop"),
            description="Time per hop of a question",
            exported=exported,
        )
        self._retrievals = Counts(
            meter,
            *("miaotui.gateway.retrievals", "dense"),
            description="Searches of documents by whether they went by meaning, too",
        )
        self._lookups = Counts(
            meter,
            *("miaotui.gateway.cache.lookups", "cache", "result"),
            description="Cache look-ups by cache and result",
        )
        self._failures = Counts(
            meter,
            *("miaotui.gateway.cache.failures", "reason"),
            description="Cache operations that failed, by reason",
        )

        self._generations = Counts(
            meter,
            *("miaotui.gateway.generations", "model", "outcome", "cache"),
            description="Generated texts by kind of model, outcome, cache status",
        )
        self._generating = Level(
            meter,
            *("miaotui.gateway.generations_in_flight", "model"),
            description="Generations worked on now, by kind of model",
        )
        self._first_text = Durations(
            _SCOPE,
            *("miaotui.gateway.generation.first_text", "model"),
            description="From the call at the shards to the first text, by kind of model",
            exported=exported,
        )
        self._generated_tokens = Counts(
            meter,
            *("miaotui.gateway.generation.tokens", "model", "kind"),
            description="Tokens of finished texts by kind of model, and by their own: prompt, "
            "cached, written, accepted",
        )

        self._admissions = Counts(
            meter,
            *("miaotui.gateway.key.requests", "key", "outcome"),
            description="Requests by the id of their API key, and whether they were let in",
        )

    def admitted(self, key: str, outcome: str) -> None:
        """Counts a request with a key; `key`: its id; `outcome`: "ok", or why it stayed out."""
        self._admissions.add(1, key, outcome)

    def generated(self, model: Role, outcome: str, cache: str) -> None:
        """Counts a generation; `outcome`: "ok" or a problem's slug."""
        self._generations.add(1, model, outcome, str(cache))
        if outcome == "ok":
            self.live.answered(str(cache))

    def generating(self, model: Role, change: int) -> None:
        """Counts generations worked on."""
        self._generating.add(change, model)

    def first_text(self, model: Role, seconds: float) -> None:
        """Records how long the first text took."""
        self._first_text.record(seconds, model)

    def tokens(self, model: Role, usage: Usage) -> None:
        """Counts the tokens of a generation that has ended."""
        for kind, count in (
            ("prompt", usage.prompt_tokens),
            ("cached", usage.cached_tokens),
            ("written", usage.completion_tokens),
            ("accepted", usage.accepted_tokens),
        ):
            self._generated_tokens.add(count, model, kind)

    def answered(self, outcome: str, cache: str) -> None:
        """Counts a question; `outcome`: "ok" or a problem's slug."""
        self._answers.add(1, outcome, cache)
        if outcome == "ok":
            self.live.answered(cache)

    def in_flight(self, change: int) -> None:
        """Counts questions worked on."""
        self._in_flight.add(change)

    def hops(self, hops: Iterable[Hop]) -> None:
        """Records where a question's time went."""
        for hop in hops:
            self._hops.record(hop.milliseconds / 1000, hop.hop)

    def retrieved(self, dense: str) -> None:
        """Counts a search; `dense`: "used", or why it went by words only."""
        self._retrievals.add(1, dense)

    def lookup(self, cache: str, result: str) -> None:
        """Counts a look-up; `result`: "hit", "miss" or "garbage"."""
        self._lookups.add(1, cache, result)

    def cache_failure(self, reason: str) -> None:
        """Counts a failed operation; `reason`: "timeout" or "error"."""
        self._failures.add(1, reason)
