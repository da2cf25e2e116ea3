"""The official `openai` client against a running gateway, over a fake of the shards."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from miaotui.v1 import shard_pb2 as shard_pb
from tests.gateway.conftest import Gateway, until
from tests.gateway.fakes import Fakes
from tests.gateway.openai_client import CHINESE, MODEL, USER, streamed
from tests.gateway.test_contract import validator


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
