"""A circuit breaker that heals by its own probes, so that no request pays for them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

log = logging.getLogger(__name__)

FAILURES_TO_OPEN = 3
FIRST_PAUSE_SECONDS = 0.25
LONGEST_PAUSE_SECONDS = 5.0


class Breaker:
    """Closed: calls go through. Open: they do not, and a probe asks again and again.

    The first failure already starts a probe; where the probe fails too, or several
    calls fail in a row, the breaker opens. It closes when a probe succeeds. One outage
    is logged once, and its end once.
    """

    def __init__(
        self, name: str, probe: Callable[[], Awaitable[bool]], *, pause: float = FIRST_PAUSE_SECONDS
    ) -> None:
        """`name` is for the log; `probe` tells whether the thing works and never raises."""
        self._name = name
        self._probe = probe
        self._pause = pause
        self._failures = 0
        self._open = False
        self._task: asyncio.Task[None] | None = None

    @property
    def is_open(self) -> bool:
        """Whether calls must not go through now."""
        return self._open

    def succeeded(self) -> None:
        """Tells that a call worked."""
        self._failures = 0

    def failed(self, reason: str) -> None:
        """Tells that a call failed; `reason` is for the log (a class name, no content)."""
        self._failures += 1
        if self._failures >= FAILURES_TO_OPEN:
            self._trip(reason)
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._heal(reason))

    def _trip(self, reason: str) -> None:
        if not self._open:
            self._open = True
            log.warning("%s does not work (%s); going on without it", self._name, reason)

    async def _heal(self, reason: str) -> None:
        pause = self._pause
        try:
            while not await self._probe():
                self._trip(reason)
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
            self._failures = 0
            if self._open:
                self._open = False
                log.warning("%s works again", self._name)
        finally:
            self._task = None

    async def close(self) -> None:
        """Ends the probing."""
        if (task := self._task) is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
