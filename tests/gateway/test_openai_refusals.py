"""What the official `openai` client is told where no text can be had."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import grpc
import openai
import pytest
from openai import AsyncOpenAI

from gateway.generation.generator import TRIES_IN_VAIN
from tests.gateway.conftest import Gateway, until
from tests.gateway.fakes import CONTEXT, Fakes
from tests.gateway.openai_client import MODEL, USER
from tests.gateway.test_contract import validator


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0]",
        ),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"n": 9}, "n"),
        ({"n": 0}, "n"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"9999": 1}}, "logit_bias"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"frobnicate": 1}, None),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_requests_that_are_not_valid(
    client: AsyncOpenAI, writer_gateway: Gateway, fakes: Fakes, body: Any, param: str | None
) -> None:
    response = await writer_gateway.http.post(
        "/v1/chat/completions",
        content=json.dumps({"model": MODEL, "messages": USER, **body}),
        headers={"Content-Type": "application/json"},
    )
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert error["message"]
    document = (await writer_gateway.http.get("/openapi.json")).json()
    validator(document, "OpenAiError").validate(response.json())
    assert not fakes.writer.requests


async def test_the_client_raises_its_own_exceptions(client: AsyncOpenAI, fakes: Fakes) -> None:
    async def ask(**more: Any) -> Any:
        body = {"model": MODEL, "messages": USER, **more}
        return await client.chat.completions.create(**body)

    with pytest.raises(openai.NotFoundError) as missing:
        await ask(model="gpt-4o")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        await client.completions.create(model=MODEL, prompt=[65] * CONTEXT)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError):
        await ask(max_tokens=CONTEXT)
    with pytest.raises(openai.BadRequestError) as beyond:
        await client.completions.create(model=MODEL, prompt=[257])
    assert beyond.value.param == "prompt"
    refused: Any = [{"role": "refused", "content": "x"}]
    with pytest.raises(openai.BadRequestError, match="the template refuses it"):
        await ask(messages=refused)
    fakes.writer.codes = [grpc.StatusCode.RESOURCE_EXHAUSTED]
    with pytest.raises(openai.RateLimitError) as full:
        await ask()
    assert int(full.value.response.headers["retry-after"]) >= 1
    tries = TRIES_IN_VAIN + 1
    fakes.writer.codes = [grpc.StatusCode.UNAVAILABLE] * tries
    with pytest.raises(openai.InternalServerError) as away:
        await ask(stream=True)
    assert away.value.status_code == 503
    assert "retry-after" in away.value.response.headers
    assert len(fakes.writer.requests) == 1 + tries
    fakes.writer.codes = [grpc.StatusCode.INTERNAL]
    with pytest.raises(openai.InternalServerError) as failed:
        await ask()
    assert failed.value.status_code == 502
    fakes.writer.pause = 5.0
    with pytest.raises(openai.InternalServerError) as late:
        await ask(extra_headers={"X-Request-Timeout": "0.3"})
    assert late.value.status_code == 504
    await until(lambda: not fakes.writer.running)


async def test_unavailable_is_tried_once_more(client: AsyncOpenAI, fakes: Fakes) -> None:
    fakes.writer.codes = [grpc.StatusCode.UNAVAILABLE]
    fakes.generator_tokenizer.decode_codes = [grpc.StatusCode.UNAVAILABLE]
    reply = await client.chat.completions.create(model=MODEL, messages=USER)
    assert reply.choices[0].message.content == "Hello, world."
    assert len({request.request_id for request in fakes.writer.requests}) == 2


async def test_a_failure_in_mid_stream(
    client: AsyncOpenAI, writer_gateway: Gateway, fakes: Fakes
) -> None:
    fakes.writer.fails_after = 5
    stream = await client.chat.completions.create(model=MODEL, messages=USER, stream=True)
    text = ""
    with pytest.raises(openai.APIError) as caught:
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
    assert text == "Hello"
    assert "stage 0 failed" in caught.value.message
    response = await writer_gateway.http.post(
        "/v1/completions", json={"prompt": "x", "stream": True}
    )
    *_, last, end = response.text.split("\n\n")
    assert "error" in json.loads(last[6:])
    assert end == ""


async def test_a_caller_that_goes_away_frees_the_work(client: AsyncOpenAI, fakes: Fakes) -> None:
    # All of it would take minutes.
    fakes.writer.texts = [b"word " * 800]
    fakes.writer.pause = 0.2
    stream = await client.chat.completions.create(model=MODEL, messages=USER, stream=True)
    async for chunk in stream:
        if chunk.choices[0].delta.content:
            break
    await stream.close()
    await until(lambda: fakes.writer.cancelled == 1)
    for body in ({"stream": True, "n": 2}, {}):
        asking = asyncio.create_task(
            client.completions.create(model=MODEL, prompt=["a", "b"], max_tokens=900, **body)  # type: ignore[call-overload]
        )
        if body:
            leaving = await asking
            await anext(leaving)
            await until(lambda: fakes.writer.running == 2)
            await leaving.close()
        else:
            await until(lambda: fakes.writer.running == 2)
            asking.cancel()
        await until(lambda: not fakes.writer.running)
    assert fakes.writer.cancelled == 5


async def test_errors_on_these_paths_have_their_shape(writer_gateway: Gateway) -> None:
    http = writer_gateway.http
    for response, status in (
        (await http.get("/v1/chat/completions"), 405),
        (await http.post("/v1/completions", content=b"{"), 415),
        (
            await http.post(
                "/v1/completions", content=b"{", headers={"Content-Type": "application/json"}
            ),
            400,
        ),
        (await http.get("/v1/chat/nothing"), 404),
    ):
        assert response.status_code == status
        assert response.headers["content-type"] == "application/json"
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in writer_gateway.process.log


DEEP: Any = "x"
for _ in range(300):
    DEEP = [DEEP]
ODD: list[Any] = [
    *(None, True, 0, -1, 17, 2**31, 2**64, 1e308, -0.5, "", "\ud800", "北\0", [], {}, [None]),
    *([[]], [[1]], {"a": 1}, [{"type": "text"}], {"type": "json_schema"}, {"1": 1e9}, DEEP),
    {"d": DEEP},
]
CHAT_FIELDS = [
    *("model", "messages", "temperature", "top_p", "n", "stop", "max_tokens", "seed", "logprobs"),
    *("logit_bias", "top_logprobs", "response_format", "stream", "stream_options", "top_k"),
    *("tools", "tool_choice", "chat_template_kwargs", "metadata", "modalities", "draft_tokens"),
]
COMPLETION_FIELDS = ["prompt", "echo", "best_of", "suffix", "logprobs", "stop", "n", "stream"]


async def test_odd_bodies_are_answered_or_refused(writer_gateway: Gateway, fakes: Fakes) -> None:
    rng = random.Random(1)

    async def one() -> int:
        chat = rng.random() < 0.6
        body: Any = {"messages": [{"role": "user", "content": "x"}]} if chat else {"prompt": "x"}
        if chat and rng.random() < 0.3:
            body["messages"][0][rng.choice(("role", "content", "tool_calls"))] = rng.choice(ODD)
        for _ in range(rng.randint(0, 2)):
            body[rng.choice(CHAT_FIELDS if chat else COMPLETION_FIELDS)] = rng.choice(ODD)
        response = await writer_gateway.http.post(
            "/v1/chat/completions" if chat else "/v1/completions",
            content=json.dumps(body),
            headers={"Content-Type": "application/json"},
        )
        assert response.status_code in (200, 400, 404), (body, response.text)
        assert ("error" in response.text[:12]) == (response.status_code != 200)
        return response.status_code

    statuses: list[int] = []
    for _ in range(15):
        statuses += await asyncio.gather(*(one() for _ in range(30)))
    assert min(statuses.count(200), statuses.count(400)) > 50
    assert "Traceback" not in writer_gateway.process.log
