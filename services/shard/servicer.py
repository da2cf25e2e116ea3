"""The gRPC face of a stage: Describe, Infer, Generate and Forward."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import AsyncIterator

import grpc
import numpy as np
import psutil
from grpc import aio

from miaotui.engine.decode.pool import GenerationPool
from miaotui.engine.head import (
    ComputeError,
    DeadlineError,
    Head,
    TokenIds,
    TokenTypes,
)
from miaotui.engine.readiness import PipelineUnavailableError
from miaotui.engine.scheduler import QueueFullError
from miaotui.telemetry import inject_context
from miaotui.v1 import shard_pb2 as pb
from miaotui.v1 import shard_pb2_grpc
from services.rpc.calls import CallError, CallServer
from services.rpc.streaming_server import SingleCall, StreamedCallServer
from services.shard.convert import timings_to_proto
from services.shard.generate import check_salt
from services.shard.generation import STATUS_OF_ERROR, Generation, refusal
from services.shard.lane import ForwardContext
from services.shard.sampling import InvalidFieldError
from services.shard.stage import Stage

log = logging.getLogger(__name__)

InferContext = aio.ServicerContext[pb.InferRequest, pb.InferResponse]
GenerateContext = aio.ServicerContext[pb.GenerateRequest, pb.GenerateResponse]
GenerateStreamContext = aio.ServicerContext[pb.GenerateStreamRequest, pb.GenerateStreamResponse]


class InvalidSequenceError(ValueError):
    """A request's sequence is not one that this model takes."""


def read_sequence(
    message: pb.TokenSequence, info: pb.StageInfo, index: int, token_types: int
) -> tuple[TokenIds, TokenTypes | None]:
    """A sequence's arrays, int32 and uint8 [tokens]; views of the message's bytes.

    `token_types`: how many the model has; 0 where it reads none.

    Raises `InvalidSequenceError`.
    """
    where = f"sequences[{index}]"
    raw, types = message.input_ids, message.token_type_ids
    if not raw or len(raw) % 4:
        raise InvalidSequenceError(
            f"{where}.input_ids: {len(raw)} bytes; int32 ids take 4 bytes each, at least one"
        )
    ids = np.frombuffer(raw, dtype="<i4")
    if len(ids) > info.max_sequence_length:
        raise InvalidSequenceError(
            f"{where}: {len(ids)} tokens; this model takes {info.max_sequence_length} at most"
        )
    if int(ids.min()) < 0 or int(ids.max()) >= info.vocab_size:
        raise InvalidSequenceError(
            f"{where}.input_ids: ids must lie from 0 to {info.vocab_size - 1}; "
            "was the text tokenised for another model?"
        )
    if not types:
        return ids, None
    if len(types) != len(ids):
        raise InvalidSequenceError(
            f"{where}.token_type_ids: {len(types)} bytes for {len(ids)} tokens; one a token"
        )
    kinds = np.frombuffer(types, dtype=np.uint8)
    if token_types and int(kinds.max()) >= token_types:
        # Found here, because in a batch it would fail the other requests too.
        raise InvalidSequenceError(
            f"{where}.token_type_ids: types must lie from 0 to {token_types - 1}"
        )
    return ids, kinds


