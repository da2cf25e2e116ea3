"""Many questions at once, each answered or refused by itself."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any, TypeAlias

from opentelemetry import trace

from gateway.errors import GatewayError
from gateway.schema import QaRequest, QaResponse
from miaotui.telemetry import span_within

log = logging.getLogger(__name__)
_tracer = trace.get_tracer("miaotui.gateway")

Outcome: TypeAlias = QaResponse | GatewayError
Answer: TypeAlias = Callable[[QaRequest, str, float | None], Awaitable[QaResponse]]
"""Answers a request of this id within so many seconds; None: within the default."""


async def run_batch(
    answer: Answer,
    items: Sequence[Any],
    parse: Callable[[int, Any], QaRequest],
    request_id: str,
    timeout: float | None,
    concurrency: int,
) -> AsyncGenerator[tuple[int, Outcome]]:
    """Yields (index, outcome) as each item is done, in any order.

    `parse` turns an item into a request or raises `GatewayError`; `timeout` is for each
    item, in seconds; None: the default. Closing the generator cancels what is still worked on.
    """

    async def one(index: int) -> Outcome:
        try:
            request = parse(index, items[index])
            with span_within(_tracer, "batch item", attributes={"miaotui.batch.index": index}):
                return await answer(request, f"{request_id}.{index}", timeout)
        except GatewayError as error:
            return error
        except Exception as error:  # noqa: BLE001 - one item must not end the others
            log.error("item %d of request %s: %s", index, request_id, type(error).__name__)
            return GatewayError("internal", "Something went wrong that should not.")

    async def work() -> None:
        for index in remaining:
            done.put_nowait((index, await one(index)))

    remaining = iter(range(len(items)))
    done: asyncio.Queue[tuple[int, Outcome]] = asyncio.Queue()
    workers = [asyncio.create_task(work()) for _ in range(min(concurrency, len(items)))]
    try:
        for _ in items:
            yield await done.get()
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
