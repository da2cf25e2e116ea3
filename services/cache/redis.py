"""The cache in Redis. A slow, dead or babbling Redis is a miss and nothing worse.

Redis should run with `maxmemory` and `maxmemory-policy allkeys-lru` (or another that
evicts): its users bound the size of a value and its lifetime, not their number.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.commands.core import AsyncScript
from redis.maint_notifications import MaintNotificationsConfig

from services.cache.breaker import Breaker

T = TypeVar("T")
CONNECTIONS = 32
PREFIX = b"miaotui:1:"
# Wide enough for a connection to be built, which one operation's deadline need not be.
PROBE_SECONDS = 0.5

_RELEASE = """
if redis.call('get', KEYS[1]) == ARGV[1] then return redis.call('del', KEYS[1]) end
return 0
"""


async def _cancellable(operation: Awaitable[T]) -> T:
    """Awaits an operation, and passes on the cancellation that it may swallow.

    redis-py writes by `asyncio.wait_for`, which before Python 3.12 goes on as if nothing were where
    it is cancelled just as its work is done.
    """
    task = asyncio.current_task()
    assert task is not None, "a coroutine runs in a task"
    before = task.cancelling()
    try:
        return await operation
    finally:
        if task.cancelling() > before:
            raise asyncio.CancelledError


class RedisBackend:
    """Bytes in Redis with a TTL, each operation within `timeout` seconds."""

    system = "redis"

    def __init__(
        self,
        url: str,
        ttl_seconds: int,
        timeout: float,
        on_failure: Callable[[str], None],
    ) -> None:
        """`on_failure` counts failures; it gets "timeout" or "error".

        Raises `ValueError` where `url` is no Redis URL.
        """
        # The pool's own timeouts stay above ours: an operation that ours ends has its
        # connection closed by redis-py, so a late reply cannot answer the next question.
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=CONNECTIONS,
            timeout=timeout,
            socket_timeout=max(PROBE_SECONDS, timeout),
            socket_connect_timeout=max(PROBE_SECONDS, timeout),
            # Once more on a new connection, where Redis closed one that lay idle.
            retry=Retry(NoBackoff(), 1),
            # With these on, the pool hands out connections that Redis has closed.
            maint_notifications_config=MaintNotificationsConfig(enabled=False),
        )
        self._redis = Redis(connection_pool=pool)
        self._release = self._redis.register_script(_RELEASE)
        self._ttl = ttl_seconds
        self._timeout = timeout
        self._on_failure = on_failure
        self._breaker = Breaker("Redis", self._works)

    @property
    def healthy(self) -> bool:
        """Whether Redis is being used now.

        Failures are not enough to watch: while Redis is avoided, nothing fails.
        """
        return not self._breaker.is_open

    async def _works(self) -> bool:
        # Writes as well, because a full Redis still answers PING.
        key = PREFIX + b"probe"
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                await _cancellable(self._redis.set(key, b"1", ex=5))
                return bool(await _cancellable(self._redis.get(key)) == b"1")
        except Exception:  # noqa: BLE001 - replies that are no Redis protocol raise anything
            return False

    def script(self, text: str) -> AsyncScript:
        """A Lua script, to be called within `guarded`."""
        return self._redis.register_script(text)

    async def guarded(self, operation: Callable[[], Awaitable[T]]) -> T | None:
        """What an operation on Redis gives; `None` where Redis does not say in time."""
        if self._breaker.is_open:
            return None
        try:
            async with asyncio.timeout(self._timeout):
                result = await _cancellable(operation())
        except TimeoutError:
            self._failed("timeout", "no reply in time")
            return None
        except Exception as error:  # noqa: BLE001 - as above
            self._failed("error", type(error).__name__)
            return None
        self._breaker.succeeded()
        return result

    def _failed(self, kind: str, reason: str) -> None:
        self._on_failure(kind)
        self._breaker.failed(reason)

    async def get(self, key: bytes) -> bytes | None:
        """The value, or `None` where there is none or Redis does not say in time."""
        value = await self.guarded(lambda: self._redis.get(PREFIX + key))
        return value if isinstance(value, bytes) else None

    async def put(self, key: bytes, value: bytes) -> None:
        """Keeps `value` for the TTL, if Redis takes it."""
        await self.guarded(lambda: self._redis.set(PREFIX + key, value, ex=self._ttl))

    async def acquire(self, key: bytes, token: bytes, milliseconds: int) -> bool | None:
        """Takes a lease on `key` if nobody holds one; `None` where Redis does not say."""

        async def take() -> bool:
            taken = await self._redis.set(PREFIX + b"l:" + key, token, nx=True, px=milliseconds)
            return bool(taken)

        return await self.guarded(take)

    async def release(self, key: bytes, token: bytes) -> None:
        """Gives the lease back, unless it ran out and is another's by now."""

        async def give() -> object:
            return await self._release(keys=[PREFIX + b"l:" + key], args=[token])

        await self.guarded(give)

    async def close(self) -> None:
        """Closes the connections."""
        await self._breaker.close()
        await self._redis.aclose()
