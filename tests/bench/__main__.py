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
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from tests.bench.answers import cached, layers, overhead, throughput
from tests.bench.child import Child
from tests.bench.figures import Figure
from tests.bench.generation import measure_generation
from tests.bench.gguf_file import FILE_TYPES
from tests.bench.links import measure_links
from tests.bench.tables import print_cells
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


async def measure_texts(
    parts: Collection[str], quick: bool, file_types: Sequence[str]
) -> tuple[list[Figure], list[tuple[str, str]]]:
    """The figures asked for of a decoder with random weights; what is left out, and why."""
    figures: list[Figure] = []
    skipped: list[tuple[str, str]] = []
    if "generation" in parts:
        figures += await measure_generation(1, quick, file_types, skipped)
    if "links" in parts:
        if why := missing():
            skipped.append(("links", why))
        else:
            figures += await measure_links(quick)
    return figures, skipped


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
    cells = [["figure", "Miaotui", "peer", "peer is", "Miaotui / peer", "difference"]]
    cells += [
        [
            figure.what,
            f"{figure.miaotui:.2f} {figure.unit}",
            f"{figure.peer:.2f} {figure.unit}",
            figure.peer_is,
            f"{figure.ratio:.2f}",
            f"{figure.miaotui - figure.peer:+.2f} {figure.unit}",
        ]
        for figure in figures
    ]
    print_cells(cells, console)
    if hops:
        lines = [[hop, f"{milliseconds:.2f}"] for hop, milliseconds in hops.items()]
        print_cells([["hop of an uncached question", "p50, ms"], *lines], console)


def main() -> None:
    """Parses flags, measures, prints."""
    os.environ["MIAOTUI_TEST_FORK"] = "0"  # services start as an operator starts them
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--model", type=Path, help="model directory; default: the bundled one")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="fewer questions: a minute, noisier")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="leave out others")
    parser.add_argument(
        "--llama",
        nargs="*",
        choices=FILE_TYPES,
        default=("f32", "f16"),
        help="llama.cpp's file types in generation (make bench-llama); default: f32 f16",
    )
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
        texts, skipped = asyncio.run(measure_texts(options.only, options.quick, options.llama))
    figures += texts
    console = Console()
    console.print(f"{model.name} over {options.stages} stages; {machine()}")
    report(figures, hops, console)
    for side, why in skipped:
        console.print(f"left out: {side}: {why}", soft_wrap=True, markup=False)
    if options.json:
        rows = [asdict(figure) | {"ratio": figure.ratio} for figure in figures]
        written = {"machine": machine(), "stages": options.stages, "figures": rows, "hops": hops}
        written["left_out"] = skipped
        options.json.write_text(json.dumps(written, indent=2) + "\n")


if __name__ == "__main__":
    main()
