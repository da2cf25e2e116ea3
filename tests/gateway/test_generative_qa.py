"""Questions in generative mode, text over gRPC, and gateways with one model only."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio

from miaotui.client import AsyncClient, Client, MiaotuiError
from miaotui.v1 import gateway_pb2 as pb
from miaotui.v1 import gateway_pb2_grpc
from miaotui.v1 import shard_pb2 as shard_pb
from miaotui.v1 import tokenizer_pb2 as tokenizer_pb
from services.rpc.channel import open_channel
from tests.gateway.conftest import Gateway, run_gateway, until
from tests.gateway.fakes import Fakes
from tests.gateway.test_contract import validator

RIVER = "长江是亚洲第一长河。👩‍🚀它发源于青藏高原的唐古拉山脉。全长约6300公里。"


async def test_answer_with_citations(writer_gateway: Gateway, fakes: Fakes) -> None:
    fakes.writer.texts = ["长江发源于青藏高原的唐古拉山脉[2]，全长约6300公里。".encode()]
    response = await writer_gateway.ask("长江发源于哪里？", RIVER, mode="generative")
    assert response.status_code == 200
    body = response.json()
    document = (await writer_gateway.http.get("/openapi.json")).json()
    validator(document, "QaResponse").validate(body)
    assert body["answer"] == "长江发源于青藏高原的唐古拉山脉，全长约6300公里。"
    assert body["answerable"] is True
    assert body["model"] == "fake-writer"
    cited = body["citations"]
    assert [c["text"] for c in cited] == [
        "👩‍🚀它发源于青藏高原的唐古拉山脉。",
        "全长约6300公里",
    ]
    assert all(RIVER[c["start"] : c["end"]] == c["text"] for c in cited)
    (message,) = fakes.generator_tokenizer.asked[0].chat.messages
    assert "[1] 长江是亚洲第一长河。\n[2] 👩‍🚀它发源于" in message.content
    assert message.content.endswith("问题：长江发源于哪里？")
    request = fakes.writer.requests[0]
    assert (request.sampling.temperature, request.max_tokens) == (0.0, 256)
    again = await writer_gateway.ask("长江发源于哪里？", RIVER, mode="generative")
    assert again.json()["cache"] == "hit"
    assert again.json()["citations"] == cited
    assert len(fakes.writer.requests) == 1


async def test_no_answer_in_the_passage(writer_gateway: Gateway, fakes: Fakes) -> None:
    fakes.writer.texts = [b"The text does not say."]
    body = (
        await writer_gateway.ask(
            "Who built it?", "It stands in Paris.", mode="generative", max_answer_length=30
        )
    ).json()
    assert (body["answerable"], body["citations"]) == (False, [])
    assert fakes.writer.requests[0].max_tokens == 30
    # Extractive stays what it was.
    body = (await writer_gateway.ask("When?", "In 1925.")).json()
    assert (body["answer"], body["citations"]) == (None, [])
    assert body["answers"][0]["text"] == "1925"


async def test_both_modes_in_a_batch(writer_gateway: Gateway, fakes: Fakes) -> None:
    questions = [
        {"question": "When?", "context": "In 1925.", "mode": mode}
        for mode in ("generative", "extractive")
    ]
    response = await writer_gateway.http.post("/v1/qa/batch", json={"requests": questions})
    assert response.text.count('"answer":"Hello, world."') == 1
    assert response.text.count('"text":"1925"') == 1


async def test_a_caller_that_leaves_a_question_frees_the_decoder(
    writer_gateway: Gateway, fakes: Fakes
) -> None:
    fakes.writer.texts, fakes.writer.pause = [b"word " * 50], 1.0
    asking = asyncio.create_task(
        writer_gateway.ask("Leave?", "It stands.", mode="generative", no_cache=True)
    )
    await until(lambda: fakes.writer.running == 1)
    asking.cancel()
    await until(lambda: fakes.writer.cancelled == 1)


async def test_gateways_with_one_model(gateway: Gateway, fakes: Fakes, tmp_path: Path) -> None:
    response = await gateway.ask("When?", "In 1925.", mode="generative")
    assert response.status_code == 422
    assert response.json()["errors"][0]["pointer"] == "/mode"
    response = await gateway.http.post("/v1/completions", json={"prompt": "x"})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    async with run_gateway(fakes, tmp_path, models="generative") as writing:
        response = await writing.ask("When?", "In 1925.")
        assert response.status_code == 422
        assert response.json()["errors"][0]["pointer"] == "/mode"
        response = await writing.http.post("/v1/completions", json={"prompt": "x"})
        assert response.json()["choices"][0]["text"] == "Hello, world."
        (model,) = (await writing.http.get("/v1/models")).json()["models"]
        assert model["kind"] == "generative"
        # One model that is not ready makes the gateway not ready, and says which.
        fakes.generator_shard.fingerprint = "another"
        try:
            assert "another model" in (await writing.ready(False)).json()["detail"]
            response = await writing.http.post("/v1/completions", json={"prompt": "x"})
            assert response.status_code == 503
            assert "retry-after" in response.headers
        finally:
            fakes.generator_shard.fingerprint = "writer-1"
            await writing.ready()


async def test_readiness_is_by_model(writer_gateway: Gateway, fakes: Fakes) -> None:
    fakes.generator_shard.status = shard_pb.STAGE_STATUS_WAITING
    try:
        response = await writer_gateway.ready(False)
        assert "generative: stage 0 does not serve: as told" in response.json()["detail"]
        assert "extractive" not in response.json()["detail"]
        # The other model answers all the same.
        assert (await writer_gateway.ask("When?", "In 1926.")).status_code == 200
    finally:
        fakes.generator_shard.status = shard_pb.STAGE_STATUS_SERVING
        await writer_gateway.ready()


@pytest.fixture
async def stub(writer_gateway: Gateway) -> AsyncIterator[Any]:
    async with open_channel(writer_gateway.grpc_target) as channel:
        yield gateway_pb2_grpc.GatewayServiceStub(channel)


async def test_text_over_grpc(stub: Any, fakes: Fakes) -> None:
    fakes.writer.texts = ["你好😀".encode()]
    fakes.pace_writer()
    request = pb.ChatRequest(
        model="fake-writer",
        chat=tokenizer_pb.ChatPrompt(
            messages=[tokenizer_pb.ChatMessage(role="user", content="嗨")]
        ),
        options=pb.WriteOptions(
            sampling=shard_pb.SamplingParams(temperature=0.5, seed=3), seeded=True, n=2
        ),
    )
    responses = [response async for response in stub.Chat(request)]
    texts = ["", ""]
    reasons = {}
    for response in responses:
        for text in response.texts:
            texts[text.index] += text.text
            reasons[text.index] = text.finish_reason
    assert texts == ["你好😀"] * 2
    assert reasons == {0: "stop", 1: "stop"}
    assert len(responses) > 3
    assert responses[-1].usage.completion_tokens == 22
    assert fakes.writer.requests[0].sampling.seed == 3
    written = [r async for r in stub.Write(pb.WriteRequest(text="a"))]
    assert "".join(t.text for r in written for t in r.texts) == "你好😀"
    tokens = pb.WriteRequest(tokens=pb.TokenIds(ids=[65]))
    assert [r async for r in stub.Write(tokens)]
    assert bytes(fakes.writer.requests[-1].input_ids) == b"A\0\0\0"
    fakes.writer.heard = None  # nobody reads along
    answer = await stub.Answer(
        pb.AnswerRequest(question="Where?", context="It is so.", generative=True)
    )
    assert answer.answer == "你好😀"


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (pb.WriteRequest(), "INVALID_ARGUMENT"),
        (pb.WriteRequest(text="x", model="other"), "NOT_FOUND"),
        (pb.WriteRequest(text="x", options=pb.WriteOptions(n=99)), "INVALID_ARGUMENT"),
        (pb.WriteRequest(text="x", options=pb.WriteOptions(stop=[""])), "INVALID_ARGUMENT"),
        (
            pb.WriteRequest(
                text="x",
                options=pb.WriteOptions(sampling=shard_pb.SamplingParams(temperature=-1)),
            ),
            "INVALID_ARGUMENT",
        ),
        (pb.WriteRequest(tokens=pb.TokenIds(ids=[2**32 - 1])), "INVALID_ARGUMENT"),
        (pb.WriteRequest(tokens=pb.TokenIds(ids=[999])), "INVALID_ARGUMENT"),
        (pb.ChatRequest(), "INVALID_ARGUMENT"),
    ],
)
async def test_grpc_requests_that_are_not_valid(
    stub: Any, fakes: Fakes, request_: Any, code: str
) -> None:
    method = stub.Chat if isinstance(request_, pb.ChatRequest) else stub.Write
    with pytest.raises(aio.AioRpcError) as caught:
        async for _ in method(request_):
            pass
    assert caught.value.code().name == code
    assert not fakes.writer.requests


async def test_grpc_deadline_and_cancellation_reach_the_shards(stub: Any, fakes: Fakes) -> None:
    fakes.writer.texts, fakes.writer.pause = [b"word " * 100], 0.2
    for seconds in (0.4, 2.0, 8.0):  # on a busy machine the first may be over at the tokenizer
        with pytest.raises(aio.AioRpcError) as caught:
            async for _ in stub.Write(pb.WriteRequest(text="x"), timeout=seconds):
                pass
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        if fakes.writer.requests:
            break
    await until(lambda: fakes.writer.cancelled == 1)
    call = stub.Write(pb.WriteRequest(text="x"))
    async for _ in call:
        call.cancel()
        break
    await until(lambda: fakes.writer.cancelled == 2)


async def test_the_python_client_writes(writer_gateway: Gateway, fakes: Fakes) -> None:
    fakes.writer.texts = ["你好，世界😀".encode()]
    fakes.pace_writer()
    messages = [{"role": "user", "content": "嗨"}]
    async with AsyncClient(writer_gateway.url) as client:
        stream = await client.chat(messages, temperature=0.0, no_cache=True)
        pieces = [piece async for piece in stream]
        assert len(pieces) > 2
        assert "".join(pieces) == "你好，世界😀" == stream.text
        assert stream.finish_reason == "stop"
        assert stream.usage["completion_tokens"] == 20
        written = await client.write("A", max_tokens=3, stop=["x"])
        assert [piece async for piece in written] == ["你"]
        assert written.finish_reason == "length"
        fakes.writer.texts = ["它在巴黎[1]。".encode()]
        fakes.writer.heard = None  # nobody reads along
        answer = await client.ask("它在哪里？", "它在巴黎。", mode="generative")
        assert answer.text == "它在巴黎。"
        assert [(c.start, c.end) for c in answer.citations] == [(0, 5)]
        with pytest.raises(MiaotuiError) as caught:
            await client.chat([])
        assert caught.value.status == 400
        fakes.writer.fails_after = 6
        broken = await client.write("A")
        with pytest.raises(MiaotuiError, match="failed"):
            _ = [piece async for piece in broken]
        fakes.writer.fails_after, fakes.writer.pause = None, 0.2
        fakes.writer.texts = [b"word " * 100]
        async with await client.write("A", max_tokens=400) as leaving:
            await anext(leaving)
        await until(lambda: fakes.writer.cancelled == 1)
    fakes.writer.reset()

    def blocking() -> tuple[str, str, Any]:
        with Client(writer_gateway.url) as client:
            with client.chat(messages) as stream:
                text = "".join(stream)
            return text, "".join(client.write("A")), stream.usage

    chat, written_, usage = await asyncio.to_thread(blocking)
    assert chat == written_ == "Hello, world."
    assert usage["completion_tokens"] == 14
