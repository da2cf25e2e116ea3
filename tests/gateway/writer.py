"""What the shard's fake writes: texts of the test's choice, a token a byte."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np

from miaotui.v1 import shard_pb2 as shard_pb
from services.rpc.calls import CallError
from services.rpc.streaming_server import Outlet

END = 256
"""The token that ends a text; 0 to 255 are bytes."""
ENGLISH, CHINESE = 257, 258
"""Tokens that name a language; what is heard is Chinese, where one of them is to be chosen."""


class FakeWriter:
    """Writes `texts` (text i of a request: the i-th) in steps of `chunk` tokens; of features,
    their bytes."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forgets what it was told and what it counted."""
        self.texts: list[bytes] = [b"Hello, world."]
        self.chunk = 1
        self.pause = 0.0
        self.heard: Callable[[], int] | None = None
        self.codes: list[grpc.StatusCode] = []
        self.fails_after: int | None = None
        self.cached = 0
        self.accepted = 0
        self.requests: list[shard_pb.GenerateRequest] = []
        self.remaining: list[float | None] = []
        self.written = 0
        self.cancelled = 0
        self.running = 0

    def start(self, request: Any, context: Any, outlet: Outlet) -> Callable[[], None]:
        """Begins to write; returns what stops it."""
        self.requests.append(request)
        self.remaining.append(context.time_remaining())
        if self.codes:
            raise CallError(self.codes.pop(0), "the fake was told to fail")
        task = asyncio.create_task(self._write(request, outlet))
        return task.cancel  # type: ignore[return-value]

    async def _write(self, request: Any, outlet: Outlet) -> None:
        self.running += 1
        total = 0
        try:
            steps = [self._steps(request, index) for index in range(request.n or 1)]
            for number in range(max(map(len, steps))):
                if self.fails_after is not None and number >= self.fails_after:
                    outlet.end(CallError(grpc.StatusCode.INTERNAL, "the fake was told to fail"))
                    return
                deltas = [text[number] for text in steps if number < len(text)]
                tokens = sum(len(delta.token_ids) // 4 for delta in deltas)
                total += tokens
                self.written += tokens
                before = self.heard and self.heard()
                outlet.send(shard_pb.GenerateResponse(deltas=deltas))
                await asyncio.sleep(self.pause)
                while self.heard and self.heard() == before:
                    await asyncio.sleep(0.001)
            usage = shard_pb.GenerationUsage(
                prompt_tokens=len(request.input_ids) // 4,
                cached_tokens=self.cached,
                completion_tokens=total,
                accepted_tokens=self.accepted,
            )
            outlet.send(shard_pb.GenerateResponse(usage=usage))
            outlet.end()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1

    def _steps(self, request: Any, index: int) -> list[shard_pb.TextDelta]:
        text = request.features.data or self.texts[index % len(self.texts)]
        tokens = [CHINESE] if CHINESE in request.sampling.logit_bias else [*text, END]
        reason = shard_pb.FINISH_REASON_STOP
        if request.max_tokens and len(tokens) > request.max_tokens:
            tokens = tokens[: request.max_tokens]
            reason = shard_pb.FINISH_REASON_LENGTH
        steps = []
        for first in range(0, len(tokens), self.chunk):
            part = tokens[first : first + self.chunk]
            steps.append(
                shard_pb.TextDelta(
                    index=index,
                    token_ids=np.array(part, "<i4").tobytes(),
                    logprobs=self._logprobs(request, part),
                )
            )
        steps[-1].finish_reason = reason
        return steps

    @staticmethod
    def _logprobs(request: Any, tokens: list[int]) -> Iterator[shard_pb.PlaceLogprobs]:
        if not request.sampling.HasField("logprobs"):
            return
        for token in tokens:
            candidates = [token, *range(97, 97 + request.sampling.logprobs)]
            yield shard_pb.PlaceLogprobs(
                chosen=shard_pb.TokenLogprob(token_id=token, logprob=-0.25),
                top=[
                    shard_pb.TokenLogprob(token_id=candidate, logprob=-0.25 - rank)
                    for rank, candidate in enumerate(candidates[: request.sampling.logprobs])
                ],
            )