class ShardServicer(shard_pb2_grpc.ShardServiceServicer):
    """Transport only: everything else is the stage's and the engine's."""

    def __init__(self, stage: Stage, *, max_request_sequences: int, token_types: int) -> None:
        """`token_types`: how many the model has; 0 where it reads none."""
        self._stage = stage
        self._token_types = token_types
        self._max_sequences = max_request_sequences
        self._process = psutil.Process()
        self.infer_calls = CallServer(
            "miaotui.v1.ShardService/Infer",
            self.Infer,
            lambda status, response: pb.InferStreamResponse(call=status, response=response),
        )
        self._generation = Generation(stage)
        self.generate_calls = StreamedCallServer(
            "miaotui.v1.ShardService/Generate", self._generation.start, pb.GenerateStreamResponse
        )

    async def Describe(
        self, request: pb.ShardServiceDescribeRequest, context: grpc.ServicerContext
    ) -> pb.ShardServiceDescribeResponse:
        """Who this stage is and whether it serves."""
        stage, head = self._stage, self._stage.head
        status, reason = stage.status()
        observer = stage.runner.observer
        writer = head if isinstance(head, GenerationPool) else None
        return pb.ShardServiceDescribeResponse(
            stage=stage.info,
            status=status,
            reason=reason,
            pipeline=stage.pipeline if stage.is_head else (),
            queued_sequences=stage.queued,
            running_sequences=head.running_sequences if head is not None else 0,
            sequences_total=observer.sequences_total,
            tokens_total=observer.tokens_total,
            resident_bytes=self._process.memory_info().rss,
            kv_blocks_used=0 if writer is None else writer.used,
            kv_blocks_cached=0 if writer is None else writer.cached,
            replicas=() if stage.lanes is None else stage.lanes.replicas(),
            batches_total=observer.batches_total,
            compute_micros_total=int(observer.compute_seconds * 1e6),
            written_tokens_total=0 if writer is None else writer.tokens,
            link_micros=int(stage.clock.seconds * 1e6),
        )

    async def Infer(self, request: pb.InferRequest, context: InferContext) -> pb.InferResponse:
        """Span logits, or vectors, of a request's sequences, through all stages."""
        stage, head = self._stage, self._stage.head
        if (refused := refusal(stage, pb.MODEL_KIND_EXTRACTIVE)) is not None:
            await context.abort(refused.code, refused.details)
        assert isinstance(head, Head)
        if not 1 <= len(request.sequences) <= self._max_sequences:
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"sequences: {len(request.sequences)}; a request takes 1 to {self._max_sequences}",
            )
        try:
            check_salt(request.cache_salt)
            sequences = [
                read_sequence(message, stage.info, index, self._token_types)
                for index, message in enumerate(request.sequences)
            ]
        except (InvalidFieldError, InvalidSequenceError) as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        remaining = context.time_remaining()
        deadline = math.inf if remaining is None else time.monotonic() + remaining
        try:
            result = await head.infer(
                request.request_id,
                sequences,
                deadline=deadline,
                trace=inject_context(),
                salt=request.cache_salt,
            )
        except (QueueFullError, PipelineUnavailableError, DeadlineError, ComputeError) as error:
            await context.abort(STATUS_OF_ERROR[type(error)], str(error))
        timings = timings_to_proto(result.timings)
        if stage.info.kind == pb.MODEL_KIND_EMBEDDING:
            vectors = [row.tobytes() for row in result.logits]
            return pb.InferResponse(embeddings=vectors, timings=timings)
        return pb.InferResponse(
            logits=[
                pb.SpanLogits(start=logits[:, 0].tobytes(), end=logits[:, 1].tobytes())
                for logits in result.logits
            ],
            timings=timings,
        )

    async def InferStream(  # type: ignore[override]
        self, request_iterator: AsyncIterator[pb.InferStreamRequest], context: InferContext
    ) -> None:
        """Infer, many times on one stream."""
        await self.infer_calls.serve(request_iterator, context)

    async def Generate(
        self, request: pb.GenerateRequest, context: GenerateContext
    ) -> AsyncIterator[pb.GenerateResponse]:
        """The tokens that follow a prompt, as they come, through all stages."""
        call = SingleCall()
        try:
            call.cancel = self._generation.start(request, context, call)
            # Also where nobody reads on, which this generator would not be told.
            context.add_done_callback(lambda _: call.cancel())  # type: ignore[arg-type]
            async for response in call:
                yield response
        except CallError as error:
            await context.abort(error.code, error.details)
        finally:
            call.cancel()

    async def GenerateStream(  # type: ignore[override]
        self,
        request_iterator: AsyncIterator[pb.GenerateStreamRequest],
        context: GenerateStreamContext,
    ) -> None:
        """Generate, many times on one stream."""
        await self.generate_calls.serve(request_iterator, context)

    async def Forward(  # type: ignore[override]
        self, request_iterator: AsyncIterator[bytes], context: ForwardContext
    ) -> None:
        """Registered by hand with raw bytes (server.py); see Stage.forward."""
        await self._stage.forward(request_iterator, context)
