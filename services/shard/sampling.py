"""Token ids and sampling parameters: messages to what the engine takes, checked, and back."""

from __future__ import annotations

import math

import numpy as np

from miaotui.engine.decode.types import PlaceLogprobs, SamplingParams, TokenIds
from miaotui.v1 import shard_pb2 as pb

MAX_LOGPROBS = 20
MAX_SCHEMA_BYTES = 64 * 1024
_SEED_MASK = (1 << 64) - 1


class InvalidFieldError(ValueError):
    """A message's field holds what cannot be; the text begins with the field's name."""


def read_ids(raw: bytes, field: str, vocabulary: int) -> TokenIds:
    """Token ids, int32 [tokens], a view of the message's bytes. Raises `InvalidFieldError`."""
    if len(raw) % 4:
        raise InvalidFieldError(f"{field}: {len(raw)} bytes; int32 ids take 4 bytes each")
    ids: TokenIds = np.frombuffer(raw, dtype=np.int32)
    if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= vocabulary):
        raise InvalidFieldError(
            f"{field}: ids must lie from 0 to {vocabulary - 1}; "
            "was the text tokenised for another model?"
        )
    return ids


def _within(value: float, field: str, low: float, high: float, *, above: bool = False) -> float:
    if not math.isfinite(value) or value > high or value < low or (above and value == low):
        if math.isinf(high):
            bounds = "a number" if math.isinf(low) else f"{'above' if above else 'at least'} {low}"
        else:
            bounds = f"{'above' if above else 'from'} {low} {'up ' if above else ''}to {high}"
        raise InvalidFieldError(f"{field}: {value}; must be {bounds}")
    return value


def read_sampling(message: pb.SamplingParams, vocabulary: int) -> SamplingParams:
    """Sampling parameters. Raises `InvalidFieldError`."""
    where = "sampling."
    if message.HasField("logprobs") and message.logprobs > MAX_LOGPROBS:
        raise InvalidFieldError(f"{where}logprobs: {message.logprobs}; at most {MAX_LOGPROBS}")
    if len(message.json_schema.encode()) > MAX_SCHEMA_BYTES:
        raise InvalidFieldError(f"{where}json_schema: at most {MAX_SCHEMA_BYTES // 1024} KiB")
    bias = dict(message.logit_bias)
    for token, value in bias.items():
        if token >= vocabulary:
            raise InvalidFieldError(
                f"{where}logit_bias: token {token}; ids must lie from 0 to {vocabulary - 1}"
            )
        _within(value, f"{where}logit_bias[{token}]", -math.inf, math.inf)
    has = message.HasField
    top_p = message.top_p if has("top_p") else 1.0
    repetition = message.repetition_penalty if has("repetition_penalty") else 1.0
    return SamplingParams(
        temperature=_within(message.temperature, f"{where}temperature", 0, math.inf),
        # More than there are is all.
        top_k=min(message.top_k, vocabulary),
        top_p=_within(top_p, f"{where}top_p", 0, 1, above=True),
        min_p=_within(message.min_p, f"{where}min_p", 0, 1),
        repetition_penalty=_within(
            repetition, f"{where}repetition_penalty", 0, math.inf, above=True
        ),
        presence_penalty=_within(
            message.presence_penalty, f"{where}presence_penalty", -math.inf, math.inf
        ),
        frequency_penalty=_within(
            message.frequency_penalty, f"{where}frequency_penalty", -math.inf, math.inf
        ),
        seed=message.seed,
        logprobs=message.logprobs if has("logprobs") else None,
        logit_bias=bias,
        json_schema=message.json_schema,
    )


def sampling_to_proto(params: SamplingParams) -> pb.SamplingParams:
    """Sampling parameters to their message."""
    return pb.SamplingParams(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        seed=params.seed & _SEED_MASK,
        logprobs=params.logprobs,
        logit_bias=params.logit_bias,
        json_schema=params.json_schema,
    )


def logprobs_to_proto(place: PlaceLogprobs) -> pb.PlaceLogprobs:
    """One place's log probabilities to their message."""
    token, value = place.chosen
    return pb.PlaceLogprobs(
        chosen=pb.TokenLogprob(token_id=token, logprob=value),
        top=[pb.TokenLogprob(token_id=token, logprob=value) for token, value in place.top],
    )


def logprobs_from_proto(message: pb.PlaceLogprobs) -> PlaceLogprobs:
    """One place's log probabilities."""
    return PlaceLogprobs(
        (message.chosen.token_id, message.chosen.logprob),
        tuple((item.token_id, item.logprob) for item in message.top),
    )
