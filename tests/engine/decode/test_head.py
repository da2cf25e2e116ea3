"""The head of a decoder's pipeline over stages that check what they are sent."""

from __future__ import annotations

import asyncio

import pytest

from miaotui.engine.decode.types import FinishReason, GenerationRequest
from tests.engine.decode.ring import Listener, Ring, chaos, ids, reference, settings


async def _finish(*listeners: Listener) -> None:
    async with asyncio.timeout(10):
        for listener in listeners:
            await listener.done.wait()


def _check(ring: Ring) -> None:
    """Nothing is left behind."""
    assert not ring.problems
    pool = ring.head.scheduler.tables.pool
    assert pool is not None
    assert pool.used == 0
    assert ring.head.open_requests == ring.head.running_sequences == ring.head.queued == 0
    ring.close()


@pytest.mark.parametrize("stages", [1, 2, 3])
async def test_texts_are_what_the_model_writes(stages: int) -> None:
    model = chaos(50)
    ring = Ring(settings(stages=stages), model, blocks=64, block_tokens=4)
    requests = [
        GenerationRequest(ids(*range(1, 2 + 5 * n)), max_tokens=3 + n, n=1 + n % 2)
        for n in range(8)
    ]
    listeners = [Listener() for _ in requests]
    for request, listener in zip(requests, listeners, strict=True):
        ring.head.submit("r", request, listener)
        await asyncio.sleep(0)
    await _finish(*listeners)
    for request, listener in zip(requests, listeners, strict=True):
        for index in range(request.n):
            text, reason = reference(model, request, index, 200)
            assert listener.texts[index] == text
            assert listener.reasons[index] is reason is FinishReason.LENGTH
    _check(ring)
