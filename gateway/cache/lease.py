"""Equal requests at several gateways cost one computation, by leases in their Redis."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from gateway.cache.backend import CacheBackend

T = TypeVar("T")

# A gateway that died holds up others for this long at most. Work that takes longer is
# done twice, which is no harm.
LEASE_SECONDS = 3.0
_FIRST_PAUSE_SECONDS = 0.004
_LONGEST_PAUSE_SECONDS = 0.05


class Lease:
    """The right to compute what stands under a key, or the wait for whoever has it."""

    def __init__(self, backend: CacheBackend, key: bytes) -> None:
        self._backend = backend
        self._key = key
        self._token = secrets.token_bytes(16)
        self._held = False

    async def take_or_wait(self, look: Callable[[], Awaitable[T | None]]) -> T | None:
        """`None`: compute it yourself. Otherwise what `look` found, computed by another.

        Takes at most `LEASE_SECONDS`.
        """
        end = time.monotonic() + LEASE_SECONDS
        pause = _FIRST_PAUSE_SECONDS
        while time.monotonic() < end:
            milliseconds = int(LEASE_SECONDS * 1000)
            # Where this is cut short, or Redis does not say, it may be ours nevertheless.
            self._held = True
            taken = await self._backend.acquire(self._key, self._token, milliseconds)
            if taken is not False:
                return None
            self._held = False
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
            found = await look()
            if found is not None:
                return found
        return None

    async def give_back(self) -> None:
        """Lets others go on, where the lease was taken."""
        if self._held:
            self._held = False
            await self._backend.release(self._key, self._token)
