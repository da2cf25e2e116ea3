"""The texts of the split decoder equal those of the whole one, whatever happens meanwhile."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.decoder_checkpoints import DECODER_FAMILIES, make_decoder
from tests.e2e.generating import (
    Client,
    Prompt,
    Reference,
    Written,
    check,
    client_of,
    collect,
    prompts,
    until_free,
    until_serving,
)
from tests.processes import Cluster

LAYERS = 3
STREAMS = 64
FULL = os.environ.get("MIAOTUI_FULL") == "1"
TURNS = 24 if FULL else 6

Decoders = Callable[[str], Path]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoders:
    """Makes tiny decoders, each once."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            directory = tmp_path_factory.mktemp("decoder") / family
            made[family] = make_decoder(directory, family, layers=LAYERS)
        return made[family]

    return make


# tests/models compares every family in every number of stages within one process.
PAIRS = [
    (family, stages)
    for family in DECODER_FAMILIES
    for stages in range(1, LAYERS + 1)
    if FULL or (family, stages) in {("llama", 1), ("gpt2", 2)}
]


@pytest.mark.parametrize(("family", "stages"), PAIRS)
async def test_texts_equal_those_of_the_whole_model(
    family: str, stages: int, decoder: Decoders
) -> None:
    reference = Reference(decoder(family))
    asked = reference.decided(prompts(28, seed=stages))[:24]
    async with (
        Cluster(decoder(family), stages=stages, only_shards=True) as cluster,
        client_of(cluster) as client,
    ):
        alone = [await client.plain(prompt.request()) for prompt in asked[:4]]
        together = await asyncio.gather(
            *(client.plain(prompt.request()) for prompt in asked[::2]),
            *(client.streamed(prompt.request()) for prompt in asked[1::2]),
        )
        await until_free(cluster)
    check(asked[:4], alone, reference)
    check([*asked[::2], *asked[1::2]], together, reference)


@pytest.fixture(scope="module")
async def crowded(decoder: Decoders) -> AsyncIterator[Cluster]:
    """Three stages whose KV cache has room for a fraction of what the tests ask for."""
    env = {
        # 96 blocks of 16 tokens, of one layer with two heads of 8.
        "MIAOTUI_SHARD_KV_CACHE_BYTES": str(96 * 16 * 2 * 2 * 8 * 4),
        "MIAOTUI_SHARD_CHUNK_TOKENS": "32",
    }
    model = decoder("llama")
    async with Cluster(model, stages=3, only_shards=True, shard_env=env) as cluster:
        await until_serving(cluster)
        yield cluster


async def _some(client: Client, prompt: Prompt, name: str) -> Written | None:
    """The text, or None where the call was cancelled on the way."""
    chance = random.Random(name)  # its own: which one is asked first depends on the machine
    await asyncio.sleep(chance.random() * 0.5)
    leaves = chance.random() < 1 / 3
    if not leaves:
        ask = client.plain if chance.random() < 0.3 else client.streamed
        return await ask(prompt.request(name))
    if chance.random() < 0.5:
        task = asyncio.ensure_future(client.plain(prompt.request(name)))
        await asyncio.wait([task], timeout=chance.random() * 0.3)
        task.cancel()
        return None
    async with client.calls(prompt.request(name), timeout=120) as call:
        for _ in range(chance.randint(0, 10)):
            if await anext(call, None) is None:
                break
    return None


async def test_streams_join_leave_and_are_cancelled_and_nothing_is_left(
    crowded: Cluster, decoder: Decoders
) -> None:
    reference = Reference(decoder("llama"))
    asked = reference.decided(prompts(STREAMS + 10, seed=64))[:STREAMS]
    assert len(asked) == STREAMS
    sizes: list[list[int]] = []
    async with client_of(crowded) as client:
        for turn in range(TURNS):
            texts = await asyncio.gather(
                *(_some(client, p, f"{turn}-{n}") for n, p in enumerate(asked))
            )
            kept = [(p, t) for p, t in zip(asked, texts, strict=True) if t is not None]
            assert STREAMS // 2 < len(kept) < 0.85 * STREAMS
            check([p for p, _ in kept], [t for _, t in kept], reference)
            # Held blocks, queue and pipeline are empty.
            await until_free(crowded)
            told = [await crowded.describe(stage) for stage in range(3)]
            sizes.append([stage.resident_bytes for stage in told])
    assert told[0].stage.kv_blocks == 96
    assert told[0].kv_blocks_cached <= 96
    # What PyTorch keeps for each size of batch that it meets takes the first turns.
    grown = [last - half for last, half in zip(sizes[-1], sizes[TURNS // 2], strict=True)]
    assert max(grown) < 24 << 20, f"bytes grown in the second half: {grown}"


@pytest.mark.parametrize("stage", [1, 2])
async def test_texts_go_on_when_a_stage_was_killed(
    stage: int, crowded: Cluster, decoder: Decoders
) -> None:
    reference = Reference(decoder("llama"))
    # None ends early: there must be something to go on with.
    long = [replace(p, max_tokens=100, stops=()) for p in prompts(16, seed=stage, longest=30)]
    asked = reference.decided(long)[:8]
    process = crowded.shards[stage]
    async with client_of(crowded) as client:
        calls = [client.calls(p.request(), timeout=120) for p in asked]
        first = await anext(calls[0])
        process.kill()
        await asyncio.to_thread(process.start)

        async def rest(index: int) -> Written:
            async def responses() -> AsyncIterator[object]:
                if index == 0:
                    yield first
                async for response in calls[index]:
                    yield response

            return await collect(responses())  # type: ignore[arg-type]

        texts = await asyncio.gather(*(rest(index) for index in range(len(calls))))
        await until_free(crowded)
    check(asked, texts, reference)
    assert "will be computed again" in crowded.shards[0].log
