"""What a key may do in a time, counted here and in a Redis that gateways share."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.access.keys import ApiKey, Limits, make_key
from gateway.access.limiter import LocalLimiter
from gateway.access.redis_limiter import RedisLimiter
from gateway.errors import GatewayError
from services.cache.redis import RedisBackend
from tests.gateway.conftest import until
from tests.processes import RedisServer

DAY = 86_400.0


def limited(**limits: object) -> ApiKey:
    return make_key("k", limits=Limits.model_validate(limits))[0]


class Clock:
    """A time that a test sets, from a day's noon."""

    def __init__(self) -> None:
        self.now = 20_000.5 * DAY

    def __call__(self) -> float:
        return self.now


def refusals(limiter: LocalLimiter, key: ApiKey, times: int) -> int:
    refused = 0
    for _ in range(times):
        try:
            limiter.admit(key, True)
        except GatewayError:
            refused += 1
        else:
            limiter.leave(key, b"")
    return refused


def test_a_rate_lets_a_burst_in_and_then_so_many_a_second() -> None:
    clock = Clock()
    limiter, key = LocalLimiter(clock), limited(rate={"count": 10, "seconds": 1})
    assert refusals(limiter, key, 25) == 15
    with pytest.raises(GatewayError) as refused:
        limiter.admit(key, True)
    assert (refused.value.kind.slug, refused.value.retry_after) == ("rate-limited", 1)
    clock.now += 0.1
    assert refusals(limiter, key, 3) == 2
    clock.now += 100
    assert refusals(limiter, key, 25) == 15
    # A batch may begin with one place, and what it takes beyond is waited for.
    clock.now += 0.1
    limiter.admit(key, True)
    limiter.spend(key, 30)
    clock.now += 2.9
    assert refusals(limiter, key, 1) == 1
    clock.now += 0.2
    assert refusals(limiter, key, 2) == 1


@given(
    st.integers(1, 50),
    st.sampled_from([1.0, 60.0, 3600.0]),
    st.lists(st.floats(0, 0.2), min_size=1, max_size=60),
)
def test_no_window_of_any_length_lets_more_in(
    count: int, seconds: float, gaps: list[float]
) -> None:
    clock = Clock()
    limiter, key = LocalLimiter(clock), limited(rate={"count": count, "seconds": seconds})
    admitted = []
    for gap in gaps:
        clock.now += gap * seconds
        if not refusals(limiter, key, 1):
            admitted.append(clock.now)
    for first in range(len(admitted)):
        for last in range(first, len(admitted)):
            span = admitted[last] - admitted[first]
            assert last - first + 1 <= count + span * count / seconds + 1e-3


def test_quotas_end_with_the_day() -> None:
    clock = Clock()
    limiter, key = LocalLimiter(clock), limited(requests_per_day=3, tokens_per_day=100)
    assert refusals(limiter, key, 5) == 2
    with pytest.raises(GatewayError) as refused:
        limiter.admit(key, True)
    assert (refused.value.kind.slug, refused.value.retry_after) == ("quota-exceeded", DAY / 2)
    limiter.admit(key, False)  # what only looks is not counted
    clock.now += DAY / 2
    limiter.admit(key, True)
    limiter.tokens(key, 99)
    limiter.admit(key, True)
    limiter.tokens(key, 50)
    with pytest.raises(GatewayError, match="100 tokens"):
        limiter.admit(key, True)
    clock.now += DAY
    with pytest.raises(GatewayError, match="3 times"):
        limiter.spend(key, 4)
    limiter.spend(key, 3)
    assert refusals(limiter, key, 1) == 1


def test_only_so_many_at_once() -> None:
    limiter, key = LocalLimiter(), limited(concurrency=2)
    limiter.admit(key, True)
    limiter.admit(key, True)
    with pytest.raises(GatewayError, match="2 requests at once"):
        limiter.admit(key, True)
    limiter.leave(key, b"")
    limiter.admit(key, True)


