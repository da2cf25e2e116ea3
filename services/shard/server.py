"""A shard service: loads its layers, joins the ring, serves."""

from __future__ import annotations

import asyncio
import logging
import secrets
from typing import TYPE_CHECKING, Any

import grpc
import torch

from miaotui.engine.batch import Batch
from miaotui.engine.decode.head import GenerationHead
from miaotui.engine.decode.observe import GenerationObserver
from miaotui.engine.decode.pool import GenerationPool
from miaotui.engine.decode.settings import GenerationSettings
from miaotui.engine.decode.types import TokenIds
from miaotui.engine.head import Head, HeadSettings
from miaotui.engine.runner import StageRunner
from miaotui.engine.scheduler import Scheduler
from miaotui.engine.worker import ComputeWorker, stay_on_one_thread
from miaotui.models.decoder_stage import DecoderStageModel
from miaotui.models.layers import LayerRange
from miaotui.models.loading import load_stage
from miaotui.models.partition import parse_layers, plan_stages
from miaotui.models.seq2seq_stage import Seq2SeqStageModel
from miaotui.models.stage import StageModel
from miaotui.telemetry import setup_logging, setup_telemetry
from miaotui.v1 import shard_pb2 as pb
from services.rpc.server import RpcServer, run, serve
from services.rpc.spans import spans_to
from services.shard.convert import DTYPE_NAMES, DTYPES
from services.shard.explain import SERVICE as EXPLAIN_SERVICE
from services.shard.explain import ExplainServicer
from services.shard.explain import add_to as add_explanations
from services.shard.gauges import observe
from services.shard.handshake import PROTOCOL_VERSION
from services.shard.servicer import ShardServicer
from services.shard.settings import ShardSettings
from services.shard.stage import Stage

if TYPE_CHECKING:
    from services.shard.passages import SharedPassages

log = logging.getLogger(__name__)

SERVICE = "miaotui.v1.ShardService"
KINDS = {
    "extractive": pb.MODEL_KIND_EXTRACTIVE,
    "generative": pb.MODEL_KIND_GENERATIVE,
    "embedding": pb.MODEL_KIND_EMBEDDING,
}

MODALITIES = {
    "audio": pb.INPUT_MODALITY_AUDIO,
    "image": pb.INPUT_MODALITY_IMAGE,
}

AnyStageModel = StageModel | DecoderStageModel | Seq2SeqStageModel


def layer_range(settings: ShardSettings) -> LayerRange:
    """The layers of this stage: given, or planned so that the stages' costs balance."""
    count = len(settings.addresses)
    wanted = parse_layers(settings.layers) if settings.layers else count
    plan = plan_stages(
        settings.model,
        wanted,
        dtype=settings.dtype,
        device=settings.device,
        task=settings.task,
    )
    if len(plan.stages) != count:
        raise ValueError(
            f"layers {settings.layers!r} names {len(plan.stages)} ranges for {count} stages"
        )
    return plan.stages[settings.stage].layers


def stage_info(model: AnyStageModel, settings: ShardSettings) -> pb.StageInfo:
    """What the neighbours compare."""
    info = model.info
    wire = info.dtype if settings.wire_dtype == "auto" else settings.wire_dtype
    told = pb.StageInfo(
        protocol_version=PROTOCOL_VERSION,
        index=settings.stage,
        stages=len(settings.addresses),
        first_layer=info.first_layer,
        end_layer=info.end_layer,
        model_layers=info.model_layers,
        model_fingerprint=info.fingerprint,
        model_name=info.model_name,
        model_type=info.model_type,
        compute_dtype=DTYPES[info.dtype],
        wire_dtype=DTYPES[wire],
        hidden_size=info.hidden_size,
        max_sequence_length=info.max_sequence_length,
        vocab_size=info.vocab_size,
        device=info.device,
        parameter_bytes=info.parameter_bytes,
        model_parameter_bytes=info.model_parameter_bytes,
        address=settings.address,
        kind=KINDS[info.kind],
        kv_blocks=info.kv_blocks,
        kv_block_tokens=info.kv_block_tokens,
        instance=secrets.token_hex(8),
    )
    if (source := info.source) is not None:
        told.input_modality = MODALITIES[source.modality]
        told.input_shape.extend(source.shape)
        told.encoder_layers = source.layers
        told.source_rows = source.rows
    return told


