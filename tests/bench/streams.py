"""Texts as token ids, from stage 0 over gRPC."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import numpy as np
from grpc import aio

from miaotui.v1 import shard_pb2 as pb
from miaotui.v1 import shard_pb2_grpc
from services.rpc.streaming import ServerStreamCalls

Calls = ServerStreamCalls[pb.GenerateRequest, pb.GenerateResponse]


def calls_of(channel: aio.Channel) -> Calls:
    """Calls of a stage 0 over one stream, as the gateway makes them."""
    return ServerStreamCalls(
        shard_pb2_grpc.ShardServiceStub(channel).GenerateStream,
        lambda call, request: pb.GenerateStreamRequest(call=call, request=request),
    )


async def rate(calls: Calls, batch: Sequence[Sequence[int]], tokens: int, drafts: int) -> float:
    """Tokens a second of concurrent greedy streams, from the first request to the last token."""

    async def write(prompt: Sequence[int]) -> None:
        request = pb.GenerateRequest(
            input_ids=np.asarray(prompt, "<i4").tobytes(), max_tokens=tokens, draft_tokens=drafts
        )
        written = 0
        async for response in calls(request, timeout=120):
            written += sum(len(delta.token_ids) // 4 for delta in response.deltas)
        if written != tokens:
            raise RuntimeError(f"{written} tokens were written instead of {tokens}")

    started = time.perf_counter()
    await asyncio.gather(*(write(prompt) for prompt in batch))
    return len(batch) * tokens / (time.perf_counter() - started)
