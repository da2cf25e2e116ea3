"""The official `openai` client against a running gateway, over a fake of the shards."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from typing import Any

import grpc
import openai
import pytest
from openai import AsyncOpenAI, DefaultAsyncHttpxClient

from gateway.generation.generator import TRIES_IN_VAIN
from miaotui.v1 import shard_pb2 as shard_pb
from tests.gateway.conftest import Gateway, until
from tests.gateway.fakes import CONTEXT, Fakes
from tests.gateway.test_contract import validator

MODEL = "fake-writer"
CHINESE = "长江全长6300公里😀，是亚洲第一长河。👩‍🚀"
USER: Any = [{"role": "user", "content": "Hello?"}]


@pytest.fixture
async def client(writer_gateway: Gateway) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(
        base_url=f"{writer_gateway.url}/v1",
        api_key="none",
        max_retries=0,
        http_client=DefaultAsyncHttpxClient(trust_env=False),
    ) as client:
        yield client


async def streamed(stream: Any) -> tuple[list[str], list[str | None], list[Any]]:
    """The texts by choice, the reasons, and all chunks."""
    chunks = [chunk async for chunk in stream]
    texts: dict[int, str] = {}
    reasons: dict[int, str | None] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            piece = choice.delta.content if hasattr(choice, "delta") else choice.text
            assert reasons.get(choice.index) is None, "text after the end"
            texts[choice.index] = texts.get(choice.index, "") + (piece or "")
            reasons[choice.index] = choice.finish_reason
    order = sorted(texts)
    return [texts[index] for index in order], [reasons[index] for index in order], chunks


async def test_chat(client: AsyncOpenAI, fakes: Fakes) -> None:
    fakes.writer.texts = [CHINESE.encode()]
    fakes.writer.cached, fakes.writer.accepted = 7, 3
    reply = await client.chat.completions.create(model=MODEL, messages=USER)
    (choice,) = reply.choices
    assert choice.message.content == CHINESE
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "stop"
    assert reply.object == "chat.completion"
    assert reply.model == MODEL
    prompt = "<user>Hello?\n<assistant>"
    assert fakes.writer.requests[0].input_ids == b"".join(
        byte.to_bytes(4, "little") for byte in prompt.encode()
    )
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == len(prompt)
    assert reply.usage.completion_tokens == len(CHINESE.encode()) + 1
    assert reply.usage.total_tokens == len(prompt) + len(CHINESE.encode()) + 1
    assert reply.usage.prompt_tokens_details is not None
    assert reply.usage.prompt_tokens_details.cached_tokens == 7
    assert reply.usage.completion_tokens_details is not None
    assert reply.usage.completion_tokens_details.accepted_prediction_tokens == 3


@pytest.mark.parametrize("chunk", [1, 2, 5])
async def test_chat_streams_whole_characters(client: AsyncOpenAI, fakes: Fakes, chunk: int) -> None:
    fakes.writer.texts = [CHINESE.encode()]
    fakes.writer.chunk = chunk
    fakes.pace_writer()
    stream = await client.chat.completions.create(
        model=MODEL, messages=USER, stream=True, stream_options={"include_usage": True}
    )
    texts, reasons, chunks = await streamed(stream)
    assert texts == [CHINESE]
    assert reasons == ["stop"]
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content for chunk in chunks[1:-2]]
    assert len(pieces) > 3
    assert all(piece and "\ufffd" not in piece for piece in pieces)
    assert chunks[-2].choices[0].delta.content is None
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len(CHINESE.encode()) + 1
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


async def test_garbage_comes_out_as_replacement_characters(
    client: AsyncOpenAI, fakes: Fakes
) -> None:
    fakes.writer.texts = ["北".encode()[:2]]
    reply = await client.chat.completions.create(model=MODEL, messages=USER)
    assert reply.choices[0].message.content == "\ufffd"


async def test_raw_stream_is_as_documented(writer_gateway: Gateway, fakes: Fakes) -> None:
    document = (await writer_gateway.http.get("/openapi.json")).json()
    for path, body, schema in (
        (
            "chat/completions",
            {"messages": USER, "logprobs": True, "top_logprobs": 2},
            "ChatCompletionChunk",
        ),
        ("completions", {"prompt": "x", "logprobs": 1, "max_tokens": 3}, "Completion"),
    ):
        whole = await writer_gateway.http.post(f"/v1/{path}", json=body)
        name = "ChatCompletion" if path.startswith("chat") else "Completion"
        validator(document, name).validate(whole.json())
        options = {"stream": True, "stream_options": {"include_usage": True}}
        response = await writer_gateway.http.post(f"/v1/{path}", json={**body, **options})
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        events = response.text.split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        for event in events[:-2]:
            assert event.startswith("data: ")
            validator(document, schema).validate(json.loads(event[6:]))


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ("world", "Hello, "),
        (["xyz", ", w"], "Hello"),
        ("Hello, world. And", "Hello, world."),
        ("H", ""),
        (["wordy", "worldly", "d."], "Hello, worl"),
    ],
)
@pytest.mark.parametrize("chunk", [1, 3])
async def test_stop_strings_over_token_borders(
    client: AsyncOpenAI, fakes: Fakes, stop: Any, expected: str, chunk: int
) -> None:
    fakes.writer.chunk = chunk
    for streaming in (False, True):
        reply: Any = await client.chat.completions.create(
            model=MODEL, messages=USER, stop=stop, stream=streaming
        )
        if streaming:
            texts, reasons, _ = await streamed(reply)
        else:
            texts = [reply.choices[0].message.content]
            reasons = [reply.choices[0].finish_reason]
        assert texts == [expected]
        assert reasons == ["stop"]


async def test_a_stop_string_ends_the_work_at_once(client: AsyncOpenAI, fakes: Fakes) -> None:
    fakes.writer.texts = [b"One. Two." + b" and so on" * 500]
    fakes.pace_writer()
    reply = await client.completions.create(model=MODEL, prompt="x", stop=".", max_tokens=4000)
    assert reply.choices[0].text == "One"
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 4
    await until(lambda: not fakes.writer.running)
    assert fakes.writer.cancelled == 1
    assert fakes.writer.written < 20


async def test_n_texts(client: AsyncOpenAI, fakes: Fakes) -> None:
    fakes.writer.texts = [b"first", "第二".encode(), b"the third, which is longer"]
    reply = await client.chat.completions.create(model=MODEL, messages=USER, n=3)
    assert [choice.message.content for choice in reply.choices] == [
        "first",
        "第二",
        "the third, which is longer",
    ]
    stream = await client.chat.completions.create(
        model=MODEL, messages=USER, n=3, stream=True, stop="ng"
    )
    texts, reasons, _ = await streamed(stream)
    assert texts == ["first", "第二", "the third, which is lo"]
    assert reasons == ["stop"] * 3


async def test_completions_of_texts_and_tokens(client: AsyncOpenAI, fakes: Fakes) -> None:
    for prompt, count in (
        ("one", 1),
        (["one", "two"], 2),
        ([111, 110, 101], 1),
        ([[111, 110, 101], [116, 119, 111]], 2),
    ):
        fakes.writer.reset()
        reply: Any = await client.completions.create(model=MODEL, prompt=prompt, max_tokens=5)
        assert [choice.text for choice in reply.choices] == ["Hello"] * count
        assert [choice.finish_reason for choice in reply.choices] == ["length"] * count
        assert [choice.index for choice in reply.choices] == list(range(count))
        sent = sorted(bytes(request.input_ids[::4]) for request in fakes.writer.requests)
        assert sent == [b"one", b"two"][:count]
        assert reply.usage.completion_tokens == 5 * count
        assert reply.usage.prompt_tokens == 3 * count


async def test_completions_default_to_16_tokens_and_echo(client: AsyncOpenAI, fakes: Fakes) -> None:
    fakes.writer.texts = [b"x" * 40]
    reply = await client.completions.create(model=MODEL, prompt="A: ", echo=True)
    assert reply.choices[0].text == "A: " + "x" * 16
    tokens = await client.completions.create(model=MODEL, prompt=[65, 58], echo=True, n=2)
    assert [choice.text for choice in tokens.choices] == ["A:" + "x" * 16] * 2
    stream = await client.completions.create(
        model=MODEL, prompt=["A: ", "B: "], echo=True, stream=True
    )
    texts, reasons, _ = await streamed(stream)
    assert texts == ["A: " + "x" * 16, "B: " + "x" * 16]
    assert reasons == ["length", "length"]


async def test_logprobs(client: AsyncOpenAI, fakes: Fakes) -> None:
    fakes.writer.texts = ["a北b".encode()]
    reply = await client.chat.completions.create(
        model=MODEL, messages=USER, logprobs=True, top_logprobs=2
    )
    assert reply.choices[0].logprobs is not None
    content = reply.choices[0].logprobs.content
    assert content is not None
    assert b"".join(bytes(token.bytes or []) for token in content) == "a北b".encode()
    assert [token.logprob for token in content] == [-0.25] * 5
    assert [top.token for top in content[0].top_logprobs] == ["a", "a"]
    assert [top.logprob for top in content[0].top_logprobs] == [-0.25, -1.25]
    assert fakes.writer.requests[0].sampling.logprobs == 2
    texts = await client.completions.create(model=MODEL, prompt="x", logprobs=1, stop="b")
    logprobs = texts.choices[0].logprobs
    assert texts.choices[0].text == "a北"
    assert logprobs is not None
    assert logprobs.tokens == ["a", "bytes:\\xe5", "bytes:\\x8c", "bytes:\\x97"]
    assert logprobs.text_offset == [0, 1, 1, 1]
    assert logprobs.top_logprobs == [{token: -0.25} for token in logprobs.tokens]
    stream = await client.completions.create(model=MODEL, prompt="x", logprobs=0, stream=True)
    told = [
        (choice.text, choice.logprobs.tokens)
        async for chunk in stream
        for choice in chunk.choices
        if choice.logprobs is not None
    ]
    # However the steps fall into chunks, a chunk's tokens are those of its text.
    for text, tokens in told:
        assert tokens is not None
        assert b"".join(spelt(token) for token in tokens) == text.encode()
    assert "".join(text for text, _ in told) == "a北b"


def spelt(token: str) -> bytes:
    """The bytes that a token of /v1/completions stands for."""
    if token.startswith("bytes:"):
        return bytes.fromhex(token.removeprefix("bytes:").replace("\\x", ""))
    return token.encode()


async def test_parameters_reach_the_shards(client: AsyncOpenAI, fakes: Fakes) -> None:
    await client.chat.completions.create(
        model=MODEL,
        messages=USER,
        max_completion_tokens=9,
        temperature=0.5,
        top_p=0.25,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={"65": -100},
        seed=42,
        n=2,
        user="someone",
        store=True,
        metadata={"a": "b"},
        service_tier="auto",
        extra_body={"top_k": 7, "min_p": 0.125, "repetition_penalty": 1.5, "draft_tokens": 0},
    )
    (request,) = fakes.writer.requests
    assert request.sampling == shard_pb.SamplingParams(
        temperature=0.5,
        top_k=7,
        top_p=0.25,
        min_p=0.125,
        repetition_penalty=1.5,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        seed=42,
        logit_bias={65: -100},
    )
    assert (request.max_tokens, request.n, list(request.stop_token_ids)) == (9, 2, [256])
    assert request.draft_tokens == 0
    remaining = fakes.writer.remaining[0]
    assert remaining is not None
    assert 100 < remaining <= 120
    # What the model's makers advise holds where the caller says nothing; else OpenAI's.
    await client.chat.completions.create(model=MODEL, messages=USER)
    sampling = fakes.writer.requests[1].sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (1.0, 20, 1.0)
    assert not fakes.writer.requests[1].HasField("draft_tokens")
    await client.chat.completions.create(
        model=MODEL, messages=USER, extra_body={"ignore_eos": True}
    )
    assert not fakes.writer.requests[2].stop_token_ids


async def test_structured_output(client: AsyncOpenAI, fakes: Fakes) -> None:
    schema = {"type": "object", "properties": {"name": {"type": "string"}}}
    formats: list[Any] = [
        {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}},
        {"type": "json_object"},
        {"type": "text"},
    ]
    for response_format in formats:
        await client.chat.completions.create(
            model=MODEL, messages=USER, response_format=response_format
        )
    sent = [request.sampling.json_schema for request in fakes.writer.requests]
    assert json.loads(sent[0]) == schema
    assert json.loads(sent[1]) == {"type": "object"}
    assert sent[2] == ""


async def test_what_the_template_gets(client: AsyncOpenAI, fakes: Fakes) -> None:
    tools: Any = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"a":1}'}}
    messages: Any = [
        {"role": "system", "content": "Be kind."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "How is "}, {"type": "text", "text": "it?"}],
        },
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "rain", "tool_call_id": "1"},
    ]
    await client.chat.completions.create(
        model=MODEL,
        messages=messages,
        tools=tools,
        tool_choice="auto",
        extra_body={"chat_template_kwargs": {"enable_thinking": False}},
    )
    chat = fakes.generator_tokenizer.asked[0].chat
    assert [message.content for message in chat.messages] == ["Be kind.", "How is it?", "", "rain"]
    assert json.loads(chat.messages[2].more_json)["tool_calls"][0]["function"] == {
        "name": "weather",
        "arguments": {"a": 1},
    }
    assert json.loads(chat.messages[3].more_json) == {"tool_call_id": "1"}
    assert json.loads(chat.tools_json) == tools
    assert json.loads(chat.variables_json) == {"enable_thinking": False}
    await client.chat.completions.create(
        model=MODEL, messages=USER, tools=tools, tool_choice="none"
    )
    assert fakes.generator_tokenizer.asked[1].chat.tools_json == ""


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


async def test_models(client: AsyncOpenAI, writer_gateway: Gateway, fakes: Fakes) -> None:
    models = [model async for model in client.models.list()]
    assert [model.id for model in models] == ["fake", MODEL]
    assert all(model.object == "model" and model.created > 0 for model in models)
    assert (await client.models.retrieve(MODEL)).id == MODEL
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("gpt-4o")
    kinds = {
        m["name"]: m["kind"] for m in (await writer_gateway.http.get("/v1/models")).json()["models"]
    }
    assert kinds == {"fake": "extractive", MODEL: "generative"}
    view = (await writer_gateway.http.get("/v1/pipeline")).json()
    assert [view["kind"], *(other["kind"] for other in view["others"])] == [
        "extractive",
        "generative",
    ]
    # Questions are answered beside it.
    answer = await writer_gateway.ask("When?", "In 1925.")
    assert answer.json()["answers"][0]["text"] == "1925"


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
