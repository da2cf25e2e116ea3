"""Between the engine's batches and the stream's messages."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping

import torch

from miaotui.engine.batch import Batch, DropCode, Dropped, SequenceMeta, StageTiming
from miaotui.engine.tensors import INT8, TensorFormatError, from_wire, to_wire
from miaotui.v1 import shard_pb2 as pb
from miaotui.v1 import tensor_pb2
from services.shard.codec import Frame
from services.shard.slices import (
    DecodeLimits,
    read_sampled,
    read_slices,
    sampled_to_proto,
    slice_to_proto,
)

DTYPES: Mapping[str, tensor_pb2.Dtype.ValueType] = {
    "float32": tensor_pb2.DTYPE_FLOAT32,
    "float16": tensor_pb2.DTYPE_FLOAT16,
    "bfloat16": tensor_pb2.DTYPE_BFLOAT16,
    INT8: tensor_pb2.DTYPE_INT8,
}
DTYPE_NAMES: Mapping[tensor_pb2.Dtype.ValueType, str] = {
    number: name for name, number in DTYPES.items()
}

_LONGEST_MICROS = 1 << 62


def _meta_to_proto(meta: SequenceMeta, now: float) -> pb.SequenceMeta:
    if meta.decode is not None:
        # Decoders' stages leave deadlines to stage 0, and report prompts only.
        trace = meta.trace if meta.prefill else {}
        return pb.SequenceMeta(
            request_id=meta.request_id,
            sequence=meta.sequence,
            length=meta.length,
            traceparent=trace.get("traceparent", ""),
            tracestate=trace.get("tracestate", ""),
            decode=slice_to_proto(meta.decode),
        )
    # At least 1: 0 would mean that there is no deadline.
    left = 0 if math.isinf(meta.deadline) else max(1, _micros(meta.deadline - now))
    return pb.SequenceMeta(
        request_id=meta.request_id,
        sequence=meta.sequence,
        length=meta.length,
        timeout_micros=left,
        traceparent=meta.trace.get("traceparent", ""),
        tracestate=meta.trace.get("tracestate", ""),
    )


def _meta_from_proto(meta: pb.SequenceMeta, now: float) -> SequenceMeta:
    trace = {"traceparent": meta.traceparent, "tracestate": meta.tracestate}
    return SequenceMeta(
        request_id=meta.request_id,
        sequence=meta.sequence,
        length=meta.length,
        deadline=now + meta.timeout_micros / 1e6 if meta.timeout_micros else math.inf,
        trace={name: value for name, value in trace.items() if value},
        arrived=now,
    )


def _dropped_to_proto(dropped: Iterable[Dropped]) -> list[pb.DroppedSequence]:
    return [
        pb.DroppedSequence(
            request_id=d.request_id, sequence=d.sequence, code=int(d.code), message=d.message
        )
        for d in dropped
    ]


def timings_to_proto(timings: Iterable[StageTiming]) -> list[pb.StageTiming]:
    """Seconds to microseconds."""
    return [
        pb.StageTiming(
            stage=t.stage,
            queue_micros=_micros(t.queue),
            compute_micros=_micros(t.compute),
            batch_sequences=t.sequences,
            batch_tokens=t.tokens,
        )
        for t in timings
    ]


def _micros(seconds: float) -> int:
    # What another stage said of itself passes through here, and may be anything.
    return min(max(0, int(seconds * 1e6)), _LONGEST_MICROS)


def batch_to_frame(batch: Batch, wire_dtype: str, *, results: bool) -> Frame:
    """A batch to a frame; its payload is a view of the tensor where the dtypes agree.

    `results`: `hidden` holds float32 logits for stage 0, not activations for the next stage;
    a decoder's results are the sampled tokens alone.
    """
    now = time.monotonic()
    header, payload = tensor_pb2.TensorHeader(), memoryview(b"")
    if batch.hidden is not None:
        tensor = to_wire(batch.hidden, "float32" if results else wire_dtype)
        header = tensor_pb2.TensorHeader(dtype=DTYPES[tensor.dtype], shape=tensor.shape)
        payload = tensor.data
    sampled = batch.sampled
    kept = batch.sequences if sampled is None else []
    sequences = [_meta_to_proto(meta, now) for meta in kept]
    dropped = _dropped_to_proto(batch.dropped)
    timings = timings_to_proto(batch.timings)
    if results:
        done = pb.Results(
            batch_id=batch.batch_id,
            logits=header,
            sequences=sequences,
            dropped=dropped,
            timings=timings,
            payload_bytes=payload.nbytes,
            sampled=map(sampled_to_proto, sampled or ()),
        )
        return Frame(pb.ForwardRequest(results=done), payload)
    message = pb.Batch(
        batch_id=batch.batch_id,
        hidden=header,
        sequences=sequences,
        dropped=dropped,
        timings=timings,
        in_flight=batch.in_flight,
        payload_bytes=payload.nbytes,
        released=batch.released,
    )
    return Frame(pb.ForwardRequest(batch=message), payload)


def frame_to_batch(
    frame: Frame, width: int, decode: DecodeLimits | None = None, *, vectors: bool = False
) -> Batch:
    """A batch or results frame to a batch; `hidden` is a view of the frame's bytes.

    `width`: the tensor's second dimension, hidden_size or 2. `decode`: of a decoder, whose
    results have `sampled` and no tensor. `vectors`: results have a row a
    sequence. Raises `TensorFormatError` where the tensor, its header and the sequences do not
    fit one another.
    """
    now = time.monotonic()
    if frame.message.WhichOneof("frame") == "results":
        results = frame.message.results
        batch = _batch(results, now)
        if decode is None:
            rows = len(batch.sequences) if vectors else batch.tokens
            batch.hidden = _tensor(frame, results.logits, batch, (rows, width))
        elif batch.sequences or frame.payload.nbytes:
            raise TensorFormatError("a decoder's results with a tensor")
        else:
            batch.sampled = [read_sampled(item, decode.vocabulary) for item in results.sampled]
        return batch
    message = frame.message.batch
    batch = _batch(message, now)
    rows = batch.tokens
    batch.in_flight = max(1, message.in_flight)
    if decode is not None:
        slices = read_slices(message.sequences, decode)
        for meta, item in zip(batch.sequences, slices, strict=True):
            meta.decode = item
        batch.released = list(message.released)
        rows = decode.rows(slices, batch.tokens)
    batch.hidden = _tensor(frame, message.hidden, batch, (rows, width))
    return batch


def _batch(message: pb.Batch | pb.Results, now: float) -> Batch:
    """What batches and results have in common."""
    sequences = [_meta_from_proto(meta, now) for meta in message.sequences]
    if any(meta.length == 0 for meta in sequences):
        raise TensorFormatError("a sequence of no tokens")
    try:
        dropped = [
            Dropped(d.request_id, d.sequence, DropCode(d.code), d.message) for d in message.dropped
        ]
    except ValueError as error:
        raise TensorFormatError("a dropped sequence with an unknown code") from error
    timings = [
        StageTiming(
            stage=t.stage,
            queue=t.queue_micros / 1e6,
            compute=t.compute_micros / 1e6,
            sequences=t.batch_sequences,
            tokens=t.batch_tokens,
        )
        for t in message.timings
    ]
    return Batch(message.batch_id, sequences, None, dropped, timings)


def _tensor(
    frame: Frame, header: tensor_pb2.TensorHeader, batch: Batch, expected: tuple[int, int]
) -> torch.Tensor | None:
    """The batch's tensor; None where no sequence is left."""
    if not batch.sequences:
        return None
    name = DTYPE_NAMES.get(header.dtype)
    if name is None:
        raise TensorFormatError(f"dtype {header.dtype} is not known")
    shape = tuple(header.shape)
    if shape != expected:
        raise TensorFormatError(
            f"a tensor of shape {list(shape)[:4]} for {expected[0]} rows of width {expected[1]}"
        )
    return from_wire(frame.payload, name, shape)
