"""What the gateway did in the last minutes, counted so cheaply that every request can be."""

from __future__ import annotations

import math
import time
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

KEPT_SECONDS = 300
# A bucket is 12 % wide, so a percentile is off by 6 % at most; from 0.1 ms to about 10 min.
_SHORTEST = 1e-4
_STEP = math.log(1.12)
_BUCKETS = 140


def _bucket(seconds: float) -> int:
    if seconds <= _SHORTEST:
        return 0
    return min(_BUCKETS - 1, int(math.log(seconds / _SHORTEST) / _STEP))


def _middle(bucket: int) -> float:
    """Seconds in a bucket's (geometric) middle."""
    return _SHORTEST * math.exp((bucket + 0.5) * _STEP)


@dataclass(slots=True)
class _Slot:
    """One second."""

    second: int = -1
    requests: int = 0
    errors: int = 0
    hits: int = 0
    lookups: int = 0
    durations: array[int] = field(default_factory=lambda: array("I", bytes(4 * _BUCKETS)))

    def begin(self, second: int) -> None:
        self.second = second
        self.requests = self.errors = self.hits = self.lookups = 0
        self.durations = array("I", bytes(4 * _BUCKETS))


@dataclass(frozen=True, slots=True)
class Figures:
    """Sums over some seconds; rates are theirs, times in seconds."""

    seconds: float
    requests: int
    errors: int
    p50: float | None
    p99: float | None
    hit_rate: float | None
    """Of the answers that a cache was asked for; `None` where it was not."""


class LiveCounters:
    """Requests for answers and texts, over HTTP and gRPC alike: a slot a second.

    Not thread-safe: the event loop's.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` in seconds."""
        self._clock = clock
        self._started = clock()
        self._slots = [_Slot() for _ in range(KEPT_SECONDS + 1)]
        self.in_flight = 0

    @property
    def uptime(self) -> float:
        """Seconds since start."""
        return self._clock() - self._started

    def began(self) -> None:
        """A request came."""
        self.in_flight += 1

    def ended(self, seconds: float, *, failed: bool) -> None:
        """A request that `began` is over; `failed`: not by its caller's fault."""
        self.in_flight -= 1
        slot = self._slot()
        slot.requests += 1
        slot.errors += failed
        slot.durations[_bucket(seconds)] += 1

    def answered(self, cache: str) -> None:
        """An answer came from, or past, a cache (`gateway.schema.CacheStatus`)."""
        if cache == "bypass":
            return
        slot = self._slot()
        slot.lookups += 1
        slot.hits += cache in ("hit", "shared")

    def last(self, seconds: int) -> Figures:
        """The sums over the last full seconds, or since start where that is less."""
        now = int(self._clock())
        covered = min(float(seconds), max(1.0, self.uptime))
        return self._sum(self._between(now - seconds, now), covered)

    def history(self, step: int) -> list[tuple[float, Figures]]:
        """The kept seconds in steps of `step`, oldest first, each with its age in seconds."""
        now = self._clock()
        end = int(now) // step * step
        begun = max(end - KEPT_SECONDS, math.ceil(self._started))
        points = []
        for first in range(end - KEPT_SECONDS, end, step):
            if first >= begun:
                figures = self._sum(self._between(first, first + step), step)
                points.append((now - (first + step), figures))
        return points

    def _slot(self) -> _Slot:
        second = int(self._clock())
        slot = self._slots[second % len(self._slots)]
        if slot.second != second:
            slot.begin(second)
        return slot

    def _between(self, first: int, end: int) -> list[_Slot]:
        slots = (self._slots[second % len(self._slots)] for second in range(first, end))
        return [
            slot
            for slot, second in zip(slots, range(first, end), strict=True)
            if slot.second == second
        ]

    @staticmethod
    def _sum(slots: Iterable[_Slot], seconds: float) -> Figures:
        counts = [0] * _BUCKETS
        requests = errors = hits = lookups = 0
        for slot in slots:
            requests += slot.requests
            errors += slot.errors
            hits += slot.hits
            lookups += slot.lookups
            counts = [total + more for total, more in zip(counts, slot.durations, strict=True)]
        return Figures(
            seconds=seconds,
            requests=requests,
            errors=errors,
            p50=_percentile(counts, requests, 0.50),
            p99=_percentile(counts, requests, 0.99),
            hit_rate=hits / lookups if lookups else None,
        )


def _percentile(counts: list[int], total: int, share: float) -> float | None:
    """The duration in seconds that this share of all does not exceed."""
    if not total:
        return None
    wanted, seen = math.ceil(total * share), 0
    for bucket, count in enumerate(counts):
        seen += count
        if seen >= wanted:
            return _middle(bucket)
    return _middle(len(counts) - 1)
