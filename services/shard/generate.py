"""Requests for text, and the news of them: messages to what the engine takes, and back."""

from __future__ import annotations

import numpy as np

from miaotui.engine.decode.grammar import SchemaError, check_json_schema
from miaotui.engine.decode.types import (
    GenerationRequest,
    GenerationUpdate,
    GenerationUsage,
    SourceFeatures,
    TextDelta,
    WrittenText,
)
from miaotui.engine.tensors import TensorFormatError, checked_nbytes
from miaotui.v1 import shard_pb2 as pb
from miaotui.v1 import tensor_pb2
from services.shard.sampling import InvalidFieldError, logprobs_to_proto, read_ids, read_sampling

MAX_TEXTS = 128
MAX_STOP_TOKENS = 1024
MAX_SALT_BYTES = 64


def check_salt(salt: bytes) -> None:
    """Refuse a salt longer than any that keeps tenants apart; raises `InvalidFieldError`."""
    if len(salt) > MAX_SALT_BYTES:
        raise InvalidFieldError(f"cache_salt: {len(salt)} bytes; at most {MAX_SALT_BYTES}")


def read_request(
    message: pb.GenerateRequest, *, vocabulary: int, context: int
) -> GenerationRequest:
    """A request. Raises `InvalidFieldError`, whose message the caller may read.

    `context`: tokens of the longest sequence.
    """
    prompt = read_ids(message.input_ids, "input_ids", vocabulary)
    if not len(prompt):
        raise InvalidFieldError("input_ids: a prompt has at least one token")
    if len(prompt) >= context:
        raise InvalidFieldError(
            f"input_ids: {len(prompt)} tokens; this model takes {context} with what it writes, "
            f"so a prompt may have {context - 1} at most"
        )
    if message.n > MAX_TEXTS:
        raise InvalidFieldError(f"n: {message.n}; at most {MAX_TEXTS}")
    stops = message.stop_token_ids
    if len(stops) > MAX_STOP_TOKENS:
        raise InvalidFieldError(f"stop_token_ids: {len(stops)}; at most {MAX_STOP_TOKENS}")
    if stops and max(stops) >= vocabulary:
        raise InvalidFieldError(f"stop_token_ids: ids must lie from 0 to {vocabulary - 1}")
    check_salt(message.cache_salt)
    sampling = read_sampling(message.sampling, vocabulary)
    if sampling.json_schema:
        # Here, because the last stage, which follows it, can refuse nothing any more.
        try:
            check_json_schema(sampling.json_schema)
        except SchemaError as error:
            raise InvalidFieldError(f"sampling.json_schema: {error}") from error
    return GenerationRequest(
        prompt=prompt,
        sampling=sampling,
        max_tokens=min(message.max_tokens, context),
        stop_token_ids=frozenset(stops),
        n=message.n or 1,
        draft_tokens=min(message.draft_tokens, context)
        if message.HasField("draft_tokens")
        else None,
        cache_salt=message.cache_salt,
        source=_read_features(message.features) if message.HasField("features") else None,
        written=_read_resumed(message, vocabulary) if message.resumed else (),
    )


def _read_features(message: pb.Features) -> SourceFeatures:
    """Features, a view of the message's bytes; the head knows what shape they must have."""
    if message.header.dtype != tensor_pb2.DTYPE_FLOAT32:
        raise InvalidFieldError(
            f"features.header.dtype: {message.header.dtype}; must be DTYPE_FLOAT32 (1)"
        )
    shape = tuple(message.header.shape)
    try:
        expected = checked_nbytes("float32", shape)
    except TensorFormatError as error:
        raise InvalidFieldError(f"features.header.shape: {error}") from error
    if len(message.data) != expected:
        raise InvalidFieldError(
            f"features.data: {len(message.data)} bytes; float32 of shape {list(shape)} has "
            f"{expected}"
        )
    return np.frombuffer(message.data, np.float32).reshape(shape)


def _read_resumed(message: pb.GenerateRequest, vocabulary: int) -> tuple[WrittenText, ...]:
    if len(message.resumed) != (message.n or 1):
        raise InvalidFieldError(
            f"resumed: {len(message.resumed)} entries for {message.n or 1} texts; one each"
        )
    if all(text.ended for text in message.resumed):
        raise InvalidFieldError("resumed: all texts have ended; there is nothing to resume")
    return tuple(
        WrittenText(read_ids(text.token_ids, f"resumed[{index}].token_ids", vocabulary), text.ended)
        for index, text in enumerate(message.resumed)
    )


def update_to_proto(update: GenerationUpdate) -> pb.GenerateResponse:
    """News of a request to their message."""
    response = pb.GenerateResponse()
    for delta in update.deltas:
        _add_delta(response, delta)
    if update.usage is not None:
        response.usage.CopyFrom(_usage_to_proto(update.usage))
    return response


def _add_delta(response: pb.GenerateResponse, delta: TextDelta) -> None:
    message = response.deltas.add(
        index=delta.index, token_ids=np.asarray(delta.token_ids, np.int32).tobytes()
    )
    if delta.logprobs:
        message.logprobs.extend(map(logprobs_to_proto, delta.logprobs))
    if delta.finish_reason is not None:
        message.finish_reason = pb.FinishReason.ValueType(int(delta.finish_reason))


def _usage_to_proto(usage: GenerationUsage) -> pb.GenerationUsage:
    return pb.GenerationUsage(
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        completion_tokens=usage.completion_tokens,
        drafted_tokens=usage.drafted_tokens,
        accepted_tokens=usage.accepted_tokens,
        queue_micros=max(0, int(usage.queue_seconds * 1e6)),
        preemptions=usage.preemptions,
    )
