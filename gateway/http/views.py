"""What the HTTP API tells beside answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from gateway.generation.scenarios import SCENARIOS
from gateway.http.problems import Problem
from gateway.models import Models
from gateway.schema import QaResponse
from gateway.served import Role, Served
from gateway.stages import StageReplica, State
from gateway.upstream import Pair
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
    max_length: Annotated[
        int,
        Field(description="Longest window in tokens; of a generative model, prompt and text."),
    ]
    ready: Annotated[bool, Field(description="Whether it answers now.")]
    kind: Annotated[
        Role,
        Field(
            description="extractive: finds spans; generative: writes text; transcribing: writes "
            "down what is said; captioning: describes pictures."
        ),
    ]


@dataclass(frozen=True, slots=True)
class OpenAiModel:
    """A model in OpenAI's shape."""

    id: Annotated[str, Field(description="The name, for `model` of a request.")]
    created: Annotated[int, Field(description="When the gateway began to serve, in Unix time.")]
    object: Literal["model"] = "model"
    owned_by: str = "miaotui"


@dataclass(frozen=True, slots=True)
class ModelList:
    """The models served: as Miaotui tells of them, and in OpenAI's shape."""

    models: list[ModelView]
    data: Annotated[list[OpenAiModel], Field(description="Those that are ready.")]
    object: Literal["list"] = "list"


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """A replica of a stage."""

    replica: Annotated[int, Field(description="Among those of its stage, from 0.")]
    address: Annotated[str, Field(description="host:port.")]
    state: State
    reason: Annotated[str, Field(description="Why it does not serve; empty where it does.")]
    model_fingerprint: Annotated[
        str, Field(description="During an upgrade there may be two; empty: not told.")
    ]
    memory_bytes: Annotated[int | None, Field(description="Of its process, where told.")]
    queued_sequences: Annotated[int | None, Field(description="What waits there, where told.")]


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
    replicas: list[ReplicaView]


@dataclass(frozen=True, slots=True)
class PipelineView:
    """The stages of a model, as stage 0 told them at the gateway's last look."""

    kind: Role
    ready: bool
    reason: Annotated[str, Field(description="Why it does not answer; empty when ready.")]
    stages: list[StageView]
    model_parameter_bytes: int
    queued_sequences: Annotated[int, Field(description="Windows that wait at stage 0.")]
    running_sequences: Annotated[int, Field(description="Windows in the pipeline.")]
    sequences_total: int
    tokens_total: int
    others: Annotated[list[PipelineView], Field(description="Those of the other models.")]


@dataclass(frozen=True, slots=True)
class ScenarioView:
    """A ready prompt."""

    name: Annotated[str, Field(description="For `scenario` of a chat request.")]
    title: Annotated[dict[str, str], Field(description='By language, "en" and "zh".')]
    instruction: Annotated[
        dict[str, str],
        Field(description="What precedes the user's message, in the language of that."),
    ]
    needs_target: Annotated[bool, Field(description="Whether it heeds `to`, a language.")]


@dataclass(frozen=True, slots=True)
class ScenarioList:
    """The ready prompts for models that write."""

    scenarios: list[ScenarioView]


@dataclass(frozen=True, slots=True)
class Alive:
    """The process runs."""

    status: Annotated[str, Field(examples=["ok"])]


BATCH_LINE: TypeAdapter[BatchLine] = TypeAdapter(BatchLine)
OPENAI_MODEL: TypeAdapter[OpenAiModel] = TypeAdapter(OpenAiModel)
MODELS: TypeAdapter[ModelList] = TypeAdapter(ModelList)
PIPELINE: TypeAdapter[PipelineView] = TypeAdapter(PipelineView)
ALIVE: TypeAdapter[Alive] = TypeAdapter(Alive)
SCENARIO_LIST: TypeAdapter[ScenarioList] = TypeAdapter(ScenarioList)


def scenario_list() -> ScenarioList:
    """All ready prompts."""
    return ScenarioList(
        [
            ScenarioView(name, dict(one.title), dict(one.instruction), one.needs_target)
            for name, one in SCENARIOS.items()
        ]
    )


def models_of(models: Models) -> ModelList:
    """The models served now, or the last ones seen, marked as not ready."""
    known = [(pair, served) for pair in models.pairs if (served := pair.served or pair.last)]
    return ModelList(
        models=[
            ModelView(
                name=served.name,
                fingerprint=served.fingerprint,
                model_type=served.model_type,
                stages=served.stages,
                layers=served.layers,
                max_length=served.max_length,
                ready=pair.served is not None,
                kind=pair.role,
            )
            for pair, served in known
        ],
        data=[openai_model(pair, served) for pair, served in known if pair.served is not None],
    )


def openai_model(pair: Pair[Any, Any], served: Served) -> OpenAiModel:
    """A model in OpenAI's shape."""
    return OpenAiModel(id=served.name, created=pair.since)


def pipeline_of(models: Models) -> PipelineView:
    """The stages as last seen; the extractive model's first, the encoder's last."""
    first, *others = (_pipeline(pair) for pair in models.all)
    return replace(first, others=others)


def _pipeline(pair: Pair[Any, Any]) -> PipelineView:
    told = pair.pipeline or shard_pb.ShardServiceDescribeResponse()
    return PipelineView(
        kind=pair.role,
        ready=pair.served is not None,
        reason=pair.reason,
        stages=[_stage(info, pair.stages) for info in told.pipeline],
        model_parameter_bytes=told.stage.model_parameter_bytes,
        queued_sequences=told.queued_sequences,
        running_sequences=told.running_sequences,
        sequences_total=told.sequences_total,
        tokens_total=told.tokens_total,
        others=[],
    )


def _stage(info: shard_pb.StageInfo, known: Sequence[StageReplica]) -> StageView:
    return StageView(
        index=info.index,
        first_layer=info.first_layer,
        end_layer=info.end_layer,
        parameter_bytes=info.parameter_bytes,
        device=info.device,
        compute_dtype=_dtype(info.compute_dtype),
        wire_dtype=_dtype(info.wire_dtype),
        replicas=[_replica(one) for one in known if one.index == info.index],
    )


def _replica(one: StageReplica) -> ReplicaView:
    return ReplicaView(
        replica=one.replica,
        address=one.address,
        state=one.state,
        reason=one.reason,
        model_fingerprint="" if one.info is None else one.info.model_fingerprint,
        memory_bytes=one.memory_bytes,
        queued_sequences=None if one.told is None else one.told.queued_sequences,
    )


def _dtype(value: tensor_pb.Dtype.ValueType) -> str:
    return tensor_pb.Dtype.Name(value).removeprefix("DTYPE_").lower()
