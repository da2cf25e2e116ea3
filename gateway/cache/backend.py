"""Where cached bytes lie: a protocol, and the backend inside of this process."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from cachetools import TTLCache

# What an entry costs beside its value: key, bytes objects, links of the cache.
ENTRY_OVERHEAD_BYTES = 256


class CacheBackend(Protocol):
    """Keeps bytes under a key for a while. Never raises: a sick cache is a miss."""

    @property
    def system(self) -> str:
        """The OpenTelemetry `db.system.name`."""

    async def get(self, key: bytes) -> bytes | None:
        """The value, or `None` where there is none or it cannot be had in time."""

    async def put(self, key: bytes, value: bytes) -> None:
        """Keeps `value`; where that fails, it is as if it had expired at once."""

    async def acquire(self, key: bytes, token: bytes, milliseconds: int) -> bool | None:
        """Takes a lease on `key` if no other gateway holds one; `None`: there is no telling."""

    async def release(self, key: bytes, token: bytes) -> None:
        """Gives back the lease that was taken with `token`."""

    async def close(self) -> None:
        """Frees what the backend holds."""


class EmbeddedBackend:
    """A cache in this process's memory, bounded in bytes; the least recent goes first."""

    system = "embedded"

    def __init__(
        self, max_bytes: int, ttl_seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`max_bytes` counts values and about what it costs to keep them."""
        self._entries: TTLCache[bytes, bytes] = TTLCache(
            max_bytes, ttl_seconds, clock, lambda value: len(value) + ENTRY_OVERHEAD_BYTES
        )

    @property
    def bytes_held(self) -> float:
        """Bytes in use."""
        return self._entries.currsize

    async def get(self, key: bytes) -> bytes | None:
        """The value, or `None`."""
        return self._entries.get(key)

    async def put(self, key: bytes, value: bytes) -> None:
        """Keeps `value` unless it alone is larger than the whole cache."""
        if len(value) + ENTRY_OVERHEAD_BYTES <= self._entries.maxsize:
            self._entries[key] = value

    async def acquire(self, key: bytes, token: bytes, milliseconds: int) -> bool | None:
        """No other gateway sees this cache."""
        return None

    async def release(self, key: bytes, token: bytes) -> None:
        """There are no leases."""

    async def close(self) -> None:
        """Forgets everything."""
        self._entries.clear()