def build_stage(
    settings: ShardSettings,
    model: AnyStageModel,
    server: RpcServer,
    passages: SharedPassages | None = None,
) -> Stage:
    """Wires engine and links together."""
    stages = len(settings.addresses)
    info = stage_info(model, settings)
    runner = StageRunner(
        ComputeWorker(
            model,
            colocated_stages=settings.colocated,
            prepare=model.warm_up,
            rehearse=model.rehearse if isinstance(model, StageModel) else None,
        ),
        stage=settings.stage,
        passages=passages,
    )
    stage = Stage(
        info,
        runner,
        stages=settings.replicas,
        shares=settings.shares,
        wire_dtype=DTYPE_NAMES[info.wire_dtype],
        inbox_batches=max(settings.inbox_batches, stages + 1),
        part_bytes=settings.part_bytes,
        stall_seconds=settings.stall_seconds,
        status_changed=server.set_serving,
    )
    if stage.is_head:
        writes = info.kind == pb.MODEL_KIND_GENERATIVE
        stage.head = (_writing_head if writes else _reading_head)(settings, stage)
    return stage


def _batch_tokens(settings: ShardSettings, stage: Stage) -> int:
    on_gpu = stage.info.device.startswith("cuda")
    return settings.batch_tokens or (16_384 if on_gpu else 1_024)


def _reading_head(settings: ShardSettings, stage: Stage) -> Head:
    stages = len(settings.addresses)
    scheduler = Scheduler(
        stages=stages,
        batch_tokens=_batch_tokens(settings, stage),
        min_batch_tokens=settings.min_batch_tokens,
        max_sequences=settings.queue_sequences,
        max_tokens=settings.queue_tokens,
    )
    return Head(
        scheduler,
        HeadSettings(
            max_in_flight=settings.max_in_flight or stages + 1,
            grace=settings.reconnect_grace,
            vectors=stage.info.kind == pb.MODEL_KIND_EMBEDDING,
        ),
        compute=lambda batch, jobs: stage.runner.compute(batch, stage.cancelled, jobs),
        send=stage.send if stages > 1 else None,
        cancel=stage.cancel,
    )


def _writing_head(settings: ShardSettings, stage: Stage) -> GenerationPool:
    stages = len(settings.addresses)
    batch_tokens = _batch_tokens(settings, stage)
    on_gpu = stage.info.device.startswith("cuda")
    bounds = GenerationSettings(
        stages=stages,
        vocabulary=stage.info.vocab_size,
        context=stage.info.max_sequence_length,
        max_in_flight=settings.max_in_flight or stages + 1,
        micro_batches=settings.micro_batches or (stages if on_gpu else settings.machines),
        batch_tokens=batch_tokens,
        chunk_tokens=min(settings.chunk_tokens or max(1, batch_tokens // 4), batch_tokens),
        max_running=settings.max_running,
        queue_sequences=settings.queue_sequences,
        queue_tokens=settings.queue_tokens,
        draft_tokens=settings.draft_tokens,
        news_seconds=settings.news_seconds,
        prefix_cache=settings.prefix_cache,
        source_shape=tuple(stage.info.input_shape),
        source_rows=stage.info.source_rows,
        grace=settings.reconnect_grace,
    )

    def head(lane: int, observer: GenerationObserver | None) -> GenerationHead:
        share = stage.shares.of(lane)

        async def compute(batch: Batch, input_ids: TokenIds) -> None:
            await stage.compute(batch, share, input_ids)

        async def send(batch: Batch) -> None:
            batch.lane = lane
            await stage.send(batch)

        return GenerationHead(
            bounds, compute=compute, send=send if stages > 1 else None, observer=observer
        )

    return GenerationPool(stage.shares.count, head)


def _register(server: RpcServer, servicer: ShardServicer) -> None:
    # By hand, as the generated function would, but for Forward: its frames stay bytes and are
    # read without a copy (codec.py).
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Describe": grpc.unary_unary_rpc_method_handler(
            servicer.Describe,
            request_deserializer=pb.ShardServiceDescribeRequest.FromString,
            response_serializer=pb.ShardServiceDescribeResponse.SerializeToString,
        ),
        "Infer": grpc.unary_unary_rpc_method_handler(
            servicer.Infer,
            request_deserializer=pb.InferRequest.FromString,
            response_serializer=pb.InferResponse.SerializeToString,
        ),
        "InferStream": grpc.stream_stream_rpc_method_handler(
            servicer.InferStream,
            request_deserializer=pb.InferStreamRequest.FromString,
            response_serializer=pb.InferStreamResponse.SerializeToString,
        ),
        "Generate": grpc.unary_stream_rpc_method_handler(
            servicer.Generate,
            request_deserializer=pb.GenerateRequest.FromString,
            response_serializer=pb.GenerateResponse.SerializeToString,
        ),
        "GenerateStream": grpc.stream_stream_rpc_method_handler(
            servicer.GenerateStream,
            request_deserializer=pb.GenerateStreamRequest.FromString,
            response_serializer=pb.GenerateStreamResponse.SerializeToString,
        ),
        "Forward": grpc.stream_stream_rpc_method_handler(
            servicer.Forward,
            request_deserializer=None,
            response_serializer=pb.ForwardResponse.SerializeToString,
        ),
    }
    handler = grpc.method_handlers_generic_handler(SERVICE, handlers)
    server.aio.add_generic_rpc_handlers((handler,))


