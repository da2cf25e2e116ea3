"""What the HTTP API tells beside answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, TypeAdapter

from gateway.http.problems import Problem
from gateway.schema import QaResponse
from gateway.upstream import Upstream
from miaotui.v1 import shard_pb2 as shard_pb
from miaotui.v1 import tensor_pb2 as tensor_pb


@dataclass(frozen=True, slots=True)
class BatchLine:
    """The outcome of one question of a batch: a response or an error."""

    index: Annotated[int, Field(ge=0, description="The question's index in the request.")]
    response: QaResponse | None = None
    error: Problem | None = None


@dataclass(frozen=True, slots=True)
class ModelView:
    """A model served."""

    name: str
    fingerprint: str
    model_type: Annotated[str, Field(description='Transformers\' model_type, such as "bert".')]
    stages: Annotated[int, Field(description="Stages that it is split into.")]
    layers: int
    max_length: Annotated[int, Field(description="Longest window in tokens.")]
    ready: Annotated[bool, Field(description="Whether it answers now.")]


@dataclass(frozen=True, slots=True)
class ModelList:
    """The models served."""

    models: list[ModelView]


@dataclass(frozen=True, slots=True)
class StageView:
    """One stage of the pipeline."""

    index: int
    first_layer: int
    end_layer: Annotated[int, Field(description="One past the last layer held.")]
    parameter_bytes: Annotated[int, Field(description="Bytes of the stage's own parameters.")]
    device: str
    compute_dtype: str
    wire_dtype: str


@dataclass(frozen=True, slots=True)
class PipelineView:
    """The stages, as stage 0 told them at the gateway's last look."""

    ready: bool
    reason: Annotated[str, Field(description="Why it does not answer; empty when ready.")]
    stages: list[StageView]
    model_parameter_bytes: int
    queued_sequences: Annotated[int, Field(description="Windows that wait at stage 0.")]
    running_sequences: Annotated[int, Field(description="Windows in the pipeline.")]
    sequences_total: int
    tokens_total: int


@dataclass(frozen=True, slots=True)
class Alive:
    """The process runs."""

    status: Annotated[str, Field(examples=["ok"])]


BATCH_LINE: TypeAdapter[BatchLine] = TypeAdapter(BatchLine)
MODELS: TypeAdapter[ModelList] = TypeAdapter(ModelList)
PIPELINE: TypeAdapter[PipelineView] = TypeAdapter(PipelineView)
ALIVE: TypeAdapter[Alive] = TypeAdapter(Alive)


def models_of(upstream: Upstream) -> ModelList:
    """The model served now, or the last one seen, marked as not ready."""
    served = upstream.served or upstream.last
    if served is None:
        return ModelList([])
    return ModelList(
        [
            ModelView(
                name=served.name,
                fingerprint=served.fingerprint,
                model_type=served.model_type,
                stages=served.stages,
                layers=served.layers,
                max_length=served.max_length,
                ready=upstream.served is not None,
            )
        ]
    )


def pipeline_of(upstream: Upstream) -> PipelineView:
    """The stages as last seen."""
    told = upstream.pipeline or shard_pb.ShardServiceDescribeResponse()
    return PipelineView(
        ready=upstream.served is not None,
        reason=upstream.reason,
        stages=[_stage(info) for info in told.pipeline],
        model_parameter_bytes=told.stage.model_parameter_bytes,
        queued_sequences=told.queued_sequences,
        running_sequences=told.running_sequences,
        sequences_total=told.sequences_total,
        tokens_total=told.tokens_total,
    )


def _stage(info: shard_pb.StageInfo) -> StageView:
    return StageView(
        index=info.index,
        first_layer=info.first_layer,
        end_layer=info.end_layer,
        parameter_bytes=info.parameter_bytes,
        device=info.device,
        compute_dtype=_dtype(info.compute_dtype),
        wire_dtype=_dtype(info.wire_dtype),
    )


def _dtype(value: tensor_pb.Dtype.ValueType) -> str:
    return tensor_pb.Dtype.Name(value).removeprefix("DTYPE_").lower()
