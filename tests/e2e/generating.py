"""Prompts, the texts that transformers writes after them, and a client of stage 0."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterable, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from miaotui.v1 import shard_pb2 as pb
from miaotui.v1 import shard_pb2_grpc as pb_grpc
from services.rpc.channel import open_channel
from services.rpc.streaming import ServerStreamCalls
from tests.processes import Cluster

# The tokens that end a text of the test checkpoints.
STOPS = (2, 4)


@dataclass(frozen=True)
class Prompt:
    """A prompt and how many tokens to write after it."""

    ids: tuple[int, ...]
    max_tokens: int
    stops: tuple[int, ...] = STOPS

    def request(self, request_id: str = "test", **fields: Any) -> pb.GenerateRequest:
        """The request for it; greedy."""
        return pb.GenerateRequest(
            request_id=request_id,
            input_ids=np.asarray(self.ids, "<i4").tobytes(),
            max_tokens=self.max_tokens,
            stop_token_ids=self.stops,
            **fields,
        )


def prompts(
    count: int, seed: int = 0, *, longest: int = 90, most: int = 40, vocabulary: int = 640
) -> list[Prompt]:
    """Random prompts of 1 to `longest` tokens; some begin alike, some repeat themselves."""
    chance = random.Random(seed)
    shared = [chance.randrange(5, vocabulary) for _ in range(longest // 2)]
    made = []
    for index in range(count):
        length = chance.randint(1, longest)
        ids = [chance.randrange(5, vocabulary) for _ in range(length)]
        if index % 3 == 1:
            ids = [*shared, *ids][:longest]
        elif index % 3 == 2:
            ids = (ids[: 1 + length // 4] * 5)[:longest]
        made.append(Prompt((1, *ids), chance.randint(1, most)))
    return made


class Reference:
    """One whole model, as transformers runs it."""

    def __init__(self, directory: Path) -> None:
        torch.set_num_threads(1)
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        self._model = model.eval()
        # The request alone says what ends a text.
        self._model.generation_config.eos_token_id = None
        self._known: dict[Prompt, tuple[list[int], float]] = {}

    def write(self, prompt: Prompt) -> list[int]:
        """The greedy text after a prompt, with the token that ended it."""
        return self._write(prompt)[0]

    def decided(self, asked: Sequence[Prompt]) -> list[Prompt]:
        """The prompts in whose texts the best token is always clearly ahead of the second.

        Where two are equally good, sums in another order may choose either.
        """
        return [prompt for prompt in asked if self._write(prompt)[1] > 1e-3]

    def gap(self, prompt: Prompt, text: Sequence[int]) -> str:
        """Where a text leaves the expected one, and by how much the two tokens' logits differ."""
        expected = self.write(prompt)
        place = next(
            (i for i, (a, b) in enumerate(zip(text, expected, strict=False)) if a != b), None
        )
        if place is None:
            return f"{len(text)} tokens for {len(expected)}"
        with torch.inference_mode():
            ids = torch.tensor([[*prompt.ids, *expected[:place]]])
            logits = self._model(ids).logits[0, -1]
        apart = float(logits[expected[place]] - logits[text[place]])
        return f"token {place} after {len(prompt.ids)}: logits {apart:g} apart"

    def _write(self, prompt: Prompt) -> tuple[list[int], float]:
        """The text, and the least distance between the two best logits of a place."""
        if (known := self._known.get(prompt)) is not None:
            return known
        ids = torch.tensor([prompt.ids])
        with torch.inference_mode():
            output: Any = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=prompt.max_tokens,
                do_sample=False,
                eos_token_id=list(prompt.stops) or None,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_logits=True,
            )
        best = torch.stack([logits[0].topk(2).values for logits in output.logits])
        text: list[int] = output.sequences[0, len(prompt.ids) :].tolist()
        self._known[prompt] = text, float((best[:, 0] - best[:, 1]).min())
        return self._known[prompt]


@dataclass
class Written:
    """What came of a request."""

    tokens: list[int]
    finish: int
    usage: pb.GenerationUsage | None


async def collect(responses: AsyncIterable[pb.GenerateResponse]) -> Written:
    """All of a request with one text."""
    written = Written([], 0, None)
    async for response in responses:
        for delta in response.deltas:
            assert delta.index == 0
            assert not written.finish, "tokens after the last"
            written.tokens += np.frombuffer(delta.token_ids, "<i4").tolist()
            written.finish = delta.finish_reason
        assert written.usage is None, "a response after the last"
        if response.HasField("usage"):
            written.usage = response.usage
    return written


Calls = ServerStreamCalls[pb.GenerateRequest, pb.GenerateResponse]


@dataclass
class Client:
    """Both ways to ask stage 0 for text."""

    stub: pb_grpc.ShardServiceAsyncStub
    calls: Calls

    async def plain(self, request: pb.GenerateRequest) -> Written:
        """By Generate."""
        return await collect(self.stub.Generate(request, timeout=120))

    async def streamed(self, request: pb.GenerateRequest) -> Written:
        """By GenerateStream."""
        return await collect(self.calls(request, timeout=120))


@asynccontextmanager
async def client_of(cluster: Cluster) -> AsyncIterator[Client]:
    """A client of a cluster's stage 0, once that serves."""
    await until_serving(cluster)
    async with open_channel(cluster.stage_targets[0]) as channel:
        stub: Any = pb_grpc.ShardServiceStub(channel)
        calls: Calls = ServerStreamCalls(
            stub.GenerateStream,
            lambda header, request: pb.GenerateStreamRequest(call=header, request=request),
        )
        yield Client(stub, calls)
        calls.close()


async def until_serving(cluster: Cluster, timeout: float = 120.0) -> None:
    """Waits until stage 0 serves."""
    deadline = time.monotonic() + timeout
    while True:
        told = await cluster.describe(0)
        if told.status == pb.STAGE_STATUS_SERVING:
            return
        assert time.monotonic() < deadline, f"{told.reason}\n{cluster.logs()}"
        await asyncio.sleep(0.05)


async def until_free(cluster: Cluster, timeout: float = 60.0) -> None:
    """Waits until nothing waits or runs, and nobody holds a KV block."""
    deadline = time.monotonic() + timeout
    while True:
        told = await cluster.describe(0)
        held = (told.queued_sequences, told.running_sequences, told.kv_blocks_used)
        if not any(held):
            return
        assert time.monotonic() < deadline, (
            f"(queued, running, KV blocks) are left: {held}\n{cluster.logs()}"
        )
        await asyncio.sleep(0.02)


def check(asked: Sequence[Prompt], written: Sequence[Written], reference: Reference) -> None:
    """Fails unless every text is what transformers writes, to its end."""
    for prompt, text in zip(asked, written, strict=True):
        expected = reference.write(prompt)
        assert text.tokens == expected, reference.gap(prompt, text.tokens)
        stopped = expected[-1] in prompt.stops
        assert text.finish == (pb.FINISH_REASON_STOP if stopped else pb.FINISH_REASON_LENGTH)
        assert text.usage is not None
        assert text.usage.prompt_tokens == len(prompt.ids)
        assert text.usage.completion_tokens == len(expected)