async def serve_shard(settings: ShardSettings) -> None:
    """Loads the stage's layers and serves until SIGINT or SIGTERM."""
    telemetry = setup_telemetry(
        "miaotui-shard", instance=f"shard-{settings.stage}", spans=spans_to(settings.traces_to)
    )
    model = await asyncio.to_thread(_load, settings)
    server = RpcServer(SERVICE, EXPLAIN_SERVICE)
    passages = _share_passages(settings, model)
    stage = build_stage(settings, model, server, passages)
    observe(
        stage,
        model.passages if isinstance(model, StageModel) else None,
        shared=passages is not None,
    )
    servicer = ShardServicer(
        stage,
        max_request_sequences=settings.max_request_sequences,
        token_types=model.shape.type_vocab_size if isinstance(model, StageModel) else 0,
    )
    _register(server, servicer)
    explained = None
    if isinstance(model, StageModel) and model.info.kind == "extractive":
        explained = model
    explanations = ExplainServicer(stage, explained)
    add_explanations(server.aio, explanations)
    ring: list[asyncio.Task[None]] = []

    async def ready() -> None:
        ring.append(asyncio.create_task(stage.run()))

    async def drain() -> None:
        await server.set_serving(False)
        await stage.drain(settings.drain_seconds)
        await asyncio.gather(servicer.infer_calls.drain(1.0), servicer.generate_calls.drain(1.0))

    try:
        await serve(
            server,
            settings.listen or settings.address,
            grace=1.0,
            ready=ready,
            drain=drain,
            metrics_port=settings.metrics_port,
        )
    finally:
        for task in ring:
            task.cancel()
        await explanations.close()
        stage.runner.close()
        if passages is not None:
            await passages.close()
        telemetry.shutdown()


def _share_passages(settings: ShardSettings, model: AnyStageModel) -> SharedPassages | None:
    if settings.passage_redis_url is None or not isinstance(model, StageModel):
        return None
    # Here, so that other stages do not load a client of Redis.
    from services.shard.passages import share_passages

    return share_passages(settings, model)


def _load(settings: ShardSettings) -> AnyStageModel:
    layers = layer_range(settings)
    log.info("loading layers %s of %s", layers, settings.model.name)
    model = load_stage(
        settings.model,
        layers,
        dtype=settings.dtype,
        device=settings.device,
        kv_cache_bytes=settings.kv_cache_bytes or None,
        kv_block_tokens=settings.kv_block_tokens,
        kv_sharers=settings.colocated,
        task=settings.task,
        passage_cache_bytes=settings.passage_cache_bytes,
    )
    log.info(
        "%.1f of %.1f MB of parameters, %s on %s",
        model.info.parameter_bytes / 1e6,
        model.info.model_parameter_bytes / 1e6,
        model.info.dtype,
        model.info.device,
    )
    if model.info.kv_blocks:
        tokens = model.info.kv_blocks * model.info.kv_block_tokens
        log.info("room for keys and values of %d tokens", tokens)
    return model


def main(settings: ShardSettings) -> int:
    """Runs the service; returns the process's exit code: 2 for a configuration error."""
    setup_logging(f"shard-{settings.stage}", settings.log_level)
    torch.set_grad_enabled(False)
    stay_on_one_thread()
    return run(lambda: serve_shard(settings))
