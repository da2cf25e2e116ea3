"""The answers of the split model equal those of the whole one."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from miaotui.v1 import gateway_pb2_grpc, tokenizer_pb2, tokenizer_pb2_grpc
from services.rpc.channel import open_channel
from tests.checkpoints import FAMILIES
from tests.e2e.asking import (
    CONCURRENCY,
    Question,
    ask_grpc,
    ask_http,
    gathered,
    http_client,
    questions,
)
from tests.e2e.conftest import Checkpoints
from tests.e2e.reference import Reference
from tests.processes import Cluster

LAYERS = 3


async def _reference(cluster: Cluster) -> Reference:
    """The whole model, with the windows that the cluster's tokenizer service makes."""
    async with open_channel(cluster.tokenizer_target) as channel:
        stub = tokenizer_pb2_grpc.TokenizerServiceStub(channel)
        told = await stub.Describe(tokenizer_pb2.TokenizerServiceDescribeRequest(), timeout=60)
    return Reference(cluster.model, max_length=told.max_length, stride=told.stride)


async def _compare(cluster: Cluster, asked: Sequence[Question], concurrency: int) -> None:
    """Asks everything, half over HTTP and half over gRPC at the same time, and checks it."""
    half = len(asked) // 2
    async with http_client(cluster.url) as client, open_channel(cluster.grpc_target) as channel:
        stub = gateway_pb2_grpc.GatewayServiceStub(channel)
        over_http, over_grpc = await asyncio.gather(
            gathered(lambda q: ask_http(client, q), asked[:half], concurrency // 2),
            gathered(lambda q: ask_grpc(stub, q), asked[half:], concurrency // 2),
        )
    reference = await _reference(cluster)
    for question, body in zip(asked, [*over_http, *over_grpc], strict=True):
        assert body["model"] == cluster.model.name
        reference.answer(question.question, question.context).check(body, question.top_k)


# Starting all of them takes minutes on two cores, and tests/models compares every family in
# every number of stages within one process: so here every family once, and one in every
# number. MIAOTUI_FULL=1 takes them all.
PAIRS = [
    (family, stages)
    for family in FAMILIES
    for stages in range(1, LAYERS + 1)
    if os.environ.get("MIAOTUI_FULL") == "1" or family == "bert" or stages == LAYERS
]


@pytest.mark.parametrize(("family", "stages"), PAIRS)
async def test_every_family_in_any_number_of_stages(
    family: str, stages: int, checkpoint: Checkpoints
) -> None:
    async with Cluster(checkpoint(family, layers=LAYERS), stages=stages) as cluster:
        await _compare(cluster, questions(24, seed=stages), CONCURRENCY)
        await cluster.idle()
        described = [await cluster.describe(index) for index in range(stages)]
    assert [d.stage.first_layer for d in described[1:]] == [
        d.stage.end_layer for d in described[:-1]
    ]
    assert described[-1].stage.end_layer == LAYERS
    # Every stage has computed every window, in batches that hold more than one.
    assert len({d.sequences_total for d in described}) == 1
    assert described[0].sequences_total >= 24


async def test_a_thousand_requests_over_three_stages(checkpoint: Checkpoints) -> None:
    asked = questions(1000, seed=42, long_every=25)
    assert len(set(asked)) == 1000
    async with Cluster(checkpoint("bert", layers=6), stages=3) as cluster:
        await _compare(cluster, asked, CONCURRENCY)
        await cluster.idle()


async def test_explicit_layers_of_unequal_stages(checkpoint: Checkpoints) -> None:
    model: Path = checkpoint("bert", layers=LAYERS)
    async with Cluster(model, stages=2, layers="0-2,2-3") as cluster:
        await _compare(cluster, questions(8, seed=7), CONCURRENCY)
        first, second = [(await cluster.describe(index)).stage for index in range(2)]
    assert (first.first_layer, first.end_layer) == (0, 2)
    assert (second.first_layer, second.end_layer) == (2, LAYERS)
    assert first.parameter_bytes + second.parameter_bytes == first.model_parameter_bytes
