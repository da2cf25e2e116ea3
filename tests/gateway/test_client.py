"""The Python client, both ways, against a real gateway process."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from miaotui.client import Answer, AsyncClient, Client, MiaotuiError, Question
from tests.gateway.conftest import Gateway
from tests.gateway.fakes import Fakes
from tests.processes import free_port

CONTEXT = "👩‍🚀 In 1960, or so."


async def test_async_client(gateway: Gateway, fakes: Fakes) -> None:
    async with AsyncClient(gateway.url) as client:
        answer = await client.ask("When?", CONTEXT, top_k=2)
        assert answer.text == "1960" == CONTEXT[answer.start : answer.end]
        assert len(answer.candidates) == 2
        assert answer.timings["total"] > 0
        (model,) = await client.models()
        assert model["name"] == "fake"
        none = await client.ask("When?", "No number.", no_answer_threshold=0.0)
        assert (none.answerable, none.best, none.text) == (False, None, "")
        questions = [Question("a", CONTEXT), Question("", CONTEXT), Question("b", CONTEXT)]
        results = {index: outcome async for index, outcome in client.ask_many(questions)}
    assert isinstance(results[0], Answer)
    assert isinstance(results[2], Answer)
    assert isinstance(results[1], MiaotuiError)
    assert results[1].status == 422
    assert "/requests/1/question" in str(results[1])


async def test_blocking_client(gateway: Gateway, fakes: Fakes) -> None:
    def talk() -> tuple[Answer, list[int]]:
        with Client(gateway.url) as client:
            answer = client.ask("When, blocking?", CONTEXT)
            many = client.ask_many([Question("c", CONTEXT), Question("d", CONTEXT)])
            assert client.models()[0]["ready"] is True
            return answer, sorted(index for index, _ in many)

    answer, indices = await asyncio.to_thread(talk)
    assert answer.text == "1960"
    assert indices == [0, 1]


async def test_errors(gateway: Gateway, fakes: Fakes) -> None:
    async with AsyncClient(gateway.url) as client:
        with pytest.raises(MiaotuiError, match="/top_k") as caught:
            await client.ask("q", "c", top_k=0)
        assert caught.value.status == 422
        with pytest.raises(MiaotuiError, match="/requests"):
            _ = [item async for item in client.ask_many([])]
        fakes.shard.faults.codes = [grpc.StatusCode.INTERNAL]
        with pytest.raises(MiaotuiError) as caught:
            await client.ask("q fails", "In 1961.")
        assert caught.value.problem["type"] == "/problems/service-failed"
    fakes.shard.faults.hold()
    async with AsyncClient(gateway.url, timeout=0.3) as client:
        with pytest.raises(MiaotuiError) as caught:
            await client.ask("q slow", "In 1961.")
        assert caught.value.status == 504
    async with AsyncClient(f"http://127.0.0.1:{free_port()}") as client:
        with pytest.raises(MiaotuiError, match="cannot reach") as caught:
            await client.ask("q", "c")
        assert caught.value.status == 0
