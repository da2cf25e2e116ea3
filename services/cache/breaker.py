"""A circuit breaker that heals by its own probes, so that no request pays for them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

log = logging.getLogger(__name__)

FAILURES_TO_OPEN = 3
# A busy event loop lets whole handfuls of calls run out of time at one moment; only
# failures that go on for this long mean that the other side is at fault.
FAILING_SECONDS = 0.25
FIRST_PAUSE_SECONDS = 0.25
LONGEST_PAUSE_SECONDS = 5.0


class Breaker:
    """Closed: calls go through. Open: they do not, and a probe asks again and again.

    The first failure already starts a probe. The breaker opens where a probe fails, or
    where calls fail without a success between them for `FAILING_SECONDS`; it closes when a
    probe succeeds. An outage is logged once, and its end once, when a call succeeds.
    """

    def __init__(
        self, name: str, probe: Callable[[], Awaitable[bool]], *, pause: float = FIRST_PAUSE_SECONDS
    ) -> None:
        """`name` is for the log; `probe` tells whether the thing works and never raises."""
        self._name = name
        self._probe = probe
        self._first_pause = self._pause = pause
        self._failures = 0
        self._failing_since = 0.0
        self._open = False
        self._outage = False
        self._task: asyncio.Task[None] | None = None

    @property
    def is_open(self) -> bool:
        """Whether calls must not go through now."""
        return self._open

    def succeeded(self) -> None:
        """Tells that a call worked."""
        self._failures = 0
        if self._outage and not self._open:
            self._outage = False
            self._pause = self._first_pause
            log.warning("%s works again", self._name)

    def failed(self, reason: str) -> None:
        """Tells that a call failed; `reason` is for the log (a class name, no content)."""
        now = time.monotonic()
        if self._failures == 0:
            self._failing_since = now
        self._failures += 1
        if self._failures >= FAILURES_TO_OPEN and now - self._failing_since >= FAILING_SECONDS:
            self._trip(reason)
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._heal(reason))

    def _trip(self, reason: str) -> None:
        self._open = True
        if not self._outage:
            self._outage = True
            log.warning("%s does not work (%s); going on without it", self._name, reason)

    async def _heal(self, reason: str) -> None:
        try:
            while True:
                if self._open:
                    await asyncio.sleep(self._pause)
                    # Back to the start only when a call succeeds: where probes do and calls
                    # do not, this is what keeps calls from being tried all the time.
                    self._pause = min(2 * self._pause, LONGEST_PAUSE_SECONDS)
                if await self._probe():
                    break
                self._trip(reason)
            if self._open:
                self._failures = 0
                self._open = False
        finally:
            self._task = None

    async def close(self) -> None:
        """Ends the probing."""
        if (task := self._task) is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
