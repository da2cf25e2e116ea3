"""What every call of a service behind the gateway needs: an id, time, and a few more tries."""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import grpc
from grpc import aio

from gateway.errors import GatewayError, from_rpc
from services.rpc.breaker import RetryBudget

T = TypeVar("T")

RETRY_PAUSE_SECONDS = 0.1
# Beside the tries at other replicas, which come first. The first is free; the others, for requests
# that meet one fault after another, come out of a budget.
RETRIES = 3
# Who waits for a service's return still wants to hear in time that it has not come.
MARGIN_SECONDS = 0.3


def call_id(request_id: str) -> str:
    """An id for one call: callers may use a request id twice, services must not see it."""
    return f"{request_id}~{secrets.token_hex(4)}"


def time_left(deadline: float) -> float:
    """Seconds until `deadline`, on the event loop's clock. Raises `GatewayError` at its end."""
    left = deadline - asyncio.get_running_loop().time()
    if left <= 0:
        raise GatewayError("timeout", "The request's time ran out.")
    return left


async def retried(
    attempt: Callable[[], Awaitable[T]],
    service: str,
    before_again: Callable[[], Awaitable[None]] | None = None,
    budget: RetryBudget | None = None,
) -> T:
    """Awaits `attempt()`, and again, where the service could not be reached.

    That is once and, as long as `budget` lasts, up to `RETRIES` times. A failed call becomes a
    `GatewayError` that names `service`; other errors pass. What `before_again` raises ends it,
    too: it may wait until the service is back, and knows how long.
    """
    for tried in itertools.count():
        try:
            return await attempt()
        except aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE or not _again(tried, budget):
                raise from_rpc(error, service) from None
        await asyncio.sleep(RETRY_PAUSE_SECONDS)
        if before_again is not None:
            await before_again()
    raise AssertionError("the loop ends by what it returns or raises")


def _again(tried: int, budget: RetryBudget | None) -> bool:
    """Whether another try may follow so many that came after the first."""
    return not tried or (tried < RETRIES and budget is not None and budget.spend())


class Background:
    """Work that no caller waits for, such as writing to a cache."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Lets it run."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def finish(self) -> None:
        """Waits for what is under way."""
        await asyncio.gather(*self._tasks, return_exceptions=True)
