"""A circuit breaker for one replica, and a budget for what is tried again."""

from __future__ import annotations

import time
from typing import Literal, TypeAlias

State: TypeAlias = Literal["closed", "open", "half-open"]

_PAUSES_SECONDS = (0.05, 0.1, 0.2, 0.5, 1.0)


class CircuitBreaker:
    """Closed: calls go through. Open: none does, for a pause that grows with every failure.

    Half-open, once the pause is over: one call goes through, and its outcome decides
    (M. Nygard, Release It!, 2007).
    """

    def __init__(self, *, tolerated: int = 0) -> None:
        """`tolerated`: so many failures in a row do not open it yet."""
        self._tolerated = tolerated
        self.failures = 0
        """In a row."""
        self._until = 0.0
        self._trying = False

    @property
    def state(self) -> State:
        """As it is now."""
        if self.failures <= self._tolerated:
            return "closed"
        return "open" if self._trying or time.monotonic() < self._until else "half-open"

    @property
    def opens_in(self) -> float:
        """Seconds until it is half-open; 0 where it is, or is closed."""
        if self.failures <= self._tolerated:
            return 0.0
        return max(0.0, self._until - time.monotonic())

    def begin(self) -> None:
        """A call sets out; of a half-open circuit, the one that decides."""
        if self.failures > self._tolerated:
            self._trying = True

    def succeeded(self) -> None:
        """A call worked."""
        self.failures = 0
        self._trying = False

    def failed(self, pause: float | None = None) -> None:
        """A call failed, and another need not be tried for `pause` seconds (None: it depends)."""
        self._trying = False
        index = min(max(self.failures - self._tolerated, 0), len(_PAUSES_SECONDS) - 1)
        self.failures += 1
        self._until = time.monotonic() + (_PAUSES_SECONDS[index] if pause is None else pause)

    def gave_up(self) -> None:
        """A call ended without saying anything about the replica."""
        self._trying = False


class RetryBudget:
    """Bounds how much load second tries add, so that they do not make an outage worse.

    Each first try earns a share of a second one; a reserve serves those that fail together
    when a replica dies (as in Finagle's RetryBudget).
    """

    def __init__(self, *, share: float = 0.2, reserve: float = 256.0) -> None:
        """`share`: of first tries; `reserve`: tries that may be saved up, and are at first."""
        self._share = share
        self._reserve = reserve
        self._left = reserve
        self.refused = 0
        """Second tries that there was no budget for."""

    @property
    def left(self) -> float:
        """Second tries that may follow now."""
        return self._left

    def first(self) -> None:
        """A call is tried for the first time."""
        self._left = min(self._reserve, self._left + self._share)

    def spend(self) -> bool:
        """Whether a call may be tried again; takes it from the budget."""
        if self._left < 1.0:
            self.refused += 1
            return False
        self._left -= 1.0
        return True
