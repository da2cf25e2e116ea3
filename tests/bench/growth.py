"""What more of something costs: load, longer passages, more stages; and what the caches bring."""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import psutil
from rich.console import Console
from transformers import AutoTokenizer

from miaotui.compression import compress_model
from tests.bench.child import Child
from tests.bench.questions import questions
from tests.bench.sides import NO_CACHES, cpu_seconds, family, miaotui, percentile
from tests.bench.workload import Body, made
from tests.processes import free_port

Part = dict[str, Any]
LOAD_SECONDS = 12.0
# Of the share by whose p99 the target goes: in 12 s that is the second slowest of 150 answers.
CALM, CALM_SECONDS = 0.7, 60.0
SHARES = (0.1, 0.25, 0.5, 0.7, 0.9, 1.0, 1.25, 1.5, 2.0)
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)
STAGES = (1, 2, 3, 4, 5, 6)
AT_ONCE = 32
# Of cached answers, within a round: whatever else the machine does slows down both sides then.
TURNS, A_TURN = 10, 400
# Of the load's gateway: what waits longer than a second or so is refused instead.
MOST_IN_FLIGHT = 64


def _int8(stack: ExitStack, model: Path) -> Path:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "int8"
    compress_model(model, folder, method="int8")
    return folder


def _warm(side: Any, at_once: int = AT_ONCE) -> None:
    side.ask(made(2 * at_once, 99).bodies, at_once)


async def load(options: argparse.Namespace, console: Console) -> Part:
    """From almost idle to twice what it can do, open loop."""
    rows = []
    with ExitStack() as stack:
        env = {**NO_CACHES, "MIAOTUI_GATEWAY_MAX_CONCURRENT_REQUESTS": str(MOST_IN_FLIGHT)}
        side, cluster = await miaotui(stack, "", _int8(stack, options.model), options.stages, env)
        bodies = made(options.questions, 3).bodies
        await asyncio.to_thread(_warm, side)
        capacity = (await asyncio.to_thread(side.ask, bodies, AT_ONCE))[0]
        child = stack.enter_context(Child("tests.bench.arrivals", cluster.url))
        for share in SHARES:
            console.print(f"load: {share:g} times {capacity:.1f} questions a second")
            told = await asyncio.to_thread(
                child,
                "offer",
                bodies=bodies,
                rate=share * capacity,
                seconds=CALM_SECONDS if share == CALM else LOAD_SECONDS,
                path="/v1/qa",
            )
            p50, p99 = (percentile(told["answered"], p) for p in (0.5, 0.99))
            rows.append(
                {
                    "of capacity": f"{share:g}",
                    "offered/s": share * capacity,
                    "answered/s": told["answered_a_second"],
                    "refused/s": told["refused_a_second"],
                    "p50 ms": p50,
                    "p99 ms": p99,
                    "refusal p50 ms": percentile(told["refused"], 0.5),
                    "failed": told["failed"],
                }
            )
    return {
        "title": f"Load: Miaotui int8, {options.stages} stages, {MOST_IN_FLIGHT} in flight at most",
        "rows": rows,
        "remarks": _of_load(rows, capacity),
    }


def _of_load(rows: list[dict[str, Any]], capacity: float) -> list[str]:
    by_share = {row["of capacity"]: row for row in rows}
    calm, twice = by_share[f"{CALM:g}"], by_share["2"]
    most = max(row["answered/s"] for row in rows)
    return [
        f"capacity, {AT_ONCE} at once in a closed loop: {capacity:.1f} questions a second",
        f"p99 at {100 * CALM:.0f} % of capacity: {calm['p99 ms'] / calm['p50 ms']:.2f} times the "
        "p50 (target 3)",
        f"at twice the capacity {100 * twice['answered/s'] / most:.0f} % of the highest throughput "
        "are left",
    ]


