"""What requests for texts share: calls of the tokenizer, the cache, and each other's work."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from tests.gateway.conftest import Gateway
from tests.gateway.fakes import Fakes
from tests.gateway.openai_client import CHINESE, MODEL, USER, streamed


async def test_many_streams_share_calls_of_the_tokenizer(client: AsyncOpenAI, fakes: Fakes) -> None:
    fakes.writer.texts = [CHINESE.encode()]
    fakes.writer.pause = 0.01

    async def one() -> list[str]:
        stream = await client.chat.completions.create(model=MODEL, messages=USER, stream=True)
        return (await streamed(stream))[0]

    results = await asyncio.gather(*(one() for _ in range(32)))
    assert results == [[CHINESE]] * 32
    steps = len(CHINESE.encode()) + 1
    calls = len(fakes.generator_tokenizer.batches)
    # Fewer where news of a text came while others' were being read.
    assert len(results) < sum(fakes.generator_tokenizer.batches) <= 32 * steps
    assert calls < 32 * steps / 3


async def test_a_whole_text_takes_one_call_of_the_tokenizer(
    client: AsyncOpenAI, fakes: Fakes
) -> None:
    fakes.writer.texts = [CHINESE.encode(), b"Hello, world."]
    fakes.writer.pause = 0.002
    batches = fakes.generator_tokenizer.batches
    # Drawn, and so from no cache; decided, and so for the cache.
    options: list[Any] = [{}, {"temperature": 0}]
    for count, more in enumerate(options, 1):
        reply = await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "at once"}], n=2, **more
        )
        assert [choice.message.content for choice in reply.choices] == [CHINESE, "Hello, world."]
        assert [choice.finish_reason for choice in reply.choices] == ["stop", "stop"]
        assert batches == [2] * count


async def test_cache_of_deterministic_texts(
    client: AsyncOpenAI, writer_gateway: Gateway, fakes: Fakes
) -> None:
    async def ask(**more: Any) -> tuple[Any, str]:
        body: Any = {"model": MODEL, "messages": [{"role": "user", "content": "cached?"}], **more}
        raw = await client.chat.completions.with_raw_response.create(**body)
        return raw.parse(), raw.headers["x-miaotui-cache"]

    first, status = await ask(temperature=0)
    assert status == "miss"
    second, status = await ask(temperature=0)
    assert status == "hit"
    assert second.choices[0].message == first.choices[0].message
    assert second.usage.completion_tokens == first.usage.completion_tokens
    assert len(fakes.writer.requests) == 1
    stream = await client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "cached?"}],
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    texts, reasons, chunks = await streamed(stream)
    assert (texts, reasons) == (["Hello, world."], ["stop"])
    assert chunks[-1].usage.completion_tokens == 14
    assert len(fakes.writer.requests) == 1
    for more in ({"temperature": 0, "stop": "w"}, {"seed": 1}, {"temperature": 0, "max_tokens": 5}):
        assert (await ask(**more))[1] == "miss"
    assert (await ask(seed=1))[1] == "hit"
    assert (await ask(temperature=0, extra_body={"no_cache": True}))[1] == "bypass"
    for _ in range(2):  # drawn anew each time
        assert (await ask())[1] == "bypass"
    # A stream that was read to its end is kept; one that failed is not.
    fakes.writer.fails_after = 3
    with pytest.raises(openai.InternalServerError):
        await ask(seed=2)
    fakes.writer.fails_after = None
    stream = await client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "cached?"}],
        seed=2,
        stream=True,
    )
    await streamed(stream)
    # Kept in memory before the stream's end is sent.
    assert (await ask(seed=2))[1] == "hit"


async def test_equal_requests_in_flight_cost_one(client: AsyncOpenAI, fakes: Fakes) -> None:
    fakes.writer.pause = 0.02
    messages: Any = [{"role": "user", "content": "together"}]
    replies = await asyncio.gather(
        *(
            client.chat.completions.create(model=MODEL, messages=messages, temperature=0)
            for _ in range(10)
        )
    )
    assert {reply.choices[0].message.content for reply in replies} == {"Hello, world."}
    assert len(fakes.writer.requests) == 1
