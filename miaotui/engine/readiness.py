"""Whether a pipeline is complete, and for how long its requests wait for it to be."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable


class PipelineUnavailableError(Exception):
    """The pipeline is not complete, so nothing can be computed now."""


class Readiness:
    """Not ready at first. The event loop owns it."""

    def __init__(self, grace: float, give_up: Callable[[], None]) -> None:
        """`give_up` is called where the pipeline has been down for `grace` seconds."""
        self.ready = False
        self.reason = "the pipeline has not been verified yet"
        """Why it is not, or the last time was not, ready."""
        self._grace = grace
        self._give_up = give_up
        self._down_since = -math.inf
        self._timer: asyncio.TimerHandle | None = None

    def check(self) -> None:
        """Raises `PipelineUnavailableError` where there is nothing to wait for."""
        if not self.patient:
            raise PipelineUnavailableError(self.reason)

    @property
    def patient(self) -> bool:
        """Whether it is ready, or has not been down for long."""
        return self.ready or time.monotonic() - self._down_since <= self._grace

    def up(self) -> None:
        """The pipeline is complete."""
        self.ready = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def down(self, reason: str) -> bool:
        """The pipeline is not complete; whether it was until now."""
        self.reason = reason
        if not self.ready:
            return False
        self.ready = False
        self._down_since = time.monotonic()
        self._timer = asyncio.get_running_loop().call_later(self._grace, self._late)
        return True

    def _late(self) -> None:
        self._timer = None
        self._give_up()
