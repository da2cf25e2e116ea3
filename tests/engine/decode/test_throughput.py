"""How fast a pipeline writes, in virtual time: links and stages take exactly what they say."""

from __future__ import annotations

import asyncio

import pytest

from miaotui.engine.batch import Batch
from miaotui.engine.decode.types import GenerationRequest
from tests.engine.decode import virtual
from tests.engine.decode.ring import Listener, Model, Ring, chaos, copying, ids, settings

_BATCH = 0.003
_TOKEN = 0.001
"""Seconds that a stage takes for a batch and for each of its tokens."""


async def _rate(
    streams: int,
    *,
    link: float,
    model: Model,
    draft_tokens: int = 0,
    prompt: int = 4,
    micro_batches: int = 0,
) -> float:
    """Tokens a second of so many streams over three stages."""

    async def computes(_stage: int, batch: Batch) -> None:
        await asyncio.sleep(_BATCH + _TOKEN * batch.tokens)

    async def carries() -> None:
        await asyncio.sleep(link)

    ring = Ring(
        settings(
            stages=3,
            context=1000,
            batch_tokens=256,
            chunk_tokens=256,
            draft_tokens=draft_tokens,
            micro_batches=micro_batches,
        ),
        model,
        blocks=1000,
        block_tokens=16,
        pause=computes,
        link=carries if link else None,
    )
    listeners = [Listener() for _ in range(streams)]
    begin = asyncio.get_running_loop().time()
    for number, listener in enumerate(listeners):
        tokens = [(number * 7 + 3 * n) % 50 for n in range(prompt)]
        ring.head.submit("r", GenerationRequest(ids(*tokens), max_tokens=60), listener)
    for listener in listeners:
        await listener.done.wait()
    seconds = asyncio.get_running_loop().time() - begin
    ring.close()
    assert not ring.problems
    return streams * 60 / seconds


@pytest.mark.parametrize("micro_batches", [0, 1])
def test_streams_share_the_links_latency(micro_batches: int) -> None:
    model = chaos(50)
    one = virtual.run(_rate(1, link=0.02, model=model, micro_batches=micro_batches))
    many = virtual.run(_rate(16, link=0.02, model=model, micro_batches=micro_batches))
    # One token takes the ring once: three stages and three links.
    assert one == pytest.approx(1 / 0.072, rel=0.02)
    assert many > 8 * one


def test_no_stage_waits_for_another() -> None:
    model = chaos(50)
    rate = virtual.run(_rate(12, link=0.0, model=model, prompt=1))
    together = virtual.run(_rate(12, link=0.0, model=model, prompt=1, micro_batches=1))
    # Each of three batches of four is computed while the two others are elsewhere.
    assert rate == pytest.approx(4 / (_BATCH + 4 * _TOKEN), rel=0.1)
    assert together == pytest.approx(12 / (3 * (_BATCH + 12 * _TOKEN)), rel=0.1)


def test_drafts_save_round_trips_where_a_text_is_copied() -> None:
    copy = copying(40)
    plain = virtual.run(_rate(1, link=0.02, model=copy, prompt=40))
    drafted = virtual.run(_rate(1, link=0.02, model=copy, prompt=40, draft_tokens=8))
    assert drafted > 4 * plain