async def admitted(limiter: RedisLimiter, key: ApiKey, times: int) -> list[bytes]:
    tickets = []
    for _ in range(times):
        try:
            tickets.append(await limiter.enter(key, True))
        except GatewayError:
            continue
    return tickets


def used_again(backend: RedisBackend) -> bool:
    """Whether Redis is used, and no look at it is under way that may say otherwise."""
    return backend.healthy and backend._breaker._task is None


async def told(limiter: RedisLimiter, key: ApiKey) -> None:
    """Waits until Redis knows all; it may be avoided for a while after it is back."""
    for _ in range(600):
        limiter.tokens(key, 0)
        await limiter.close()
        if not limiter._owed(key).any:
            return
        await asyncio.sleep(0.05)
    raise AssertionError("Redis was not told")


async def test_gateways_share_one_count_and_survive_their_redis(redis_server: RedisServer) -> None:
    backends = [RedisBackend(redis_server.url, 60, 1.0, lambda _: None) for _ in range(2)]
    one, two = (RedisLimiter(backend, 60.0) for backend in backends)
    rated = limited(rate={"count": 10, "seconds": 3600})
    counts = await asyncio.gather(*(admitted(one, rated, 8), admitted(two, rated, 8)))
    assert sum(map(len, counts)) == 10
    with pytest.raises(GatewayError) as refused:
        await one.enter(rated, True)
    assert 350 <= (refused.value.retry_after or 0) <= 361

    few = limited(concurrency=3)
    tickets = await admitted(one, few, 2) + await admitted(two, few, 2)
    assert len(tickets) == 3
    one.leave(few, tickets[0])
    await one.close()
    assert len(await admitted(two, few, 2)) == 1

    daily = limited(requests_per_day=6, tokens_per_day=100)
    one.tokens(daily, 60)
    await one.close()
    assert len(await admitted(two, daily, 2)) == 2
    two.spend(daily, 1)
    with pytest.raises(GatewayError, match="6 times"):
        two.spend(daily, 4)

    # Redis dies: each gateway goes on from what it last knew, and tells what it used later.
    redis_server.kill()
    assert len(await admitted(two, daily, 8)) == 3
    two.tokens(daily, 30)
    assert len(await admitted(two, rated, 3)) == 0
    assert len(await admitted(one, rated, 3)) == 0
    redis_server.start()
    await until(lambda: all(map(used_again, backends)))
    # It has forgotten everything, and is told of the day what the gateways know.
    with pytest.raises(GatewayError, match="6 times"):
        await two.enter(daily, True)
    two.tokens(daily, 10)
    await told(two, daily)
    by_tokens = daily.model_copy(update={"limits": Limits(tokens_per_day=100)})
    with pytest.raises(GatewayError, match="100 tokens"):
        await one.enter(by_tokens, True)
    for backend in backends:
        await backend.close()


async def test_what_redis_cannot_be_told_is_told_later(redis_server: RedisServer) -> None:
    backend = RedisBackend(redis_server.url, 60, 1.0, lambda _: None)
    limiter, key = RedisLimiter(backend, 60.0), limited(tokens_per_day=100, concurrency=1)
    ticket = await limiter.enter(key, True)
    redis_server.kill()
    limiter.tokens(key, 90)
    limiter.leave(key, ticket)
    await limiter.close()
    redis_server.start()
    await until(lambda: used_again(backend))
    other = RedisLimiter(backend, 60.0)
    limiter.tokens(key, 10)
    await told(limiter, key)
    with pytest.raises(GatewayError, match="100 tokens"):
        await other.enter(key, True)
    await backend.close()


async def test_a_caller_that_goes_while_redis_is_asked_leaves_nothing_behind(
    redis_server: RedisServer,
) -> None:
    backend = RedisBackend(redis_server.url, 60, 1.0, lambda _: None)
    limiter, key = RedisLimiter(backend, 60.0), limited(concurrency=1)
    for _ in range(20):
        entering = asyncio.create_task(limiter.enter(key, True))
        await asyncio.sleep(0)
        entering.cancel()
        await asyncio.gather(entering, return_exceptions=True)
    assert await limiter.enter(key, True)
    await backend.close()
