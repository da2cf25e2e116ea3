"""Generation over a slow link: two stages on two hosts with 20 ms between them.

What a pipeline gains from many streams, and from guessing ahead, where every token costs a
round trip. Hosts are network namespaces (tests/namespaces.py), so this needs root; each has a
share of this machine's cores to itself, as hosts do.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from miaotui.v1 import shard_pb2 as pb
from miaotui.v1 import shard_pb2_grpc
from services.rpc.channel import open_channel
from tests.bench.decoders import make_decoder, prompts
from tests.bench.figures import Figure
from tests.bench.streams import Calls, calls_of, rate
from tests.namespaces import Hosts
from tests.processes import ServiceProcess

DELAY_SECONDS = 0.02
PORT = 50060
_START_SECONDS = 120.0


class SlowRing:
    """Two stages of a decoder on two hosts; this process speaks to stage 0 without delay."""

    def __init__(self, model: Path, hosts: Hosts, logs: Path) -> None:
        stages = [hosts.address(0), hosts.address(1)]
        cores = sorted(os.sched_getaffinity(0))
        self.target = f"{hosts.outside(0)}:{PORT}"
        self._processes = [
            ServiceProcess(
                f"stage-{index}",
                hosts.command(
                    index, [*_on(cores[index::2] or cores), sys.executable, "-m", "services.shard"]
                ),
                {
                    "MIAOTUI_SHARD_MODEL": str(model),
                    "MIAOTUI_SHARD_STAGE": str(index),
                    "MIAOTUI_SHARD_STAGES": ",".join(f"{host}:{PORT}" for host in stages),
                    "MIAOTUI_SHARD_LISTEN": f"0.0.0.0:{PORT}",
                    "MIAOTUI_SHARD_DTYPE": "float32",
                },
                logs / f"stage-{index}.log",
            )
            for index in range(2)
        ]

    async def __aenter__(self) -> Calls:
        for process in self._processes:
            process.start()
        self._channel = open_channel(self.target)
        stub = shard_pb2_grpc.ShardServiceStub(self._channel)
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                state = await stub.Describe(
                    pb.ShardServiceDescribeRequest(), timeout=5, wait_for_ready=True
                )
                if state.status == pb.STAGE_STATUS_SERVING:
                    break
            except Exception:
                if time.monotonic() > deadline:
                    raise
            logs = "\n".join(process.tail() for process in self._processes)
            assert all(process.alive for process in self._processes), logs
            assert time.monotonic() < deadline, logs
            await asyncio.sleep(0.2)
        self._calls = calls_of(self._channel)
        return self._calls

    async def __aexit__(self, *_: object) -> None:
        self._calls.close()
        await self._channel.close()
        for process in self._processes:
            process.stop()


def _on(cores: list[int]) -> list[str]:
    return ["taskset", "--cpu-list", ",".join(map(str, cores))]


async def measure_links(quick: bool) -> list[Figure]:
    """What streams and guesses gain over 20 ms between two stages."""
    turns, tokens = (1, 24) if quick else (3, 64)
    figures = []
    with tempfile.TemporaryDirectory() as directory, Hosts(2) as hosts:
        model = Path(directory) / "copying"
        make_decoder(model, copying=True)
        async with SlowRing(model, hosts, Path(directory)) as calls:
            hosts.link(0, 1).delay(DELAY_SECONDS)

            async def median(streams: int, drafts: int, seed: int) -> float:
                rates = []
                for turn in range(turns + 1):
                    batch = prompts(streams, 64, seed=seed + turn, copying=True)
                    rates.append(await rate(calls, batch, tokens, drafts))
                return statistics.median(rates[1:])

            one = await median(1, 0, seed=100)
            many = await median(16, 0, seed=200)
            guessed = await median(1, 8, seed=300)
            figures = [
                Figure("20 ms between stages: 16 streams", many, one, "one stream", "1/s"),
                Figure("20 ms between stages: prompt lookup", guessed, one, "without", "1/s"),
            ]
    return figures
