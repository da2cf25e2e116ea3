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


async def generate(
    calls: Calls, batch: Sequence[Sequence[int]], tokens: int, drafts: int
) -> tuple[list[list[int]], float]:
    """Ids of concurrent greedy streams, and their tokens a second from the first request to the
    last token; fails where tokens are missing."""

    async def write(prompt: Sequence[int]) -> list[int]:
        request = pb.GenerateRequest(
            input_ids=np.asarray(prompt, "<i4").tobytes(), max_tokens=tokens, draft_tokens=drafts
        )
        written = bytearray()
        async for response in calls(request, timeout=120):
            for delta in response.deltas:
                written += delta.token_ids
        if len(written) != 4 * tokens:
            raise RuntimeError(f"{len(written) // 4} tokens were written instead of {tokens}")
        ids: list[int] = np.frombuffer(written, "<i4").tolist()
        return ids

    started = time.perf_counter()
    texts = await asyncio.gather(*(write(prompt) for prompt in batch))
    return texts, len(batch) * tokens / (time.perf_counter() - started)


async def rate(calls: Calls, batch: Sequence[Sequence[int]], tokens: int, drafts: int) -> float:
    """Tokens a second of concurrent greedy streams, from the first request to the last token."""
    return (await generate(calls, batch, tokens, drafts))[1]
