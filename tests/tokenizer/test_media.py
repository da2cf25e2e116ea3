"""The tokenizer service for a model that hears: features of files, and what it tells of itself."""

from __future__ import annotations

import io
import random
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import numpy as np
import pytest
import pytest_asyncio
import soundfile
from grpc import aio

from miaotui.media.errors import MediaError
from miaotui.media.features import load_extractor
from miaotui.v1 import shard_pb2 as shard_pb
from miaotui.v1 import tensor_pb2 as tensor_pb
from miaotui.v1 import tokenizer_pb2 as pb
from miaotui.v1.tokenizer_pb2_grpc import TokenizerServiceStub
from services.rpc.channel import open_channel
from tests.media.checkpoints import WINDOW_SECONDS, make_whisper, make_whisper_tokenizer
from tests.tokenizer.conftest import Service

if TYPE_CHECKING:  # the generated module itself has no such class
    from miaotui.v1.tokenizer_pb2_grpc import TokenizerServiceAsyncStub as Stub

RATE = 16_000
CHUNKS = -(-5 // WINDOW_SECONDS)


def sound(seconds: float) -> bytes:
    """A WAV file of noise."""
    file = io.BytesIO()
    noise = np.random.default_rng(0).normal(0, 0.1, round(seconds * RATE)).astype(np.float32)
    soundfile.write(file, noise, RATE, format="WAV", subtype="FLOAT")
    return file.getvalue()


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_whisper(tmp_path_factory.mktemp("whisper"), layers=1)


@pytest.fixture(scope="module")
def hearing(whisper: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    log = tmp_path_factory.mktemp("media-log") / "tokenizer.log"
    service = Service(whisper, log, {"MIAOTUI_TOKENIZER_MAX_FILE_BYTES": "1000000"})
    service.process.start()
    yield service
    assert service.process.stop() == 0


@pytest_asyncio.fixture(scope="module")
async def media_stub(hearing: Service) -> AsyncIterator[Stub]:
    async with open_channel(hearing.target) as channel:
        await hearing.ready(channel)
        yield TokenizerServiceStub(channel)


async def _read(stub: Stub, data: bytes) -> list[pb.ExtractFeaturesResponse]:
    return [window async for window in stub.ExtractFeatures(pb.ExtractFeaturesRequest(file=data))]


async def test_features_are_the_extractors(media_stub: Stub, whisper: Path) -> None:
    data = sound(5.0)
    windows = await _read(media_stub, data)
    assert len(windows) >= CHUNKS
    expected = list(load_extractor(whisper, "audio").extract(data))
    for window, made in zip(windows, expected, strict=True):
        header = window.features.header
        assert header.dtype == tensor_pb.DTYPE_FLOAT32
        values = np.frombuffer(window.features.data, "<f4").reshape(tuple(header.shape))
        np.testing.assert_array_equal(values, made.values)
        assert (window.start_seconds, window.end_seconds) == (made.start_seconds, made.end_seconds)


async def test_what_it_tells_of_itself(media_stub: Stub) -> None:
    told = await media_stub.Describe(pb.TokenizerServiceDescribeRequest())
    reference = make_whisper_tokenizer()
    assert told.kind == shard_pb.MODEL_KIND_GENERATIVE
    assert told.media.modality == shard_pb.INPUT_MODALITY_AUDIO
    assert told.media.window_seconds == WINDOW_SECONDS
    assert told.media.max_file_bytes == 1_000_000
    assert {one.code: one.token_id for one in told.media.languages} == {
        code: reference.convert_tokens_to_ids(f"<|{code}|>") for code in ("en", "zh", "de")
    }
    assert told.sampling.HasField("temperature")
    assert told.sampling.temperature == 0


async def test_beginnings(media_stub: Stub) -> None:
    reference = make_whisper_tokenizer()
    begun = await media_stub.EncodePrompt(
        pb.EncodePromptRequest(media=pb.MediaPrompt(language="de", previous="Hallo"))
    )
    names = ("startoftranscript", "de", "transcribe", "notimestamps")
    expected = [
        *reference.get_prompt_ids("Hallo").tolist(),
        *(reference.convert_tokens_to_ids(f"<|{name}|>") for name in names),
    ]
    assert np.frombuffer(begun.input_ids, "<i4").tolist() == expected
    for wrong, code in (
        (pb.EncodePromptRequest(text="x"), grpc.StatusCode.FAILED_PRECONDITION),
        (pb.EncodePromptRequest(media=pb.MediaPrompt()), grpc.StatusCode.INVALID_ARGUMENT),
    ):
        with pytest.raises(aio.AioRpcError) as refused:
            await media_stub.EncodePrompt(wrong)
        assert refused.value.code() is code


@pytest.mark.parametrize(
    ("data", "problem"),
    [(b"", "empty"), (b"no sound", "known kind"), (bytes(1_000_001), "more than 1000000 bytes")],
)
async def test_files_that_are_refused(media_stub: Stub, data: bytes, problem: str) -> None:
    with pytest.raises(aio.AioRpcError, match=problem) as refused:
        await _read(media_stub, data)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert str(refused.value.details()).startswith("file: ")


def broken_mp3s(count: int) -> list[bytes]:
    """MP3s with some bytes changed, always the same."""
    file = io.BytesIO()
    tone = np.sin(np.arange(RATE) / 20).astype(np.float32)
    soundfile.write(file, tone, RATE, format="MP3", subtype="MPEG_LAYER_III")
    chance, files = random.Random(0), []
    for _ in range(count):
        broken = bytearray(file.getvalue())
        for place in chance.sample(range(len(broken)), 40):
            broken[place] = chance.randrange(256)
        files.append(bytes(broken))
    return files


async def test_nothing_of_a_broken_file_is_in_the_log(
    media_stub: Stub, hearing: Service, whisper: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    extractor, files = load_extractor(whisper, "audio"), broken_mp3s(20)
    for data in files:
        with suppress(MediaError):
            list(extractor.extract(data))
    told = capfd.readouterr().err
    assert "Illegal Audio-MPEG-Header 0x" in told, "the decoder has nothing to complain of"
    for data in files:
        with suppress(aio.AioRpcError):
            await _read(media_stub, data)
    # Whatever a library says, in lines of its own.
    record = re.compile(r"\d{4}-\d\d-\d\d [\d:,]+ [A-Z]+ +tokenizer ")
    lines = hearing.process.log.splitlines()
    assert lines
    assert [line for line in lines if not record.match(line)] == []


async def test_a_model_that_reads_text_only_takes_no_file(stub: Stub, channel: aio.Channel) -> None:
    with pytest.raises(aio.AioRpcError, match="reads text only") as refused:
        await _read(stub, sound(0.1))
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
