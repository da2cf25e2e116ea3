"""Stages that do not belong together refuse to serve and say why; a killed one comes back."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from grpc_health.v1 import health_pb2

from miaotui.v1 import shard_pb2
from tests.e2e.asking import ask_http, gathered, http_client, questions
from tests.e2e.conftest import Checkpoints
from tests.e2e.reference import Reference
from tests.processes import START_SECONDS, Cluster

NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVING = health_pb2.HealthCheckResponse.SERVING


@dataclass(frozen=True)
class Case:
    """What only stage 1 gets, and what must be said about it."""

    environment: Mapping[str, str]
    reason: str


CASES = {
    "layers that overlap": Case({"MIAOTUI_SHARD_LAYERS": "0-1,1-4"}, "must follow one another"),
    "another dtype": Case({"MIAOTUI_SHARD_DTYPE": "bfloat16"}, "dtype"),
    "another model": Case({"MIAOTUI_SHARD_MODEL": "OTHER"}, "another model"),
}


async def _refusal(cluster: Cluster, reason: str) -> list[shard_pb2.ShardServiceDescribeResponse]:
    """Waits until a stage refuses for this reason; what all stages say then."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        told = [await cluster.describe(index) for index in range(len(cluster.shards))]
        if any(d.status == shard_pb2.STAGE_STATUS_MISMATCHED and reason in d.reason for d in told):
            return told
        assert time.monotonic() < deadline, f"{[d.reason for d in told]}\n{cluster.logs()}"
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("name", CASES)
async def test_mismatched_stages_refuse(name: str, checkpoint: Checkpoints) -> None:
    case = CASES[name]
    model, other = checkpoint("bert", layers=4), checkpoint("bert", layers=4, seed=1)
    environment = {k: v.replace("OTHER", str(other)) for k, v in case.environment.items()}
    async with Cluster(
        model, stages=2, layers="0-2,2-4", stage_env={1: environment}, only_shards=True
    ) as cluster:
        told = await _refusal(cluster, case.reason)
        for index, target in enumerate(cluster.stage_targets):
            assert await cluster.health(target) == NOT_SERVING
            assert told[index].status != shard_pb2.STAGE_STATUS_SERVING
            assert told[index].reason, "a stage that does not serve says why"
        assert case.reason in "".join(shard.log for shard in cluster.shards)
        assert all(shard.alive for shard in cluster.shards), "refusing is not dying"


async def test_stages_in_another_order_refuse(checkpoint: Checkpoints) -> None:
    """Stage 0 was given stages 1 and 2 the other way round."""
    made = Cluster(checkpoint("bert"), stages=3, only_shards=True)
    first, second, third = made.stage_targets
    made.shards[0].env["MIAOTUI_SHARD_STAGES"] = ",".join((first, third, second))
    async with made as cluster:
        await _refusal(cluster, "check the order of the list of stages")
        for target in cluster.stage_targets:
            assert await cluster.health(target) == NOT_SERVING


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"MIAOTUI_SHARD_STAGE": "5"}, "stage 5"),
        ({"MIAOTUI_SHARD_MODEL": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"MIAOTUI_SHARD_DTYPE": "float8"}, "DTYPE|dtype"),
    ],
    ids=["no such stage", "no such directory", "no such dtype"],
)
async def test_wrong_configuration_ends_with_code_2(
    environment: Mapping[str, str], reason: str, checkpoint: Checkpoints
) -> None:
    import re

    model = checkpoint("bert", layers=4)
    async with Cluster(model, stages=2, shard_env=environment, only_shards=True) as cluster:
        shard = cluster.shards[0]
        assert await asyncio.to_thread(shard.wait) == 2, shard.tail()
        assert re.search(reason, shard.log)
        assert "Traceback" not in shard.log


async def test_killed_stages_come_back_without_a_failed_request(checkpoint: Checkpoints) -> None:
    model: Path = checkpoint("bert")
    reference = Reference(model, max_length=384, stride=128)
    asked = questions(60, seed=11)
    patience = {"MIAOTUI_SHARD_RECONNECT_GRACE": "60"}  # a stage imports torch for some seconds
    async with (
        Cluster(
            model,
            stages=3,
            shard_env=patience,
            gateway_env={"MIAOTUI_GATEWAY_REQUEST_TIMEOUT": "60"},
        ) as cluster,
        http_client(cluster.url) as client,
    ):
        load = asyncio.create_task(gathered(lambda q: ask_http(client, q), asked, 8))
        await asyncio.sleep(0.2)
        cluster.shards[1].kill()
        cluster.shards[1].start()
        for question, body in list(zip(asked, await load, strict=True))[::5]:
            expected = reference.answer(question.question, question.context)
            expected.check(body, question.top_k)

        # Stage 0 holds the queue: what it held is lost with it, but the ring heals.
        cluster.shards[0].signal(signal.SIGKILL)
        cluster.shards[0].wait()
        cluster.shards[0].start()
        await cluster.ready()
        await gathered(lambda q: ask_http(client, q), questions(20, seed=12), 8)
        await cluster.idle()
        for target in cluster.stage_targets:
            assert await cluster.health(target) == SERVING
