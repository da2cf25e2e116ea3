"""A model's dimensions, whatever its family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ModelKind = Literal["extractive", "generative", "embedding"]
# What a checkpoint is to be served for; auto: what its family is for.
Task = Literal["auto", "embed"]


# What an encoder listens to or looks at.
Modality = Literal["audio", "image"]


@dataclass(frozen=True, slots=True)
class SourceShape:
    """Dimensions of an encoder-decoder model's encoder.

    `shape` is that of its input: of sound [mel bins, frames], of pictures [channels, height,
    width]. It makes `rows` rows of `width` of it, in `layers` layers, which are the model's
    first. `memory_width` is what the decoder's layers read the rows in.
    """

    modality: Modality
    shape: tuple[int, ...]
    rows: int
    layers: int
    width: int
    intermediate_size: int
    memory_width: int


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What a configuration says about a model's dimensions.

    `max_sequence_length` is in tokens and has RoBERTa's position offset taken off;
    `type_vocab_size` is 0 where the family has no token types. Of decoders only: `kv_heads`
    and `head_dim`, the shape of a token's keys and of its values in each layer, `gated`,
    whether the feed-forward layer has a third matrix, and `tied`, whether the language-model
    head is the embedding table. Of encoder-decoder models: `source`, the encoder's dimensions;
    `layers` are the encoder's and then the decoder's, `hidden_size` is that of the wider, which
    travels between stages, and all else is the decoder's. Of extractive models:
    `decomposed_layers`, so many of the first read question and passage apart.
    """

    model_type: str
    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    vocab_size: int
    type_vocab_size: int
    max_sequence_length: int
    kind: ModelKind = "extractive"
    kv_heads: int = 0
    head_dim: int = 0
    gated: bool = False
    tied: bool = False
    decomposed_layers: int = 0
    source: SourceShape | None = None