def _of_length(tokenizer: Any, tokens: int, count: int, seed: int) -> list[Body]:
    """Questions over passages cut to about this many tokens."""
    bodies = []
    for question in questions(count, seed=seed, words=(tokens, tokens)):
        offsets = tokenizer(question.context, return_offsets_mapping=True)["offset_mapping"][1:-1]
        text = question.context[: offsets[min(tokens, len(offsets)) - 1][1]]
        bodies.append({"question": question.question, "context": text})
    return bodies


async def lengths(options: argparse.Namespace, console: Console) -> Part:
    """Passages of 64 to 4,096 tokens, in float32 against transformers with the same weights."""
    rows = []
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    with ExitStack() as stack:
        plain, _ = await miaotui(stack, "", options.model, options.stages)
        small, _ = await miaotui(stack, "", _int8(stack, options.model), options.stages)
        peer = stack.enter_context(Child("tests.bench.peers", str(options.model)))
        for side in (plain, small):
            await asyncio.to_thread(_warm, side)
        # It takes cores while it loads.
        await asyncio.to_thread(peer, "throughput", bodies=made(16, 99).bodies, batch=16)
        for tokens in LENGTHS:
            console.print(f"lengths: {tokens} tokens")
            bodies = _of_length(tokenizer, tokens, min(96, max(8, 20_000 // tokens)), tokens)
            alone = _of_length(tokenizer, tokens, 6, tokens + 1)
            row: dict[str, Any] = {"passage tokens": str(tokens)}
            for name, side in (("float32", plain), ("int8", small)):
                row[f"{name} q/s"] = (await asyncio.to_thread(side.ask, bodies, AT_ONCE))[0]
                single = (await asyncio.to_thread(side.ask, alone, 1))[1]
                row[f"{name} alone, p50 ms"] = percentile(single, 0.5)
            row["transformers q/s"] = await asyncio.to_thread(
                peer, "throughput", bodies=bodies, batch=16
            )
            row["float32 tokens/s"] = row["float32 q/s"] * tokens
            rows.append(row)
    return {
        "title": f"Passage lengths: Miaotui, {options.stages} stages, {AT_ONCE} at once",
        "rows": rows,
    }


async def stages(options: argparse.Namespace, console: Console) -> Part:
    """The same model split over one to six processes."""
    rows = []
    bodies, alone = made(min(options.questions, 128), 5).bodies, made(15, 6).bodies
    layers = json.loads((options.model / "config.json").read_text())["num_hidden_layers"]
    for count in (count for count in STAGES if count <= layers):
        console.print(f"stages: {count}")
        with ExitStack() as stack:
            side, _ = await miaotui(stack, "", options.model, count)
            await asyncio.to_thread(_warm, side)
            rate, seconds, _ = await asyncio.to_thread(side.ask, bodies, AT_ONCE)
            single = (await asyncio.to_thread(side.ask, alone, 1))[1]
            rows.append(
                {
                    "stages": str(count),
                    "q/s": rate,
                    "p50 ms": percentile(seconds, 0.5),
                    "p99 ms": percentile(seconds, 0.99),
                    "alone, p50 ms": percentile(single, 0.5),
                    "MB": sum(p.memory_full_info().pss for p in family(side.roots)) / 1e6,
                }
            )
    return {"title": f"Stages: Miaotui float32, {AT_ONCE} at once", "rows": rows}


async def repeated(options: argparse.Namespace, console: Console) -> Part:
    """Twenty questions on each passage against one on each, with all caches on."""
    rounds = []
    with ExitStack() as stack:
        model = _int8(stack, options.model)
        side, _ = await miaotui(stack, "", model, options.stages, {})
        await asyncio.to_thread(_warm, side)
        for number in range(options.rounds):
            console.print(f"repeated: round {number + 1} of {options.rounds}")
            asked = questions(160, seed=20 + number)
            apart = [question.body for question in asked]
            passages = [q.context for q in questions(8, seed=60 + number)]
            # Equal passages come one after the other, as of one user who reads one text.
            together = [
                {"question": q.question, "context": passages[place // 20]}
                for place, q in enumerate(asked)
            ]
            rates = [
                (await asyncio.to_thread(side.ask, bodies, AT_ONCE))[0]
                for bodies in (apart, together)
            ]
            rounds.append((rates[0], rates[1]))
    one, twenty = (statistics.median(rates) for rates in zip(*rounds, strict=True))
    return {
        "title": f"Repeated passages: Miaotui int8, {options.stages} stages, {AT_ONCE} at once",
        "rows": [
            {"questions on a passage": "1", "q/s": one},
            {"questions on a passage": "20", "q/s": twenty},
        ],
        "remarks": [f"{twenty / one:.2f} times (target 3)"],
    }


async def cached(options: argparse.Namespace, console: Console) -> Part:
    """Answers from the cache against a bare handler that writes the same JSON, in turns."""
    body = questions(1, seed=2)[0].body
    rounds: list[tuple[float, float, float, float]] = []
    with ExitStack() as stack:
        _, cluster = await miaotui(stack, "", options.model, options.stages, {})
        async with httpx.AsyncClient(trust_env=False, timeout=30) as client:
            await client.post(f"{cluster.url}/v1/qa", json=body)
            answer = (await client.post(f"{cluster.url}/v1/qa", json=body)).json()
        if answer["cache"] != "hit":
            raise RuntimeError(f"the second answer is no hit: {answer['cache']}")
        file = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "answer.json"
        file.write_text(json.dumps(answer))
        port = free_port()
        process = _handler(stack, port, file)
        await _listening(f"http://127.0.0.1:{port}/")
        sides = [
            (stack.enter_context(Child("tests.bench.arrivals", url)), psutil.Process(pid))
            for url, pid in (
                (cluster.url, cluster.gateway.pid),
                (f"http://127.0.0.1:{port}", process.pid),
            )
        ]
        for number in range(options.rounds + 1):
            console.print(f"cached: round {number} of {options.rounds}")
            seconds, cpu = [0.0, 0.0], [0.0, 0.0]
            for _ in range(TURNS):
                for place, (child, root) in enumerate(sides):
                    before = cpu_seconds([root])
                    rate = await asyncio.to_thread(
                        child, "flood", body=body, count=A_TURN, at_once=AT_ONCE, path="/v1/qa"
                    )
                    seconds[place] += A_TURN / rate
                    cpu[place] += cpu_seconds([root]) - before
            count = TURNS * A_TURN
            if number:
                rounds.append(
                    (count / seconds[0], cpu[0] / count, count / seconds[1], cpu[1] / count)
                )
    ours, our_cpu, bare, bare_cpu = (statistics.median(of) for of in zip(*rounds, strict=True))
    return {
        "title": f"Cached answers, {AT_ONCE} at once",
        "rows": [
            {"side": "Miaotui, from the cache", "q/s": ours, "CPU µs": 1e6 * our_cpu},
            {"side": "bare Starlette handler", "q/s": bare, "CPU µs": 1e6 * bare_cpu},
        ],
        "remarks": [
            f"{100 * ours / bare:.0f} % of the bare handler's (target 60); by CPU time of the "
            f"serving process, {100 * bare_cpu / our_cpu:.0f} %"
        ],
    }


def _handler(stack: ExitStack, port: int, file: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.bench.handler", str(port), str(file)]
    process = subprocess.Popen(command)
    stack.callback(process.wait)
    stack.callback(process.terminate)
    return process


async def _listening(url: str, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    async with httpx.AsyncClient(trust_env=False) as client:
        while True:
            try:
                await client.get(url)
                return
            except httpx.TransportError:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.05)


GROWTH: dict[str, Callable[[argparse.Namespace, Console], Coroutine[Any, Any, Part]]] = {
    "load": load,
    "lengths": lengths,
    "stages": stages,
    "repeated": repeated,
    "cached": cached,
}
