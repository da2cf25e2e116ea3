"""Measures and prints a table; `--json FILE` writes the figures, too.

Figures that compare are taken in turns within one run, so that both sides see the same
machine; medians are quoted. Absolute times say nothing about another machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tests.bench.peers import Transformers
from tests.bench.questions import Question, questions
from tests.checkpoints import make_checkpoint
from tests.processes import Cluster

BUNDLED = Path(__file__).resolve().parents[2] / "miaotui" / "bundled" / "qa"
MAX_LENGTH, STRIDE = 384, 128  # the tokenizer service's defaults


@dataclass(frozen=True)
class Figure:
    """One line of the report."""

    what: str
    miaotui: float
    peer: float
    peer_is: str
    unit: str

    @property
    def ratio(self) -> float:
        """Miaotui over the peer."""
        return self.miaotui / self.peer


async def _ask(client: httpx.AsyncClient, question: Question, **more: object) -> float:
    started = time.perf_counter()
    response = await client.post("/v1/qa", json={**question.body, **more})
    seconds = time.perf_counter() - started
    response.raise_for_status()
    return seconds


async def overhead(client: httpx.AsyncClient, peer: Transformers, count: int) -> Figure:
    """A single uncached request over HTTP against the bare model call, in turns."""
    asked = questions(count + 10, seed=1)
    ours: list[float] = []
    bare: list[float] = []
    for number, question in enumerate(track(asked, "overhead", console=_progress)):
        encoded = peer.encode([question])
        calls = (_ask(client, question), asyncio.to_thread(peer.call, encoded))
        seconds = [await calls[0], await calls[1]]
        if number >= 10:  # the first warm both up
            ours.append(seconds[0])
            bare.append(seconds[1])
    return Figure(
        "one uncached question, p50",
        statistics.median(ours) * 1e3,
        statistics.median(bare) * 1e3,
        "bare transformers call",
        "ms",
    )


async def cached(client: httpx.AsyncClient, count: int) -> Figure:
    """A cached answer against the same server's health check, in turns."""
    question = questions(1, seed=2)[0]
    await _ask(client, question)
    hits: list[float] = []
    bare: list[float] = []
    for _ in track(range(count), "cached", console=_progress):
        hits.append(await _ask(client, question))
        started = time.perf_counter()
        (await client.get("/healthz")).raise_for_status()
        bare.append(time.perf_counter() - started)
    return Figure(
        "a cached answer, p50",
        statistics.median(hits) * 1e3,
        statistics.median(bare) * 1e3,
        "GET /healthz of the same server",
        "ms",
    )


async def throughput(
    client: httpx.AsyncClient, peer: Transformers, count: int, concurrency: int
) -> Figure:
    """Uncached questions a second over HTTP against transformers in batches, in turns."""
    ours: list[float] = []
    bare: list[float] = []
    for turn in range(3):
        asked = questions(count, seed=10 + turn)
        ours.append(await _load(client, asked, concurrency))
        rate = await asyncio.to_thread(peer.throughput, asked, 16)
        bare.append(rate)
    return Figure(
        f"uncached questions a second, concurrency {concurrency}",
        statistics.median(ours),
        statistics.median(bare),
        "transformers, batches of 16 by length",
        "1/s",
    )


async def _load(client: httpx.AsyncClient, asked: Sequence[Question], concurrency: int) -> float:
    waiting = iter(track(asked, "throughput", console=_progress))

    async def ask_on() -> None:
        for question in waiting:
            await _ask(client, question)

    started = time.perf_counter()
    await asyncio.gather(*(ask_on() for _ in range(concurrency)))
    return len(asked) / (time.perf_counter() - started)


_progress = Console(stderr=True)


async def measure(model: Path, stages: int, quick: bool) -> list[Figure]:
    """All figures for one model split over `stages`."""
    peer = Transformers(model, MAX_LENGTH, STRIDE)
    async with (
        Cluster(model, stages=stages) as cluster,
        httpx.AsyncClient(base_url=cluster.url, timeout=60, trust_env=False) as client,
    ):
        return [
            await overhead(client, peer, 40 if quick else 200),
            await cached(client, 100 if quick else 1000),
            await throughput(client, peer, 64 if quick else 320, 32),
        ]


def main() -> None:
    """Parses flags, measures, prints."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--model", type=Path, help="model directory; default: the bundled one")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="fewer questions: a minute, noisier")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = options.model or BUNDLED
        if not (model / "config.json").exists():
            if options.model:
                parser.error(f"{model} has no config.json: it is no model directory")
            _progress.print("no bundled model yet: random weights of its shape")
            model = Path(directory)
            make_checkpoint(model, "bert", layers=6, hidden=384)
        figures = asyncio.run(measure(model, options.stages, options.quick))
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    table = Table("figure", "Miaotui", "peer", "peer is", "Miaotui / peer", "difference")
    for figure in figures:
        table.add_row(
            figure.what,
            f"{figure.miaotui:.2f} {figure.unit}",
            f"{figure.peer:.2f} {figure.unit}",
            figure.peer_is,
            f"{figure.ratio:.2f}",
            f"{figure.miaotui - figure.peer:+.2f} {figure.unit}",
        )
    console = Console()
    console.print(f"{model.name} over {options.stages} stages; {machine}")
    console.print(table)
    if options.json:
        rows = [asdict(figure) | {"ratio": figure.ratio} for figure in figures]
        report = {"machine": machine, "stages": options.stages, "figures": rows}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
