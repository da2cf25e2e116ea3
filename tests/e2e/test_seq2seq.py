"""A Whisper over two shard services: texts about many sounds at once, and what is refused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc import aio

from miaotui.v1 import shard_pb2 as pb
from miaotui.v1 import tensor_pb2
from tests.e2e.generating import Client, Prompt, client_of, until_free
from tests.processes import Cluster
from tests.seq2seq_checkpoints import generate_about, make_seq2seq, random_source

TOKENS = 40
PROMPTS = [Prompt((1, 40 + index, 50)[: 1 + index % 3], TOKENS, stops=(2,)) for index in range(12)]
# Blocks of 16 tokens: 2 a source, up to 3 a text. So few that the others wait for two.
BLOCKS = 7


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_seq2seq(tmp_path_factory.mktemp("whisper"), "whisper")


@pytest.fixture(scope="module")
async def cluster(model: Path) -> AsyncIterator[Cluster]:
    # Encoder and one decoder layer, two decoder layers: keys and values of 32 floats a layer.
    layer_bytes = BLOCKS * 16 * 2 * 32 * 4
    async with Cluster(
        model,
        stages=2,
        layers="0-3,3-5",
        only_shards=True,
        stage_env={
            index: {"MIAOTUI_SHARD_KV_CACHE_BYTES": str((1 + index) * layer_bytes)}
            for index in range(2)
        },
    ) as cluster:
        yield cluster


@pytest.fixture
async def client(cluster: Cluster) -> AsyncIterator[Client]:
    async with client_of(cluster) as client:
        yield client


def features(seed: int) -> pb.Features:
    source = random_source("whisper", seed)
    header = tensor_pb2.TensorHeader(dtype=tensor_pb2.DTYPE_FLOAT32, shape=source.shape)
    return pb.Features(header=header, data=source.tobytes())


async def test_many_sounds_at_once(cluster: Cluster, client: Client, model: Path) -> None:
    """All equal to `generate`, though the KV cache has room for few of them at once."""
    expected = [
        generate_about(model, "whisper", seed, prompt.ids, TOKENS)
        for seed, prompt in enumerate(PROMPTS)
    ]
    assert len({tuple(text) for text in expected}) > 8
    assert max(map(len, expected)) > 32
    asks = [
        (client.plain if seed % 2 else client.streamed)(
            prompt.request(f"r{seed}", features=features(seed))
        )
        for seed, prompt in enumerate(PROMPTS)
    ]
    written = await asyncio.gather(*asks)
    for text, wanted in zip(written, expected, strict=True):
        assert [token for token in text.tokens if token != 2] == wanted
        stopped = text.tokens[-1] == 2
        assert text.finish == (pb.FINISH_REASON_STOP if stopped else pb.FINISH_REASON_LENGTH)
        assert text.usage is not None
        assert text.usage.cached_tokens == 0
    await until_free(cluster)


async def test_stages_tell_what_they_listen_to(cluster: Cluster) -> None:
    for index in range(2):
        told = (await cluster.describe(index)).stage
        assert told.kind == pb.MODEL_KIND_GENERATIVE
        assert told.input_modality == pb.INPUT_MODALITY_AUDIO
        assert list(told.input_shape) == [6, 40]
        assert (told.encoder_layers, told.source_rows, told.model_layers) == (2, 20, 5)
        assert told.kv_blocks == BLOCKS


async def test_a_bias_picks_among_a_few_tokens(client: Client) -> None:
    """As a language is found: one step, all but its tokens out of reach."""
    picked = []
    for seed in range(6):
        sampling = pb.SamplingParams(logit_bias=dict.fromkeys(range(20, 28), 1000.0))
        request = Prompt((1,), 1).request(features=features(seed), sampling=sampling)
        picked += (await client.streamed(request)).tokens
    assert set(picked) <= set(range(20, 28))
    assert len(set(picked)) > 1


def _wrong(**changes: Any) -> pb.Features:
    made = features(0)
    for field, value in changes.items():
        if field == "shape":
            made.header.shape[:] = value
        elif field == "dtype":
            made.header.dtype = value
        else:
            made.data = value
    return made


async def test_refusals_say_what_is_expected(client: Client) -> None:
    bad = np.full((6, 40), np.nan, np.float32).tobytes()
    for given, message in (
        (None, "features: none; this model writes about float32 features of shape [6, 40]"),
        (_wrong(shape=[40, 6]), "this model takes float32 of shape [6, 40]"),
        (_wrong(shape=[6, 41]), "float32 of shape [6, 41] has 984"),
        (_wrong(dtype=tensor_pb2.DTYPE_FLOAT16), "must be DTYPE_FLOAT32"),
        (_wrong(data=bad), "not finite"),
    ):
        with pytest.raises(aio.AioRpcError) as caught:
            await client.streamed(PROMPTS[0].request(features=given))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        details = caught.value.details() or ""
        assert details.startswith("features")
        assert message in details
