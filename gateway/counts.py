"""Instruments that are read when somebody asks, and cost a dictionary's entry until then.

OpenTelemetry's own take about 15 µs for each count, mostly to hash the attributes, and a request
counts half a dozen things.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from opentelemetry.metrics import CallbackOptions, Meter, Observation


class _Sums:
    """Sums by the values of the attributes `names`. Not thread-safe: the event loop's."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names
        self._sums: dict[tuple[str, ...], int] = {}

    def add(self, change: int, *values: str) -> None:
        """Adds to the sum of these values of the attributes, in their order."""
        self._sums[values] = self._sums.get(values, 0) + change

    def _observe(self, _: CallbackOptions) -> Iterable[Observation]:
        # A copy, because exporters ask from threads of their own.
        return list(self._observations(self._sums.copy()))

    def _observations(self, sums: dict[tuple[str, ...], int]) -> Iterator[Observation]:
        for values, total in sums.items():
            yield Observation(total, dict(zip(self._names, values, strict=True)))


class Counts(_Sums):
    """A counter."""

    def __init__(self, meter: Meter, name: str, *attributes: str, description: str) -> None:
        super().__init__(attributes)
        meter.create_observable_counter(name, [self._observe], description=description)


class Level(_Sums):
    """A number that goes up and down."""

    def __init__(
        self, meter: Meter, name: str, *attributes: str, unit: str = "", description: str
    ) -> None:
        super().__init__(attributes)
        meter.create_observable_up_down_counter(name, [self._observe], unit, description)
