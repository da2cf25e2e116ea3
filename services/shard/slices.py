"""A decoder's part of the stream's messages: slices of sequences, and sampled tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from miaotui.engine.decode.types import DecodeSlice, SampledTokens, SequenceStart, TokenIds
from miaotui.engine.tensors import TensorFormatError
from miaotui.v1 import shard_pb2 as pb
from services.shard.sampling import (
    InvalidFieldError,
    logprobs_from_proto,
    logprobs_to_proto,
    read_ids,
    read_sampling,
    sampling_to_proto,
)


@dataclass(frozen=True, slots=True)
class DecodeLimits:
    """What a decoder's slices must keep to."""

    vocabulary: int
    context: int
    """Tokens of the longest sequence."""
    blocks: int
    """KV blocks of the stage that takes the slices."""
    block_tokens: int
    source_rows: int = 0
    """Encoder-decoder models: rows of activations that the encoder makes for a sequence."""
    embedded: bool = True
    """Whether the stage before sends a row a token: of an encoder-decoder model, only those
    behind the decoder's first layer do."""

    def rows(self, slices: Sequence[DecodeSlice], tokens: int) -> int:
        """Rows of activations that come with a batch."""
        begun = sum(item.begin is not None for item in slices) if self.source_rows else 0
        return begun * self.source_rows + (tokens if self.embedded else 0)


def _to_bytes(ids: TokenIds) -> bytes:
    return np.asarray(ids, np.int32).tobytes()


def slice_to_proto(item: DecodeSlice) -> pb.DecodeSlice:
    """A slice to its message."""
    begin = None
    if (start := item.begin) is not None:
        begin = pb.SequenceStart(
            sampling=sampling_to_proto(start.sampling),
            prompt=_to_bytes(start.prompt),
            written=_to_bytes(start.written),
        )
    return pb.DecodeSlice(
        sequence_id=item.sequence_id,
        start=item.start,
        blocks=_to_bytes(item.blocks),
        samples=item.samples,
        draft=_to_bytes(item.draft),
        begin=begin,
        tokens=_to_bytes(item.tokens),
    )


def read_slices(messages: Sequence[pb.SequenceMeta], limits: DecodeLimits) -> list[DecodeSlice]:
    """The slices of a batch's sequences. Raises `TensorFormatError` for what cannot be."""
    tables = [message.decode.blocks for message in messages]
    if any(len(table) % 4 for table in tables):
        raise TensorFormatError("a KV block table of broken int32 values")
    # All at once: this is done for every batch, at every stage.
    joined: TokenIds = np.frombuffer(b"".join(tables), np.int32)
    if len(joined) and (int(joined.min()) < 0 or int(joined.max()) >= limits.blocks):
        raise TensorFormatError(f"a KV block beyond the {limits.blocks} that this stage has")
    slices: list[DecodeSlice] = []
    first = 0
    for message, table in zip(messages, tables, strict=True):
        if not message.HasField("decode"):
            raise TensorFormatError("a decoder's batch with a sequence that has no place in it")
        end = first + len(table) // 4
        slices.append(_read_slice(message, joined[first:end], limits))
        first = end
    return slices


def _read_slice(message: pb.SequenceMeta, blocks: TokenIds, limits: DecodeLimits) -> DecodeSlice:
    decode, length = message.decode, message.length
    end = decode.start + length
    if end > limits.context:
        raise TensorFormatError(
            f"a slice up to token {end}; this model takes {limits.context} at most"
        )
    needed = -(-limits.source_rows // limits.block_tokens) - (-end // limits.block_tokens)
    if len(blocks) < needed:
        about = f" and {limits.source_rows} rows" if limits.source_rows else ""
        raise TensorFormatError(
            f"{len(blocks)} KV blocks of {limits.block_tokens} tokens for {end} tokens{about}"
        )
    if not decode.sequence_id:
        raise TensorFormatError("a sequence without an id")
    try:
        draft = read_ids(decode.draft, "draft", limits.vocabulary)
        begin = _read_start(decode.begin, limits) if decode.HasField("begin") else None
        tokens = read_ids(decode.tokens, "tokens", limits.vocabulary)
    except InvalidFieldError as error:
        raise TensorFormatError(str(error)) from error
    nothing = not decode.samples and not len(draft)
    if not nothing and not decode.samples == 1 + len(draft) <= length:
        raise TensorFormatError(
            f"{decode.samples} samples in {length} tokens of which {len(draft)} are guessed"
        )
    if len(tokens) != (length if limits.source_rows else 0):
        raise TensorFormatError(f"{len(tokens)} token ids with a slice of {length} tokens")
    return DecodeSlice(
        decode.sequence_id, decode.start, blocks, decode.samples, draft, begin, tokens
    )


def _read_start(message: pb.SequenceStart, limits: DecodeLimits) -> SequenceStart:
    return SequenceStart(
        read_sampling(message.sampling, limits.vocabulary),
        read_ids(message.prompt, "prompt", limits.vocabulary),
        read_ids(message.written, "written", limits.vocabulary),
    )


def sampled_to_proto(item: SampledTokens) -> pb.SampledTokens:
    """A sequence's sampled tokens to their message."""
    return pb.SampledTokens(
        sequence_id=item.sequence_id,
        token_ids=_to_bytes(item.token_ids),
        logprobs=map(logprobs_to_proto, item.logprobs),
        complete=item.complete,
    )


def read_sampled(message: pb.SampledTokens, vocabulary: int) -> SampledTokens:
    """A sequence's sampled tokens. Raises `TensorFormatError`."""
    try:
        tokens = read_ids(message.token_ids, "token_ids", vocabulary)
    except InvalidFieldError as error:
        raise TensorFormatError(str(error)) from error
    if not len(tokens) or len(message.logprobs) not in (0, len(tokens)):
        raise TensorFormatError(
            f"{len(tokens)} sampled tokens with {len(message.logprobs)} log probabilities"
        )
    logprobs = [logprobs_from_proto(place) for place in message.logprobs]
    return SampledTokens(message.sequence_id, tokens, logprobs, message.complete)
