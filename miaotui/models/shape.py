"""A model's dimensions, whatever its family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ModelKind = Literal["extractive", "generative"]


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What a configuration says about a model's dimensions.

    `max_sequence_length` is in tokens and has RoBERTa's position offset taken off;
    `type_vocab_size` is 0 where the family has no token types. Of decoders only: `kv_heads`
    and `head_dim`, the shape of a token's keys and of its values in each layer, `gated`,
    whether the feed-forward layer has a third matrix, and `tied`, whether the language-model
    head is the embedding table.
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
