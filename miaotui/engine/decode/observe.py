"""What the head reports of generation: metrics, by OpenTelemetry."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from opentelemetry import metrics
from opentelemetry.metrics import CallbackOptions, Observation

from miaotui.engine.decode.scheduler import DecodeScheduler, Plan


@dataclass(slots=True)
class GenerationTotals:
    """Counted since the head's start."""

    requests: dict[str, int] = field(
        default_factory=lambda: {"complete": 0, "failed": 0, "cancelled": 0}
    )
    """By how they ended."""
    tokens: int = 0
    """Written."""
    prompt_tokens: int = 0
    """Of all texts that were taken."""
    drafted: int = 0
    accepted: int = 0


class GenerationObserver:
    """Metrics of one head, or of the heads of several lanes. Its counters are read when they are
    collected: they cost no step anything."""

    def __init__(self, scheduler: DecodeScheduler) -> None:
        self.totals = totals = GenerationTotals()
        meter = metrics.get_meter("miaotui.engine.decode")
        self._queue = meter.create_histogram(
            "miaotui.generate.queue.duration", "s", "From a request's arrival to its first batch"
        )
        self._batch_texts = meter.create_histogram(
            "miaotui.generate.batch.sequences", "{sequence}", "Texts in a batch"
        )
        self._batch_tokens = meter.create_histogram(
            "miaotui.generate.batch.tokens", "{token}", "Tokens in a batch"
        )
        # Only weakly: a meter outlives heads.
        self._schedulers = sources = weakref.WeakSet((scheduler,))

        def reads(
            read: Callable[[], int],
        ) -> list[Callable[[CallbackOptions], Iterable[Observation]]]:
            def observe(_options: CallbackOptions) -> Iterable[Observation]:
                return [Observation(read())] if sources else []

            return [observe]

        def ended(_options: CallbackOptions) -> Iterable[Observation]:
            if not sources:
                return []
            return [
                Observation(count, {"miaotui.outcome": outcome})
                for outcome, count in totals.requests.items()
            ]

        counters: list[tuple[str, str, str, Callable[[], int]]] = [
            ("tokens", "{token}", "Tokens written", lambda: totals.tokens),
            ("prompt.tokens", "{token}", "Tokens of prompts", lambda: totals.prompt_tokens),
            (
                "prompt.shared_tokens",
                "{token}",
                "Tokens not computed, because others had begun alike",
                lambda: sum(one.tables.shared_tokens for one in sources),
            ),
            ("drafted.tokens", "{token}", "Tokens guessed ahead", lambda: totals.drafted),
            ("accepted.tokens", "{token}", "Guesses that were right", lambda: totals.accepted),
        ]
        for name, unit, text, read in counters:
            meter.create_observable_counter(f"miaotui.generate.{name}", reads(read), unit, text)
        meter.create_observable_counter(
            "miaotui.generate.requests", [ended], "{request}", "Requests that ended"
        )

    def add(self, scheduler: DecodeScheduler) -> None:
        """Counts another lane's, too."""
        self._schedulers.add(scheduler)

    def begun(self, waited: float) -> None:
        """A request's first batch sets out, so many seconds after its arrival."""
        self._queue.record(waited)

    def sent(self, plan: Plan) -> None:
        """A batch sets out."""
        self._batch_texts.record(len(plan.slices))
        self._batch_tokens.record(plan.tokens)

    def wrote(self, tokens: int, drafted: int, accepted: int) -> None:
        """A text grew."""
        totals = self.totals
        totals.tokens += tokens
        totals.drafted += drafted
        totals.accepted += accepted
