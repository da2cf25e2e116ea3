"""Vectors of texts from stages in processes of their own, as transformers gives them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from transformers import AutoModel

from miaotui.v1 import shard_pb2 as pb
from miaotui.v1 import shard_pb2_grpc
from services.rpc.channel import open_channel
from tests.e2e.conftest import Checkpoints
from tests.processes import START_SECONDS, Cluster

LAYERS = 3
REQUESTS = 40


@pytest.fixture
def encoder(checkpoint: Checkpoints, tmp_path: Path) -> Path:
    """A BERT without any head."""
    AutoModel.from_pretrained(checkpoint("bert", layers=LAYERS)).save_pretrained(tmp_path)
    return tmp_path


def _expected(directory: Path, requests: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    model = AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return [
            torch.nn.functional.normalize(
                torch.stack([model(ids[None]).last_hidden_state[0].mean(0) for ids in one]), dim=1
            )
            for one in requests
        ]


@pytest.mark.parametrize("stages", [1, 3])
async def test_vectors_of_mixed_lengths_at_once(stages: int, encoder: Path) -> None:
    generator = torch.Generator().manual_seed(stages)
    requests = [
        [
            torch.randint(5, 100, (int(length),), generator=generator)
            for length in torch.randint(1, 120, (1 + number % 4,), generator=generator)
        ]
        for number in range(REQUESTS)
    ]
    shard_env = {"MIAOTUI_SHARD_TASK": "embed"}
    async with Cluster(encoder, stages=stages, only_shards=True, shard_env=shard_env) as cluster:
        for index in range(stages):
            assert (await cluster.describe(index)).stage.kind == pb.MODEL_KIND_EMBEDDING
        async with asyncio.timeout(START_SECONDS):
            while (await cluster.describe(0)).status != pb.STAGE_STATUS_SERVING:
                await asyncio.sleep(0.05)
        async with open_channel(cluster.stage_targets[0]) as channel:
            stub = shard_pb2_grpc.ShardServiceStub(channel)

            async def ask(number: int, one: list[torch.Tensor]) -> pb.InferResponse:
                sequences = [pb.TokenSequence(input_ids=ids.int().numpy().tobytes()) for ids in one]
                request = pb.InferRequest(request_id=str(number), sequences=sequences)
                response: pb.InferResponse = await stub.Infer(request, timeout=60)
                return response

            answers = await asyncio.gather(*(ask(n, one) for n, one in enumerate(requests)))
            with pytest.raises(grpc.RpcError, match="writes no text"):
                await anext(aiter(stub.Generate(pb.GenerateRequest(), timeout=10)))
        if stages > 1:
            batches = (await cluster.describe(0)).batches_total
            assert batches < sum(map(len, requests))
    for answer, expected in zip(answers, _expected(encoder, requests), strict=True):
        assert not answer.logits
        rows = np.stack([np.frombuffer(row, "<f4") for row in answer.embeddings])
        np.testing.assert_allclose(rows, expected.numpy(), atol=1e-5)
