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
import tempfile
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from tests.bench.answers import cached, layers, overhead, throughput
from tests.bench.child import Child
from tests.bench.figures import Figure
from tests.bench.generation import measure_generation
from tests.bench.links import measure_links
from tests.checkpoints import make_checkpoint
from tests.namespaces import missing
from tests.processes import Cluster

BUNDLED = Path(__file__).resolve().parents[2] / "miaotui" / "bundled" / "qa"
ANSWERS = ("layers", "overhead", "cached", "throughput")
PARTS = (*ANSWERS, "generation", "links")


async def measure(
    model: Path, stages: int, quick: bool, parts: Collection[str]
) -> tuple[list[Figure], dict[str, float]]:
    """The figures asked for, for one model split over `stages`; and the hops of a question."""
    figures: list[Figure] = []
    hops: dict[str, float] = {}
    if set(parts).isdisjoint(ANSWERS):
        return figures, hops
    with Child("tests.bench.peers", str(model)) as peer:
        if "layers" in parts:
            figures.append(layers(peer, 40 if quick else 100))
        if set(parts).isdisjoint(ANSWERS[1:]):
            return figures, hops
        async with Cluster(model, stages=stages) as cluster:
            with Child("tests.bench.client", cluster.url) as client:
                if "overhead" in parts:
                    figure, hops = overhead(client, peer, 50 if quick else 210)
                    figures.append(figure)
                if "cached" in parts:
                    figures.append(cached(client, 100 if quick else 1000))
                if "throughput" in parts:
                    figures.append(throughput(client, peer, 64 if quick else 320, 32))
    return figures, hops


async def measure_texts(parts: Collection[str], quick: bool) -> list[Figure]:
    """The figures asked for of a decoder with random weights."""
    figures: list[Figure] = []
    if "generation" in parts:
        figures += await measure_generation(1, quick)
    if "links" in parts:
        if why := missing():
            Console(stderr=True).print(f"links are left out: {why}")
        else:
            figures += await measure_links(quick)
    return figures


def machine() -> str:
    """What the figures were taken on."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        name = next((li.partition(": ")[2] for li in lines if li.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores, torch {torch.__version__}"


def report(figures: list[Figure], hops: dict[str, float], console: Console) -> None:
    """Prints the tables."""
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
    console.print(table)
    if hops:
        table = Table("hop of an uncached question", "p50, ms")
        for hop, milliseconds in hops.items():
            table.add_row(hop, f"{milliseconds:.2f}")
        console.print(table)


def main() -> None:
    """Parses flags, measures, prints."""
    os.environ["MIAOTUI_TEST_FORK"] = "0"  # services start as an operator starts them
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--model", type=Path, help="model directory; default: the bundled one")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="fewer questions: a minute, noisier")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="leave out others")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = options.model or BUNDLED
        if not (model / "config.json").exists():
            if options.model:
                parser.error(f"{model} has no config.json: it is no model directory")
            model = Path(directory)
            make_checkpoint(model, "bert", layers=6, hidden=384)
        figures, hops = asyncio.run(measure(model, options.stages, options.quick, options.only))
        figures += asyncio.run(measure_texts(options.only, options.quick))
    console = Console()
    console.print(f"{model.name} over {options.stages} stages; {machine()}")
    report(figures, hops, console)
    if options.json:
        rows = [asdict(figure) | {"ratio": figure.ratio} for figure in figures]
        written = {"machine": machine(), "stages": options.stages, "figures": rows, "hops": hops}
        options.json.write_text(json.dumps(written, indent=2) + "\n")


if __name__ == "__main__":
    main()
