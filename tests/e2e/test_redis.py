"""Redis dies and returns under load: no request notices."""

from __future__ import annotations

import asyncio
import itertools
import time

import httpx

from tests.e2e.asking import Question, ask_http, http_client, questions
from tests.e2e.conftest import Checkpoints
from tests.processes import Cluster, RedisServer

CLIENTS = 8


class Load:
    """Clients that ask until told to stop; some questions are new, some were asked before."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client
        self._stop = False
        self._new = itertools.count(10_000)
        self._repeated = questions(20, seed=3)
        self.answered = 0
        self._tasks = [asyncio.create_task(self._ask(number)) for number in range(CLIENTS)]

    async def _ask(self, number: int) -> None:
        while not self._stop:
            self.answered += 1
            if self.answered % 2:
                repeated = self._repeated[self.answered % len(self._repeated)]
                await ask_http(self._client, repeated)
            else:
                fresh = f"It was client {number} who asked question {next(self._new)}."
                await ask_http(self._client, Question("Who asked?", fresh))

    async def run(self, seconds: float) -> int:
        """Goes on for so long, and for some questions of each client; returns their number."""
        before, now = self.answered, time.monotonic()
        while time.monotonic() < now + seconds or (
            self.answered - before <= 2 * CLIENTS and time.monotonic() < now + 60
        ):
            for task in self._tasks:
                if task.done():
                    task.result()  # raises what went wrong
            await asyncio.sleep(0.02)
        return self.answered - before

    async def finish(self) -> None:
        """Stops; fails if any request has failed."""
        self._stop = True
        await asyncio.gather(*self._tasks)


async def _cache_of(client: httpx.AsyncClient, question: Question) -> str:
    return str((await ask_http(client, question))["cache"])


async def test_redis_killed_and_restarted_under_load(
    checkpoint: Checkpoints, redis: RedisServer
) -> None:
    known = Question("Who asked?", "It was asked by the test itself.")
    # Patient: what is slow for a moment, on a busy machine, is no outage.
    patience = {"MIAOTUI_GATEWAY_CACHE_TIMEOUT": "1"}
    async with (
        Cluster(checkpoint("bert"), stages=2, redis_url=redis.url, gateway_env=patience) as cluster,
        http_client(cluster.url) as client,
    ):
        assert await _cache_of(client, known) == "miss"
        assert await _cache_of(client, known) == "hit"
        load = Load(client)
        phases = {"before": await load.run(1.0)}

        redis.kill()
        phases["without Redis"] = await load.run(1.5)
        assert await _cache_of(client, known) in ("miss", "shared")
        failures = await _failures(client)

        redis.start()
        # A new, empty Redis: what was in the old one is gone, and comes back by itself.
        deadline = time.monotonic() + 60
        while await _cache_of(client, known) != "hit":
            assert time.monotonic() < deadline, "the cache did not come back"
            await load.run(0.1)
        phases["with Redis again"] = await load.run(1.0)
        await load.finish()
        log = cluster.gateway.log
    assert min(phases.values()) > CLIENTS, phases
    assert failures > 0, "a failed cache operation must be counted"
    # Once an outage, not once a request.
    assert log.count("Redis does not work") == 1, log
    assert log.count("Redis works again") == 1, log


async def _failures(client: httpx.AsyncClient) -> float:
    lines = (await client.get("/metrics")).text.splitlines()
    name = "miaotui_gateway_cache_failures_total"
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))
