"""The Compose file's models that hear and see, as processes with its commands and settings."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest

from tests.checkpoints import one_thread
from tests.deploy.stack import Stack
from tests.e2e.collector import Collector
from tests.media.checkpoints import make_captioner, make_whisper
from tests.media.reference import heard, noise, seen, speckles
from tests.processes import START_SECONDS

MODELS = ("transcriber", "captioner")
SERVICES = tuple(f"{model}-{part}" for model in MODELS for part in ("tokenizer", "0", "1"))


@dataclass(frozen=True)
class Media:
    """What runs, and the directories of its models."""

    stack: Stack
    directories: dict[str, Path]


@pytest.fixture(scope="module")
async def media(
    tmp_path_factory: pytest.TempPathFactory, collector: Collector
) -> AsyncIterator[Media]:
    """Both models behind one gateway, with the profiles `transcribe` and `caption`; the services
    of the model that answers are away."""
    directory = tmp_path_factory.mktemp("media-stack")
    directories = {
        "transcriber": make_whisper(directory / "transcriber"),
        "captioner": make_captioner(directory / "captioner"),
    }
    stack = Stack(
        directory,
        Path("none"),
        collector.address,
        services=(*SERVICES, "gateway"),
        beside=directories,
    )
    try:
        await stack.start()
        await _serving(stack)
        yield Media(stack, directories)
    finally:
        await stack.stop()


async def _serving(stack: Stack) -> None:
    """Waits until the gateway misses nothing but the model that answers."""
    deadline = time.monotonic() + START_SECONDS
    state = "the gateway does not answer"
    async with httpx.AsyncClient(trust_env=False, timeout=60.0) as client:
        while time.monotonic() < deadline:
            for process in stack.processes.values():
                assert process.alive, process.tail()
            try:
                response = await client.get(f"{stack.url}/readyz")
                assert response.status_code == 503, "nobody serves the model that answers"
                state = response.json()["detail"]
                if not any(role in state for role in ("transcribing:", "captioning:")):
                    assert state.startswith("extractive:")
                    return
            except httpx.TransportError as error:
                state = str(error)
            await asyncio.sleep(0.1)
    logs = "\n".join(process.tail() for process in stack.processes.values())
    raise AssertionError(f"not serving: {state}\n{logs}")


def _client(media: Media) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{media.stack.url}/v1", api_key="none", max_retries=0)


async def test_a_recording_is_written_down(media: Media) -> None:
    sound = noise(3.1, 1)
    with one_thread():
        expected = heard(media.directories["transcriber"], sound, "de")
    assert len(set(expected)) == 2, "the texts must depend on the sound"
    async with _client(media) as client:
        told = await client.audio.transcriptions.create(
            file=("sound.flac", sound),
            model="transcriber",
            language="de",
            response_format="verbose_json",
        )
    assert [segment.text for segment in told.segments or ()] == expected


async def test_a_picture_is_described(media: Media) -> None:
    captions = []
    for seed in (1, 3):
        picture = speckles(seed)
        with one_thread():
            captions.append(seen(media.directories["captioner"], picture))
        url = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
        async with _client(media) as client:
            told = await client.chat.completions.create(
                model="captioner",
                messages=[
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}
                ],
            )
        assert told.choices[0].message.content == captions[-1]
    assert captions[0] != captions[1], "the texts must depend on the picture"


@pytest.mark.parametrize("service", SERVICES)
async def test_the_health_checks_work(media: Media, service: str) -> None:
    done = await asyncio.to_thread(media.stack.check, service)
    assert done.returncode == 0, done.stderr


async def test_a_health_check_fails_where_the_service_is_away(media: Media) -> None:
    """The model that answers does not run here: its check, as the container has it."""
    for service in ("tokenizer", "shard-0"):
        done = await asyncio.to_thread(media.stack.check, service)
        assert done.returncode != 0, service


@pytest.mark.parametrize("model", MODELS)
async def test_prometheus_finds_the_stages(media: Media, model: str) -> None:
    for stage in ("0", "1"):
        told = await asyncio.to_thread(media.stack.metrics, f"{model}-{stage}")
        assert any(line.startswith("miaotui_stage_") for line in told.splitlines()), told
