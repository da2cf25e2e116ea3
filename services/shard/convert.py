"""Between the engine's batches and the stream's messages."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping

from miaotui.engine.batch import Batch, DropCode, Dropped, SequenceMeta, StageTiming
from miaotui.engine.tensors import TensorFormatError, from_wire, to_wire
from miaotui.v1 import shard_pb2 as pb
from miaotui.v1 import tensor_pb2
from services.shard.codec import Frame

DTYPES: Mapping[str, tensor_pb2.Dtype.ValueType] = {
    "float32": tensor_pb2.DTYPE_FLOAT32,
    "float16": tensor_pb2.DTYPE_FLOAT16,
    "bfloat16": tensor_pb2.DTYPE_BFLOAT16,
}
DTYPE_NAMES: Mapping[tensor_pb2.Dtype.ValueType, str] = {
    number: name for name, number in DTYPES.items()
}


def _meta_to_proto(meta: SequenceMeta, now: float) -> pb.SequenceMeta:
    # At least 1: 0 would mean that there is no deadline.
    left = 0 if math.isinf(meta.deadline) else max(1, int((meta.deadline - now) * 1e6))
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
            queue_micros=max(0, int(t.queue * 1e6)),
            compute_micros=max(0, int(t.compute * 1e6)),
            batch_sequences=t.sequences,
            batch_tokens=t.tokens,
        )
        for t in timings
    ]


def batch_to_frame(batch: Batch, wire_dtype: str, *, results: bool) -> Frame:
    """A batch to a frame; its payload is a view of the tensor where the dtypes agree.

    `results`: `hidden` holds float32 logits for stage 0, not activations for the next stage.
    """
    now = time.monotonic()
    header, payload = tensor_pb2.TensorHeader(), memoryview(b"")
    if batch.hidden is not None:
        tensor = to_wire(batch.hidden, "float32" if results else wire_dtype)
        header = tensor_pb2.TensorHeader(dtype=DTYPES[tensor.dtype], shape=tensor.shape)
        payload = tensor.data
    sequences = [_meta_to_proto(meta, now) for meta in batch.sequences]
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
    )
    return Frame(pb.ForwardRequest(batch=message), payload)


def frame_to_batch(frame: Frame, width: int) -> Batch:
    """A batch or results frame to a batch; `hidden` is a view of the frame's bytes.

    `width`: the tensor's second dimension, hidden_size or 2. Raises `TensorFormatError`
    where the tensor, its header and the sequences do not fit one another.
    """
    now = time.monotonic()
    results = frame.message.WhichOneof("frame") == "results"
    message = frame.message.results if results else frame.message.batch
    header = frame.message.results.logits if results else frame.message.batch.hidden
    sequences = [_meta_from_proto(meta, now) for meta in message.sequences]
    if any(meta.length == 0 for meta in sequences):
        raise TensorFormatError("a sequence of no tokens")
    tokens = sum(meta.length for meta in sequences)
    hidden = None
    if sequences:
        name = DTYPE_NAMES.get(header.dtype)
        if name is None:
            raise TensorFormatError(f"dtype {header.dtype} is not known")
        shape = tuple(header.shape)
        if shape != (tokens, width):
            raise TensorFormatError(
                f"a tensor of shape {list(shape)[:4]} for {tokens} tokens of width {width}"
            )
        hidden = from_wire(frame.payload, name, shape)
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
    in_flight = 1 if results else max(1, frame.message.batch.in_flight)
    return Batch(message.batch_id, sequences, hidden, dropped, timings, in_flight)
