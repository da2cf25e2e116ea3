"""How much a key may do: a rate, quotas a day, and requests at once.

The rate is a token bucket that holds one period's requests, kept as the generic cell rate
algorithm does (ITU-T I.371, GCRA): one number a key, the time at which its bucket would be
full again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from gateway.access.keys import ApiKey, Limits, Rate
from gateway.errors import GatewayError

DAY_SECONDS = 86_400


class Limiter(Protocol):
    """Lets requests in, or does not, and counts what they use."""

    async def enter(self, key: ApiKey, counted: bool) -> bytes:
        """Lets a request in; returns what `leave` needs. `counted`: towards the day's quota.

        Raises `GatewayError` (rate-limited, quota-exceeded).
        """

    def leave(self, key: ApiKey, ticket: bytes) -> None:
        """Tells that a request that was let in has ended."""

    def spend(self, key: ApiKey, requests: int) -> None:
        """Counts further requests of one that was let in, which the next ones wait for.

        Raises `GatewayError` (quota-exceeded) where the day's quota does not hold them.
        """

    def tokens(self, key: ApiKey, count: int) -> None:
        """Counts tokens written; what goes over the quota bars the next requests."""

    async def close(self) -> None:
        """Writes down what is not yet."""


@dataclass(slots=True)
class Use:
    """What a key has used."""

    full_at: float = 0.0
    """When its bucket is full again, in seconds since the epoch."""
    day: int = 0
    requests: int = 0
    tokens: int = 0
    running: int = 0

    def begin_day(self, now: float) -> None:
        """Forgets another day's counts."""
        day = int(now // DAY_SECONDS)
        if day != self.day:
            self.day = day
            self.requests = self.tokens = 0

    def take(self, rate: Rate | None, requests: int, now: float) -> None:
        """Takes so many out of the bucket, and even more than it holds."""
        if rate is not None:
            self.full_at = max(self.full_at, now) + requests * rate.seconds / rate.count


class LocalLimiter:
    """Counts in this process only: for one gateway, or while Redis cannot be asked."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        """`clock`: seconds since the epoch."""
        self._clock = clock
        self._uses: dict[str, Use] = {}

    def use(self, key: ApiKey) -> Use:
        """What the key has used today, for looking at and for correcting."""
        use = self._uses.get(key.id)
        if use is None:
            use = self._uses[key.id] = Use()
        use.begin_day(self._clock())
        return use

    def admit(self, key: ApiKey, counted: bool) -> None:
        """As `enter`, at once."""
        use, limits, now = self.use(key), key.limits, self._clock()
        if counted:
            _check_day(limits, use.requests, use.tokens, now)
        rate = limits.rate
        if rate is not None:
            wait = use.full_at - now - rate.seconds + rate.seconds / rate.count
            # What a float may be off must not cost a whole second.
            if wait > 1e-6:
                raise too_fast(rate, wait)
        if limits.concurrency is not None and use.running >= limits.concurrency:
            raise too_many(limits.concurrency)
        use.take(rate, 1, now)
        use.requests += counted
        use.running += 1

    async def enter(self, key: ApiKey, counted: bool) -> bytes:
        """Lets a request in; the ticket is empty. Raises `GatewayError`."""
        self.admit(key, counted)
        return b""

    def leave(self, key: ApiKey, ticket: bytes) -> None:
        """Tells that it has ended."""
        use = self.use(key)
        use.running = max(0, use.running - 1)

    def spend(self, key: ApiKey, requests: int) -> None:
        """Counts further requests. Raises `GatewayError` (quota-exceeded)."""
        use, now, most = self.use(key), self._clock(), key.limits.requests_per_day
        if most is not None and use.requests + requests > most:
            raise used_up(f"ask {most} times", now)
        use.take(key.limits.rate, requests, now)
        use.requests += requests

    def tokens(self, key: ApiKey, count: int) -> None:
        """Counts tokens written."""
        self.use(key).tokens += count

    async def close(self) -> None:
        """Nothing is kept."""


def _check_day(limits: Limits, requests: int, tokens: int, now: float) -> None:
    if limits.requests_per_day is not None and requests >= limits.requests_per_day:
        raise used_up(f"ask {limits.requests_per_day} times", now)
    if limits.tokens_per_day is not None and tokens >= limits.tokens_per_day:
        raise used_up(f"have {limits.tokens_per_day} tokens written", now)


def used_up(what: str, now: float) -> GatewayError:
    """The error for a day's quota; `now` in seconds since the epoch."""
    wait = DAY_SECONDS - now % DAY_SECONDS
    return GatewayError("quota-exceeded", f"The API key may {what} a day (UTC).", wait_seconds=wait)


def too_fast(rate: Rate, wait: float) -> GatewayError:
    """The error for a rate; `wait` in seconds."""
    detail = f"The API key may ask {rate.count} times in {rate.seconds:g} s."
    return GatewayError("rate-limited", detail, wait_seconds=wait)


def too_many(concurrency: int) -> GatewayError:
    """The error for requests at once."""
    return GatewayError("rate-limited", f"The API key may have {concurrency} requests at once.")
