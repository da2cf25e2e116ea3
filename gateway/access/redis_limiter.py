"""Limits that hold over several gateways, counted in their Redis.

Redis decides with one script a request, so that two gateways cannot both take the last of
something. While Redis cannot be asked, each gateway goes on by what it last knew: requests
are let in or refused by its own count (a key may then have its limits once at every gateway),
and what was used meanwhile is told to Redis when it is back. Closing the door instead would
turn an outage of the cache into one of the service.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from gateway.access.keys import ApiKey
from gateway.access.limiter import LocalLimiter, too_fast, too_many, used_up
from gateway.calling import Background
from services.cache.redis import PREFIX, RedisBackend

# KEYS: the key's counts; its requests in flight, by when they are given up.
# ARGV: period of one request (µs), bucket (µs), requests a day, tokens a day, at once (0: no
# such limit); 1 to let a request in; 1 if it counts; requests, tokens used but not yet counted;
# the request's ticket; its longest life (µs); a day, its requests and tokens as Redis last told
# them, in case it has forgotten; tickets of requests that have ended.
# Numbers pass as strings: as such, Lua would round those of 16 digits.
_SCRIPT = """
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local day = math.floor(time[1] / 86400)
local a = {}
for i = 1, 9 do a[i] = tonumber(ARGV[i]) end
local interval, bucket, most, most_tokens, at_once = a[1], a[2], a[3], a[4], a[5]
local kept = redis.call('HMGET', KEYS[1], 'full_at', 'day', 'requests', 'tokens')
local full_at, requests, tokens = tonumber(kept[1]) or 0, 0, 0
if tonumber(kept[2]) == day then
  requests, tokens = tonumber(kept[3]) or 0, tonumber(kept[4]) or 0
end
if tonumber(ARGV[12]) == day then
  requests, tokens = math.max(requests, tonumber(ARGV[13])), math.max(tokens, tonumber(ARGV[14]))
end
requests, tokens = requests + a[8], tokens + a[9]
if a[8] > 0 then full_at = math.max(full_at, now) + interval * a[8] end
for i = 15, #ARGV do redis.call('ZREM', KEYS[2], ARGV[i]) end
local refused, wait = 0, 0
if a[6] == 1 then
  if a[7] == 1 and most > 0 and requests >= most then refused = 1
  elseif a[7] == 1 and most_tokens > 0 and tokens >= most_tokens then refused = 2
  elseif interval > 0 and full_at - now > bucket - interval then
    refused, wait = 3, full_at - now - bucket + interval
  elseif at_once > 0 then
    redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', string.format('%.0f', now))
    if redis.call('ZCARD', KEYS[2]) >= at_once then refused = 4 end
  end
  if refused == 0 then
    requests = requests + a[7]
    if interval > 0 then full_at = math.max(full_at, now) + interval end
    if at_once > 0 then
      local life = tonumber(ARGV[11])
      redis.call('ZADD', KEYS[2], string.format('%.0f', now + life), ARGV[10])
      redis.call('PEXPIRE', KEYS[2], string.format('%.0f', life / 1000))
    end
  end
end
redis.call('HSET', KEYS[1], 'full_at', string.format('%.0f', full_at), 'day', day,
  'requests', string.format('%.0f', requests), 'tokens', string.format('%.0f', tokens))
