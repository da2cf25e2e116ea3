"""Generate and GenerateStream: requests for text between their messages and the head."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import grpc

from miaotui.engine.decode.pool import GenerationPool
from miaotui.engine.decode.types import GenerationUpdate
from miaotui.engine.decode.validation import InvalidRequestError
from miaotui.engine.head import ComputeError, DeadlineError
from miaotui.engine.observe import RequestObserver
from miaotui.engine.readiness import PipelineUnavailableError
from miaotui.engine.scheduler import QueueFullError
from miaotui.telemetry import inject_context
from miaotui.v1 import shard_pb2 as pb
from services.rpc.calls import CallError
from services.rpc.streaming_server import Context, Outlet
from services.shard.generate import read_request, update_to_proto
from services.shard.sampling import InvalidFieldError
from services.shard.stage import Stage

STATUS_OF_ERROR = {
    InvalidFieldError: grpc.StatusCode.INVALID_ARGUMENT,
    InvalidRequestError: grpc.StatusCode.INVALID_ARGUMENT,
    QueueFullError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    PipelineUnavailableError: grpc.StatusCode.UNAVAILABLE,
    DeadlineError: grpc.StatusCode.DEADLINE_EXCEEDED,
    ComputeError: grpc.StatusCode.INTERNAL,
}


def call_error(error: Exception) -> CallError:
    """The status that the engine's error stands for. Raises `KeyError` for one that it is not."""
    return CallError(STATUS_OF_ERROR[type(error)], str(error))


def refusal(stage: Stage, kind: pb.ModelKind.ValueType) -> CallError | None:
    """Why this stage takes no request for a model of this kind, if it does not."""
    wrong = None
    if stage.info.kind == pb.MODEL_KIND_EMBEDDING and kind == pb.MODEL_KIND_EXTRACTIVE:
        kind = stage.info.kind  # both by Infer
    if stage.info.kind != kind:
        wrong = (
            "this model finds answers or makes vectors and writes no text; ask it by Infer, or "
            "start the stages with a decoder's directory, such as a Llama, Qwen, Mistral, Gemma "
            "or GPT-2 one"
            if kind == pb.MODEL_KIND_GENERATIVE
            else "this model writes text and marks no spans; ask it by Generate, or start the "
            "stages with the directory of a model for extractive question answering"
        )
    elif not stage.is_head:
        wrong = f"this is stage {stage.info.index}; requests go to stage 0"
    if wrong is not None:
        return CallError(grpc.StatusCode.FAILED_PRECONDITION, wrong)
    if stage.draining:
        return CallError(grpc.StatusCode.UNAVAILABLE, "shutting down; try again elsewhere")
    return None


class Generation:
    """Starts requests for text at a stage's head."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def start(
        self, request: pb.GenerateRequest, context: Context, outlet: Outlet
    ) -> Callable[[], None]:
        """Starts a request, and returns what cancels it. Raises `CallError`."""
        stage = self._stage
        if (refused := refusal(stage, pb.MODEL_KIND_GENERATIVE)) is not None:
            raise refused
        head = stage.head
        assert isinstance(head, GenerationPool)
        remaining = context.time_remaining()
        trace = inject_context()
        observer = RequestObserver(trace)

        def news(update: GenerationUpdate | Exception) -> None:
            observer.news(update)
            if isinstance(update, GenerationUpdate):
                outlet.send(update_to_proto(update))
                if update.usage is not None:
                    outlet.end()
            else:
                outlet.end(call_error(update))

        try:
            info = stage.info
            handle = head.submit(
                request.request_id,
                read_request(request, vocabulary=info.vocab_size, context=info.max_sequence_length),
                news,
                deadline=math.inf if remaining is None else time.monotonic() + remaining,
                trace=trace,
            )
        except tuple(STATUS_OF_ERROR) as error:
            raise call_error(error) from error

        def cancel() -> None:
            handle.cancel()
            observer.cancelled()

        return cancel
