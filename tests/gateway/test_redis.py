"""The caches in a real Redis: shared, healed, and never in an answer's way."""

from __future__ import annotations

import asyncio
import signal
import time
from pathlib import Path

import grpc
import pytest
from redis.asyncio import Redis

from services.cache.redis import PREFIX, RedisBackend
from tests.gateway.conftest import Gateway, run_gateway, until
from tests.gateway.fakes import Fakes
from tests.processes import RedisServer

FAILURES = "miaotui_gateway_cache_failures_total"
LOOKUPS = "miaotui_gateway_cache_lookups_total"


async def until_hit(gateway: Gateway, question: str, seconds: float = 60.0) -> None:
    """Asks until the answer comes from the cache again."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        response = await gateway.ask(question, "In 1930.")
        assert response.status_code == 200
        if response.json()["cache"] == "hit":
            return
        await asyncio.sleep(0.1)
    raise AssertionError(f"the cache did not come back\n{gateway.process.tail()}")


def outages(gateway: Gateway) -> tuple[int, int]:
    """How often an outage and its end were logged."""
    log = gateway.process.log
    return log.count("Redis does not work"), log.count("Redis works again")


async def test_answers_outlive_the_gateway_and_hold_no_text(
    all_fakes: Fakes, redis_server: RedisServer, tmp_path: Path
) -> None:
    all_fakes.reset()
    settings = {"REDIS_URL": redis_server.url, "CACHE_SECRET": "shared", "CACHE_TIMEOUT": "1"}
    context = "It was in 1931, for sure."
    async with run_gateway(all_fakes, tmp_path, **settings) as gateway:
        first = await gateway.ask("When?", context)
    assert all_fakes.shard.faults.calls == 1
    async with run_gateway(all_fakes, tmp_path, **settings) as gateway:
        second = await gateway.ask("When?", context)
        assert second.json()["cache"] == "hit"
        assert second.json()["answers"] == first.json()["answers"]
    assert all_fakes.shard.faults.calls == 1
    async with Redis.from_url(redis_server.url) as redis:
        keys = [key async for key in redis.scan_iter(PREFIX + b"*")]
        kinds = {key.split(b":")[2] for key in keys}
        assert kinds >= {b"answer", b"prompt"}
        for key in keys:
            assert 0 < await redis.ttl(key) <= 3600
            value = await redis.get(key)
            assert b"When" not in key + value
            assert b"for sure" not in key + value


async def test_redis_killed_stopped_babbling_and_back_in_mid_load(
    all_fakes: Fakes, redis_server: RedisServer, tmp_path: Path
) -> None:
    all_fakes.reset()
    # Patient: what is slow for a moment, on a busy machine, is no outage.
    settings = {"REDIS_URL": redis_server.url, "CACHE_TIMEOUT": "1"}
    async with run_gateway(all_fakes, tmp_path, **settings) as gateway:
        await until_hit(gateway, "r")
        statuses: list[int] = []
        stop = asyncio.Event()

        async def load(worker: int) -> None:
            number = 0
            while not stop.is_set():
                number += 1
                response = await gateway.ask(f"load {worker} {number % 7}", "In 1930.")
                statuses.append(response.status_code)
                await asyncio.sleep(0.01)

        workers = [asyncio.create_task(load(worker)) for worker in range(4)]
        await until(lambda: len(statuses) > 20)
        redis_server.kill()
        await until(lambda: outages(gateway)[0] > 0)
        await asyncio.sleep(0.5)
        assert outages(gateway) == (1, 0)
        failed = await gateway.metric(FAILURES)
        assert failed >= 1
        redis_server.start()
        await until_hit(gateway, "r")
        assert outages(gateway) == (1, 1), gateway.process.tail()

        # Stopped: connections stay open and nothing is ever answered.
        redis_server.signal(signal.SIGSTOP)
        await until(lambda: outages(gateway) == (2, 1))
        assert await gateway.metric(FAILURES) > failed
        # Once those that had asked it have given it up, nobody waits for it any more.
        deadline = time.monotonic() + 30
        before = -1.0
        while (now := await gateway.metric(FAILURES)) != before:
            assert time.monotonic() < deadline, f"{now} operations have failed"
            before = now
            response = await gateway.ask(f"while stopped {now}", "In 1930.")
            assert response.status_code == 200
        redis_server.signal(signal.SIGCONT)
        await until_hit(gateway, "r")

        stop.set()
        await asyncio.gather(*workers)
        assert set(statuses) == {200}

        # Values that are not ours.
        async with Redis.from_url(redis_server.url) as redis:
            async for key in redis.scan_iter(PREFIX + b"answer:*"):
                await redis.set(key, b"\x01garbage, and more of it than an envelope is long")
        response = await gateway.ask("r", "In 1930.")
        assert response.json()["cache"] == "miss"
        garbage = await gateway.metric("miaotui_gateway_cache_lookups_total", result="garbage")
        assert garbage == 1
        await until_hit(gateway, "r")


async def test_a_key_of_another_type_is_a_miss(
    all_fakes: Fakes, redis_server: RedisServer, tmp_path: Path
) -> None:
    reasons: list[str] = []
    backend = RedisBackend(redis_server.url, 60, 1.0, reasons.append)
    async with Redis.from_url(redis_server.url) as redis:
        await redis.lpush(PREFIX + b"k", b"x")
    assert await backend.get(b"k") is None
    assert reasons == ["error"]
    await backend.put(b"other", b"1")
    assert await backend.get(b"other") == b"1"
    await backend.close()


async def test_a_full_redis_costs_nothing_but_the_cache(
    redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    reasons: list[str] = []
    backend = RedisBackend(redis_server.url, 60, 1.0, reasons.append)
    async with Redis.from_url(redis_server.url) as redis:
        await redis.config_set("maxmemory", "1")
        await backend.put(b"k", b"x")
        await until(lambda: not backend.healthy)
        assert await backend.get(b"k") is None
        assert caplog.text.count("Redis does not work") == 1
        await redis.config_set("maxmemory", "0")
        await until(lambda: backend.healthy)
    await backend.put(b"k", b"x")
    assert await backend.get(b"k") == b"x"
    assert reasons == ["error"]
    await backend.close()


async def test_what_speaks_no_redis_is_an_outage() -> None:
    async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n" * 10)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(babble, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    reasons: list[str] = []
    backend = RedisBackend(f"redis://127.0.0.1:{port}", 60, 0.5, reasons.append)
    assert await backend.get(b"k") is None
    await backend.put(b"k", b"v")
    await until(lambda: not backend.healthy)
    assert reasons
    await backend.close()
    server.close()


async def test_a_lease_is_held_by_one(redis_server: RedisServer) -> None:
    backend = RedisBackend(redis_server.url, 60, 1.0, lambda _: None)
    assert await backend.acquire(b"k", b"one", 10_000) is True
    assert await backend.acquire(b"k", b"two", 10_000) is False
    await backend.release(b"k", b"two")
    assert await backend.acquire(b"k", b"two", 10_000) is False
    await backend.release(b"k", b"one")
    assert await backend.acquire(b"k", b"two", 50) is True
    await asyncio.sleep(0.1)
    assert await backend.acquire(b"k", b"three", 50) is True
    redis_server.kill()
    assert await backend.acquire(b"k", b"four", 50) is None
    await backend.close()


async def test_equal_requests_at_two_gateways_cost_one_computation(
    all_fakes: Fakes, redis_server: RedisServer, tmp_path: Path
) -> None:
    all_fakes.reset()
    settings = {"REDIS_URL": redis_server.url, "CACHE_SECRET": "shared", "CACHE_TIMEOUT": "1"}
    first_at, second_at = tmp_path / "first", tmp_path / "second"
    first_at.mkdir()
    second_at.mkdir()
    async with (
        run_gateway(all_fakes, first_at, **settings) as first,
        run_gateway(all_fakes, second_at, **settings) as second,
    ):
        gate = all_fakes.shard.faults.hold()
        asked = [asyncio.create_task(first.ask("both", "In 1933."))]
        await until(lambda: all_fakes.shard.faults.running == 1)
        asked += [asyncio.create_task(second.ask("both", "In 1933.")) for _ in range(3)]
        await second.until_asked(3)
        await second.until_metric(LOOKUPS, lambda found: found > 0, cache="answer", result="miss")
        gate.set()
        bodies = [(await task).json() for task in asked]
        assert {body["answers"][0]["text"] for body in bodies} == {"1933"}
        assert [body["cache"] for body in bodies] == ["miss", "shared", "shared", "shared"]
        assert all_fakes.shard.faults.calls == 1

        # The one that computes fails: the other does it, and at once.
        all_fakes.reset()
        all_fakes.shard.faults.delay = 0.3
        all_fakes.shard.faults.codes_after = [grpc.StatusCode.INTERNAL]
        failing = asyncio.create_task(first.ask("fails", "In 1934."))
        await until(lambda: all_fakes.shard.faults.running == 1)
        answer = await second.ask("fails", "In 1934.")
        assert (await failing).status_code == 502
        assert (answer.status_code, answer.json()["cache"]) == (200, "miss")

        # The one that computes dies: the other waits no longer than the lease lasts.
        all_fakes.reset()
        gate = all_fakes.shard.faults.hold()
        dying = asyncio.create_task(first.ask("dies", "In 1935."))
        await until(lambda: all_fakes.shard.faults.running == 1)
        before = await second.metric(LOOKUPS, cache="answer", result="miss")
        answering = asyncio.create_task(second.ask("dies", "In 1935."))
        await second.until_metric(
            LOOKUPS, lambda found: found > before, cache="answer", result="miss"
        )
        first.process.kill()
        gate.set()
        assert isinstance((await asyncio.gather(dying, return_exceptions=True))[0], Exception)
        assert (await answering).json()["answers"][0]["text"] == "1935"
