"""Generation by the ring and through the whole product against `generate` and llama.cpp, in turns.

Every stream has a prompt of its own; both sides decode greedily and write equally many tokens,
prefill included, without stop tokens. Prompt lookup is off: random weights repeat themselves
sooner than language does, and guessing would flatter. The peers return token ids in their own
processes; over gRPC the ring does the same from another, over HTTP the product sends text. What
gateway and tokenizer cost is told as CPU time, which other work on the machine does not change
as it does rates; on a machine whose cores all compute, it is what the stages go without.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import psutil

from services.rpc.channel import open_channel
from tests.bench.decoders import TransformersDecoder, agreement, make_decoder, prompts
from tests.bench.figures import Figure
from tests.bench.llamacpp import LlamaCpp, why_not
from tests.bench.streams import Calls, calls_of, generate
from tests.processes import Cluster, ServiceProcess

PROMPT_TOKENS = 64
NO_DRAFTS = {"MIAOTUI_SHARD_DRAFT_TOKENS": "0"}


class Client:
    """Streams completions over plain sockets: httpx would cost as much as the product."""

    def __init__(self, url: str, model: str) -> None:
        host, _, port = url.removeprefix("http://").rpartition(":")
        self._host, self._port, self._model = host, int(port), model

    async def events(self, prompt: Sequence[int], tokens: int) -> AsyncIterator[bytes]:
        """The server-sent events of one streamed completion."""
        body = json.dumps(
            {
                "model": self._model,
                "prompt": list(prompt),
                "max_tokens": tokens,
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        ).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {self._host}\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        reader, writer = await asyncio.open_connection(self._host, self._port, limit=1 << 20)
        try:
            writer.write(head.encode() + body)
            status = await reader.readline()
            if b" 200 " not in status:
                raise RuntimeError(f"{status!r}: {(await reader.read())[-2000:]!r}")
            async for line in reader:
                if line.startswith(b"data: {"):
                    yield line[6:]
        finally:
            writer.close()

    async def complete(self, prompt: Sequence[int], tokens: int) -> list[float]:
        """When each event came (`time.perf_counter()`); fails where tokens are missing."""
        times: list[float] = []
        last = b"{}"
        async for event in self.events(prompt, tokens):
            times.append(time.perf_counter())
            last = event
        written = json.loads(last)["usage"]["completion_tokens"]
        if written != tokens:
            raise RuntimeError(f"{written} tokens were written instead of {tokens}")
        return times

    async def rate(self, batch: Sequence[Sequence[int]], tokens: int) -> float:
        """Tokens a second of concurrent streams, from the first request to the last token."""
        started = time.perf_counter()
        await asyncio.gather(*(self.complete(prompt, tokens) for prompt in batch))
        return len(batch) * tokens / (time.perf_counter() - started)


def cpu_seconds(cluster: Cluster) -> tuple[float, float]:
    """User and system time so far: of gateway and tokenizer, and of the shards."""

    def spent(processes: Sequence[ServiceProcess]) -> float:
        return sum(sum(psutil.Process(one.pid).cpu_times()[:2]) for one in processes)

    return spent([cluster.gateway, cluster.tokenizer]), spent(cluster.shards)


class Peer(Protocol):
    """Something else that writes greedily: `TransformersDecoder` or `LlamaCpp`."""

    name: str

    def generate(self, batch: list[list[int]], tokens: int) -> tuple[list[list[int]], float]:
        """Continuations of equally long prompts, and all streams' tokens a second."""


async def compare(
    cluster: Cluster,
    ids: Calls,
    text: Client,
    peers: Sequence[Peer],
    streams: int,
    tokens: int,
    turns: int,
) -> list[Figure]:
    """`streams` concurrent streams: tokens a second against one batch of each peer, and the CPU
    time a token over HTTP; of further peers, how much they write of what the first one does."""
    rates: list[list[float]] = []
    equal: list[list[float]] = []
    around, computing = [], []
    for turn in range(turns + 1):
        seed = 100 * streams + 2 * turn
        batch = prompts(streams, PROMPT_TOKENS, seed=seed)
        ours, over_grpc = await generate(ids, batch, tokens, drafts=0)
        theirs = [await asyncio.to_thread(peer.generate, batch, tokens) for peer in peers]
        before = cpu_seconds(cluster)
        over_http = await text.rate(prompts(streams, PROMPT_TOKENS, seed=seed + 1), tokens)
        after = cpu_seconds(cluster)
        rates.append([over_grpc, over_http, *(rate for _, rate in theirs)])
        reference, *others = (texts for texts, _ in theirs)
        equal.append([agreement(texts, reference) for texts in (ours, *others)])
        around.append(after[0] - before[0])
        computing.append(after[1] - before[1])
    grpc, http, *of_peers = (statistics.median(column) for column in zip(*rates[1:], strict=True))
    figures = []
    for peer, rate in zip(peers, of_peers, strict=True):
        what = f"tokens a second, {streams} streams"
        figures += [
            Figure(f"{what}, ids over gRPC", grpc, rate, peer.name, "1/s"),
            Figure(f"{what}, text over HTTP", http, rate, peer.name, "1/s"),
        ]
    # Sums: one turn may take few of the clock's ticks, which are 10 ms.
    written = 1e-3 * turns * streams * tokens
    cost, compute = sum(around[1:]) / written, sum(computing[1:]) / written
    beside = f"CPU a token, {streams} streams, gateway and tokenizer"
    figures.append(Figure(beside, cost, compute, "the shards' own", "ms"))
    same, *of_others = (statistics.fmean(column) for column in zip(*equal, strict=True))
    what = f"tokens equal to generate's until the first other, {streams} streams"
    figures += [
        Figure(what, same, share, peer.name, "%")
        for peer, share in zip(peers[1:], of_others, strict=True)
    ]
    return figures


async def measure_generation(
    stages: int, quick: bool, file_types: Sequence[str], skipped: list[tuple[str, str]]
) -> list[Figure]:
    """Throughput of 1, 8 and 32 streams over a ring of `stages`.

    `file_types`: llama.cpp's sides, each with the weights as such a GGUF file; what cannot run
    goes into `skipped` with the reason.
    """
    figures: list[Figure] = []
    with ExitStack() as stack:
        model = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "decoder"
        make_decoder(model)
        transformers = TransformersDecoder(model)
        llamas: list[LlamaCpp] = []
        if file_types and (why := why_not()):
            skipped.append(("llama.cpp", why))
        else:
            llamas = [LlamaCpp(stack, model, file_type) for file_type in file_types]
        async with (
            Cluster(model, generative=True, stages=stages, shard_env=NO_DRAFTS) as cluster,
            open_channel(cluster.stage_targets[0]) as channel,
        ):
            ids = calls_of(channel)
            text = Client(cluster.url, model.name)
            for streams in (1, 8, 32):
                tokens, turns = (32, 1) if quick else (96, 5)
                tried = prompts(streams, PROMPT_TOKENS, seed=streams)
                for llama in llamas:
                    await asyncio.to_thread(llama.tune, tried, tokens)
                peers: list[Peer] = [transformers, *llamas]
                figures += await compare(cluster, ids, text, peers, streams, tokens, turns)
            ids.close()
    return figures
