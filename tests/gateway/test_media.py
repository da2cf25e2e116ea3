"""Sound and pictures at the gateway, over fakes: a token is a byte, and "|" ends a window."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import openai
import pytest

from gateway.http.openapi import openapi_document
from gateway.media.subtitles import srt, vtt
from gateway.media.transcriber import Segment, joined
from gateway.settings import GatewaySettings
from miaotui.client import AsyncClient, MiaotuiError
from tests.deploy.boards import expressions
from tests.deploy.metrics import SCRAPED, exported, uses
from tests.gateway.conftest import Gateway, run_gateway, start_gateway
from tests.gateway.fakes import Fakes
from tests.gateway.test_contract import validator

ALL = "generative transcribing captioning"


@pytest.fixture(scope="module")
async def media_gateway(
    all_fakes: Fakes, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Gateway]:
    """A gateway with models that write, hear and see."""
    directory = tmp_path_factory.mktemp("media-gateway")
    async with run_gateway(
        all_fakes,
        directory,
        models=ALL,
        MAX_SOUND_BYTES="200000",
        MAX_PICTURE_BYTES="3000",
        MAX_BODY_BYTES="4000",
    ) as running:
        yield running


async def transcribe(gateway: Gateway, data: bytes, **fields: str) -> Any:
    """POST /v1/audio/transcriptions."""
    files = {"file": ("sound.wav", data)}
    return await gateway.http.post("/v1/audio/transcriptions", files=files, data=fields)


def picture(data: bytes = b"a picture", kind: str = "image/png") -> dict[str, Any]:
    """An image part."""
    url = f"data:{kind};base64,{base64.b64encode(data).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def body(*parts: Any, **fields: Any) -> dict[str, Any]:
    """A chat whose only message has these parts."""
    return {"messages": [{"role": "user", "content": list(parts)}], **fields}


async def test_windows_become_one_text(media_gateway: Gateway, fakes: Fakes) -> None:
    client = openai.AsyncOpenAI(base_url=f"{media_gateway.url}/v1", api_key="none")
    async with client:
        told = await client.audio.transcriptions.create(
            file=("sound.mp3", b" Good | morning."), model="fake-hearer", language="English"
        )
    assert told.text == "Good morning."
    prompts = [asked.media for asked in fakes.transcriber_tokenizer.asked]
    assert [prompt.language for prompt in prompts] == ["en", "en"]
    requests = fakes.transcriber_shard.writer.requests
    assert sorted(request.features.data for request in requests) == [b" Good ", b" morning."]
    assert all(request.sampling.temperature == 0 for request in requests)
    assert all(list(request.stop_token_ids) == [256] for request in requests)


async def test_the_language_is_found_out_once(media_gateway: Gateway, fakes: Fakes) -> None:
    response = await transcribe(
        media_gateway, "早上好。|大家好！".encode(), response_format="verbose_json"
    )
    assert response.status_code == 200
    told = response.json()
    validator((await media_gateway.http.get("/openapi.json")).json(), "Transcript").validate(told)
    assert told["text"] == "早上好。大家好！"
    assert (told["task"], told["language"], told["duration"]) == ("transcribe", "chinese", 58.5)
    assert [(one["start"], one["end"]) for one in told["segments"]] == [(0, 28.5), (30, 58.5)]
    assert [one["text"] for one in told["segments"]] == ["早上好。", "大家好！"]
    assert all(one["avg_logprob"] == -0.25 for one in told["segments"])
    detecting, *writing = fakes.transcriber_tokenizer.asked
    assert detecting.media.detect
    assert [asked.media.language for asked in writing] == ["zh", "zh"]
    first = fakes.transcriber_shard.writer.requests[0]
    assert (first.max_tokens, set(first.sampling.logit_bias)) == (1, {257, 258})


async def test_fields_reach_the_model(media_gateway: Gateway, fakes: Fakes) -> None:
    files = {"file": ("sound.wav", b"Hallo")}
    fields = {"language": "zh-CN", "prompt": "长江", "temperature": "0.5"}
    response = await media_gateway.http.post("/v1/audio/translations", files=files, data=fields)
    assert response.json()["text"] == "Hallo"
    (asked,) = fakes.transcriber_tokenizer.asked
    assert (asked.media.language, asked.media.translate) == ("zh", True)
    assert asked.media.previous == "长江"
    assert fakes.transcriber_shard.writer.requests[0].sampling.temperature == 0.5


@pytest.mark.parametrize(
    ("form", "kind", "expected"),
    [
        ("text", "text/plain", "one two\n"),
        ("srt", "application/x-subrip", "1\n00:00:00,000 --> 00:00:28,500\none\n"),
        ("vtt", "text/vtt", "WEBVTT\n\n00:00:00.000 --> 00:00:28.500\none\n"),
    ],
)
async def test_other_forms(
    media_gateway: Gateway, fakes: Fakes, form: str, kind: str, expected: str
) -> None:
    response = await transcribe(media_gateway, b"one|two", language="en", response_format=form)
    assert response.headers["content-type"].startswith(kind)
    assert response.text.startswith(expected)


async def test_a_stream_tells_of_each_window(media_gateway: Gateway, fakes: Fakes) -> None:
    client = openai.AsyncOpenAI(base_url=f"{media_gateway.url}/v1", api_key="none")
    async with client:
        stream = await client.audio.transcriptions.create(
            file=("sound.mp3", b"one|two|three"), model="fake-hearer", stream=True
        )
        events = [event async for event in stream]
    pieces = [event.delta for event in events if event.type == "transcript.text.delta"]
    assert pieces == ["one", " two", " three"]
    assert events[-1].type == "transcript.text.done"
    assert events[-1].text == "one two three"
    broken = await transcribe(media_gateway, b"one|broken", language="en", stream="true")
    last = broken.text.strip().split("\n\n")[-1].removeprefix("data: ")
    assert json.loads(last)["error"]["param"] == "file"


@pytest.mark.parametrize(
    ("data", "fields", "status", "told"),
    [
        (b"broken", {}, 400, "/file: is broken"),
        (b"x", {"language": "fr"}, 400, "/language: must be one of en, zh"),
        (b"x", {"response_format": "html"}, 400, "/response_format"),
        (b"x", {"temperature": "2"}, 400, "/temperature"),
        (b"x", {"stream": "true", "response_format": "srt"}, 400, "/stream"),
        (b"x", {"timestamp_granularities[]": "word"}, 400, "/timestamp_granularities"),
        (b"x", {"surprise": "1"}, 400, "unknown field"),
        (b"x", {"model": "fake-writer"}, 404, "/model"),
        (b"x" * 100_001, {}, 400, "more than 100000 bytes"),
        (b"x" * 200_001, {}, 400, "more than 200000 bytes"),
        (b"x" * 400_000, {}, 413, "The body has more than"),
    ],
)
async def test_what_is_refused(
    media_gateway: Gateway,
    fakes: Fakes,
    data: bytes,
    fields: dict[str, str],
    status: int,
    told: str,
) -> None:
    response = await transcribe(media_gateway, data, **fields)
    assert response.status_code == status
    document = (await media_gateway.http.get("/openapi.json")).json()
    validator(document, "OpenAiError").validate(response.json())
    assert told in json.dumps(response.json())
    assert not fakes.transcriber_shard.writer.requests


async def test_forms_that_are_none(media_gateway: Gateway, fakes: Fakes) -> None:
    path = "/v1/audio/transcriptions"
    as_json = await media_gateway.http.post(path, json={"file": "x"})
    assert as_json.status_code == 415
    empty = await media_gateway.http.post(path, files={"other": b"x"})
    assert empty.json()["error"]["param"] == "file"
    no_file = await media_gateway.http.post(path, files={"file": (None, b"x")})
    assert no_file.status_code == 400
    headers = {"content-type": "multipart/form-data; boundary=a"}
    cut = await media_gateway.http.post(path, content=b"--a\r\nrubbish", headers=headers)
    assert cut.status_code == 400


async def test_a_tokenizer_that_is_away_is_asked_again(
    media_gateway: Gateway, fakes: Fakes
) -> None:
    fakes.transcriber_tokenizer.file_codes = [grpc.StatusCode.UNAVAILABLE]
    response = await transcribe(media_gateway, b"again", language="en")
    assert response.json()["text"] == "again"
    fakes.transcriber_tokenizer.file_codes = [grpc.StatusCode.RESOURCE_EXHAUSTED]
    assert (await transcribe(media_gateway, b"full", language="en")).status_code == 429


async def test_a_picture_is_described(media_gateway: Gateway, fakes: Fakes) -> None:
    client = openai.AsyncOpenAI(base_url=f"{media_gateway.url}/v1", api_key="none")
    text = {"type": "text", "text": "What is this?"}
    async with client:
        chat: Any = body(text, picture(), model="fake-seer")
        told = await client.chat.completions.create(**chat)
        assert told.choices[0].message.content == "a picture"
        assert told.model == "fake-seer"
        stream = await client.chat.completions.create(**chat, stream=True)
        pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert "".join(pieces) == "a picture"
    request = fakes.captioner_shard.writer.requests[0]
    assert request.features.data == b"a picture"
    assert (request.max_tokens, request.sampling.temperature) == (40, 0)
    assert not fakes.writer.requests


async def test_a_chat_goes_on_after_a_picture(media_gateway: Gateway, fakes: Fakes) -> None:
    messages = [
        {"role": "user", "content": [picture()]},
        {"role": "assistant", "content": "a cat"},
        {"role": "user", "content": "Which breed?"},
    ]
    response = await media_gateway.http.post("/v1/chat/completions", json={"messages": messages})
    assert response.json()["model"] == "fake-writer"
    assert not fakes.captioner_shard.writer.requests


REMOTE = {"type": "image_url", "image_url": {"url": "https://example.org/cat.png"}}


@pytest.mark.parametrize(
    ("parts", "fields", "told"),
    [
        ((REMOTE,), {}, "nothing is downloaded"),
        ((picture(), picture()), {}, "only picture"),
        ((picture(b"x" * 3001),), {}, "at most 3000 bytes"),
        ((picture(b"broken"),), {}, "is broken"),
        ((picture(),), {"model": "fake-writer"}, "reads text only"),
        (({"type": "text", "text": "Hello"},), {"model": "fake-seer"}, "must hold a picture"),
        (({"type": "image_url", "image_url": 3},), {}, "image_url"),
        (
            ({"type": "image_url", "image_url": {"url": "data:image/png;base64,*"}},),
            {},
            "base64",
        ),
    ],
)
async def test_pictures_that_are_refused(
    media_gateway: Gateway, fakes: Fakes, parts: Any, fields: dict[str, str], told: str
) -> None:
    response = await media_gateway.http.post("/v1/chat/completions", json=body(*parts, **fields))
    assert response.status_code == 400
    assert told in response.json()["error"]["message"]


async def test_a_model_that_reads_text_only_is_shown_no_picture(
    writer_gateway: Gateway, fakes: Fakes
) -> None:
    response = await writer_gateway.http.post("/v1/chat/completions", json=body(picture()))
    assert response.status_code == 400
    assert "reads text only" in response.json()["error"]["message"]
    assert response.json()["error"]["param"] == "messages[0].content[0]"
    heard = await transcribe(writer_gateway, b"x")
    assert heard.status_code == 404
    assert "MIAOTUI_GATEWAY_TRANSCRIBER_TOKENIZER" in heard.json()["error"]["message"]


async def test_figures_tell_the_models_apart(media_gateway: Gateway, fakes: Fakes) -> None:
    total = "miaotui_gateway_generations_total"
    written = "miaotui_gateway_generation_tokens_total"
    first = "miaotui_gateway_generation_first_text_seconds_count"

    async def figures() -> list[list[float]]:
        metric = media_gateway.metric
        return [
            [
                await metric(total, model=model, outcome="ok"),
                await metric(written, model=model, kind="written"),
                await metric(first, model=model),
            ]
            for model in ALL.split()
        ]

    before = await figures()
    url, asked = "/v1/chat/completions", body({"type": "text", "text": "Hello?"}, no_cache=True)
    chat = await media_gateway.http.post(url, json=asked)
    heard = await transcribe(media_gateway, b"some|figures", language="en")
    asked = body(picture(b"ninechars"), no_cache=True)
    seen = await media_gateway.http.post(url, json=asked)
    assert [one.status_code for one in (chat, heard, seen)] == [200] * 3
    grown = [
        [after - then for after, then in zip(*both, strict=True)]
        for both in zip(await figures(), before, strict=True)
    ]
    # A token a byte, and one that ends a text.
    assert grown == [[1, len("Hello, world.") + 1, 1], [2, 5 + 8, 2], [1, 10, 1]]


async def test_the_dashboards_use_labels_that_texts_figures_have(
    media_gateway: Gateway, fakes: Fakes
) -> None:
    await transcribe(media_gateway, b"one", language="en")
    told = exported((await media_gateway.http.get("/metrics")).text)
    used = [
        (where, use)
        for where, expression in expressions()
        for use in uses(expression)
        if use.metric.startswith("miaotui_gateway_generation")
    ]
    assert len(used) >= 9
    for where, use in used:
        assert use.labels - told[use.metric] <= SCRAPED, where
        assert "model" in use.labels, where


async def test_models_are_told_with_their_kinds(media_gateway: Gateway, fakes: Fakes) -> None:
    models = (await media_gateway.http.get("/v1/models")).json()
    kinds = {model["name"]: model["kind"] for model in models["models"]}
    assert kinds == {
        "fake-writer": "generative",
        "fake-hearer": "transcribing",
        "fake-seer": "captioning",
    }
    assert {model["id"] for model in models["data"]} == set(kinds)


async def test_an_address_of_another_kind_is_told(all_fakes: Fakes, tmp_path: Any) -> None:
    async with start_gateway(
        all_fakes,
        tmp_path,
        models="generative",
        TRANSCRIBER_TOKENIZER=all_fakes.address("captioner_tokenizer"),
        TRANSCRIBER_SHARD=all_fakes.address("captioner_shard"),
    ) as gateway:
        deadline = time.monotonic() + 60
        while "one that hears sound is called for" not in (
            detail := (await gateway.ready(False)).json()["detail"]
        ):
            assert time.monotonic() < deadline, detail
            await asyncio.sleep(0.1)


async def test_the_client(media_gateway: Gateway, fakes: Fakes) -> None:
    async with AsyncClient(media_gateway.url) as client:
        told = await client.transcribe(b"hello", language="en")
        assert told["text"] == "hello"
        assert await client.transcribe(b"hello", response_format="text") == "hello\n"
        with pytest.raises(MiaotuiError, match="is broken"):
            await client.transcribe(b"broken", translate=True)


def test_subtitles() -> None:
    segments = [
        Segment(0.0, 1.5, "a <b>"),
        Segment(1.5, 2.0, ""),
        Segment(3599.9996, 3601.25, "c\n\nd"),
    ]
    assert srt(segments) == (
        "1\n00:00:00,000 --> 00:00:01,500\na <b>\n\n2\n01:00:00,000 --> 01:00:01,250\nc d\n"
    )
    assert vtt(segments) == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:01.500\na &lt;b&gt;\n\n"
        "01:00:00.000 --> 01:00:01.250\nc d\n"
    )
    assert joined(["Hello", "", "world.", "你好", "再见", "bye"]) == "Hello world.你好再见bye"


def test_the_document_tells_the_limits() -> None:
    document = openapi_document(GatewaySettings(max_sound_bytes=1234))
    post = document["paths"]["/v1/audio/transcriptions"]["post"]
    assert "1234 bytes" in post["description"]
    fields = post["requestBody"]["content"]["multipart/form-data"]["schema"]["properties"]
    assert set(fields) == {
        *("file", "model", "language", "prompt", "response_format", "temperature", "stream"),
        *("timestamp_granularities[]", "chunking_strategy"),
    }