redis.call('EXPIRE', KEYS[1], 172800)
return {refused, math.ceil(wait), day, requests, tokens, math.ceil(math.max(0, full_at - now))}
"""


@dataclass(slots=True)
class _Untold:
    """What Redis does not know yet of a key."""

    requests: int = 0
    tokens: int = 0
    tickets: list[bytes] = field(default_factory=list)

    @property
    def any(self) -> bool:
        return bool(self.requests or self.tokens or self.tickets)

    def add(self, other: _Untold) -> None:
        self.requests += other.requests
        self.tokens += other.tokens
        self.tickets += other.tickets


class RedisLimiter:
    """Counts in Redis, and in this process as well, for when Redis cannot be asked."""

    def __init__(self, redis: RedisBackend, longest_seconds: float) -> None:
        """`longest_seconds`: a request that takes longer counts as gone (its gateway died)."""
        self._redis = redis
        self._script = redis.script(_SCRIPT)
        self._life = int(longest_seconds * 1e6)
        self._local = LocalLimiter()
        self._untold: dict[str, _Untold] = {}
        self._told: dict[str, tuple[int, int, int]] = {}
        self._telling: set[str] = set()
        self._background = Background()

    async def enter(self, key: ApiKey, counted: bool) -> bytes:
        """Lets a request in. Raises `GatewayError` (rate-limited, quota-exceeded)."""
        limits = key.limits
        ticket = b"" if limits.concurrency is None else secrets.token_bytes(8)
        reply = await self._ask(key, ticket, enter=True, counted=counted)
        if reply is None:
            self._local.admit(key, counted)
            # Its place among the requests at once was given away here, and only here.
            self._owed(key).requests += counted
            return b""
        refused, wait = reply[0], reply[1]
        if refused == 1:
            raise used_up(f"ask {limits.requests_per_day} times", time.time())
        if refused == 2:
            raise used_up(f"have {limits.tokens_per_day} tokens written", time.time())
        if refused == 3 and limits.rate is not None:
            raise too_fast(limits.rate, wait / 1e6)
        if refused == 4 and limits.concurrency is not None:
            raise too_many(limits.concurrency)
        self._local.use(key).running += 1
        return ticket

    def leave(self, key: ApiKey, ticket: bytes) -> None:
        """Tells that it has ended."""
        self._local.leave(key, ticket)
        if ticket:
            self._owed(key).tickets.append(ticket)
        self._tell_soon(key)

    def spend(self, key: ApiKey, requests: int) -> None:
        """Counts further requests. Raises `GatewayError` (quota-exceeded)."""
        self._local.spend(key, requests)
        self._owed(key).requests += requests

    def tokens(self, key: ApiKey, count: int) -> None:
        """Counts tokens written."""
        self._local.tokens(key, count)
        self._owed(key).tokens += count
        self._tell_soon(key)

    async def close(self) -> None:
        """Tells Redis what it does not know yet, if it listens."""
        await self._background.finish()

    def _owed(self, key: ApiKey) -> _Untold:
        untold = self._untold.get(key.id)
        if untold is None:
            untold = self._untold[key.id] = _Untold()
        return untold

    def _tell_soon(self, key: ApiKey) -> None:
        if key.id not in self._telling and self._owed(key).any:
            self._telling.add(key.id)
            self._background.start(self._tell(key))

    async def _tell(self, key: ApiKey) -> None:
        try:
            while self._owed(key).any:
                if await self._ask(key, b"", enter=False, counted=False) is None:
                    return  # the key's next request tells it
        finally:
            self._telling.discard(key.id)

    async def _ask(
        self, key: ApiKey, ticket: bytes, *, enter: bool, counted: bool
    ) -> Sequence[int] | None:
        """The script's reply; `None` where Redis gave none, and all is owed as before."""
        limits, rate = key.limits, key.limits.rate
        telling = self._untold.pop(key.id, None) or _Untold()
        arguments: list[bytes | int] = [
            0 if rate is None else max(1, round(rate.seconds * 1e6 / rate.count)),
            0 if rate is None else round(rate.seconds * 1e6),
            limits.requests_per_day or 0,
            limits.tokens_per_day or 0,
            limits.concurrency or 0,
            int(enter),
            int(counted),
            telling.requests,
            telling.tokens,
            ticket,
            self._life,
            *self._told.get(key.id, (0, 0, 0)),
            *telling.tickets,
        ]
        # Braces: a Redis cluster keeps what is of one key on one node.
        name = PREFIX + b"key:{" + key.id.encode() + b"}"
        reply = None
        try:
            reply = await self._redis.guarded(
                lambda: self._script(keys=[name, name + b":running"], args=arguments)
            )
        finally:
            if not isinstance(reply, list) or len(reply) != 6:
                # Refused, late, or its caller gone. It may have been counted nevertheless:
                # then it is counted twice, and its ticket must not stay.
                reply = None
                self._owed(key).add(telling)
                if ticket:
                    self._owed(key).tickets.append(ticket)
        if reply is None:
            return None
        use = self._local.use(key)
        # What came up while Redis was being asked is on top of what it said.
        owed = self._owed(key)
        _, _, day, requests, tokens, full_in = reply
        use.requests, use.tokens = requests + owed.requests, tokens + owed.tokens
        use.full_at = time.time() + full_in / 1e6
        self._told[key.id] = max(self._told.get(key.id, (0, 0, 0)), (day, requests, tokens))
        return reply
