"""A stage's modules of an encoder-decoder model: which it holds, and by what names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from miaotui.models.checkpoint import Checkpoint
from miaotui.models.errors import UnsupportedModelError
from miaotui.models.layers import LayerRange
from miaotui.models.paged_attention import paged_attention
from miaotui.models.shape import ModelShape

# The value of `config._attn_implementation` that selects `seq2seq_attention`.
SEQ2SEQ_ATTENTION = "miaotui_seq2seq"


@dataclass(frozen=True, slots=True)
class Seq2SeqSkeleton:
    """The modules of a stage of an encoder-decoder model; None or empty where it lacks them.

    `embed_source` maps features [n, *shape] to [n, rows, width], `finish_source` an encoder's
    last rows [n, rows, width] to [n, rows, memory_width]. `embedding` and `positions` are the
    decoder's tables. `cross` names the attribute of a decoder layer's attention to the
    encoder's rows.
    """

    root: nn.Module
    embed_source: Callable[[torch.Tensor], torch.Tensor] | None
    encoder_layers: tuple[nn.Module, ...]
    finish_source: Callable[[torch.Tensor], torch.Tensor] | None
    embedding: nn.Module | None
    positions: nn.Module | None
    decoder_layers: tuple[nn.Module, ...]
    cross: str
    norm: nn.Module | None
    head: nn.Module | None

    @property
    def float32(self) -> nn.Module | None:
        """The module that is held in float32 whatever the compute dtype: none."""
        return None


@dataclass(frozen=True, slots=True)
class PartNames:
    """Paths, below the whole model, of the parts of an encoder-decoder model."""

    encoder: str
    # Modules that turn features into rows, below the encoder.
    source_embedding: tuple[str, ...]
    encoder_norm: str
    # What is never computed, below the encoder.
    unused: tuple[str, ...]
    projection: str
    decoder: str
    stack: str
    embedding: str
    positions: str
    norm: str
    head: str
    cross: str


def cut_skeleton(
    root: Any,
    names: PartNames,
    shape: ModelShape,
    layers: LayerRange,
    embed: Callable[[torch.Tensor], torch.Tensor],
) -> Seq2SeqSkeleton:
    """Take away from a whole model what the stage with these layers does not hold.

    `embed`: how the model turns features into rows.
    """
    source = shape.source
    assert source is not None
    count = source.layers
    encoder, decoder = root.get_submodule(names.encoder), root.get_submodule(names.decoder)
    stack = getattr(decoder, names.stack)
    for index in range(count):
        if index not in layers:
            encoder.layers[index] = nn.Identity()
    for index in range(shape.layers - count):
        if index + count not in layers:
            stack[index] = nn.Identity()
    for name in names.unused:
        setattr(encoder, name, None)
    first, last = layers.first == 0, layers.end == shape.layers
    finishes, begins = count - 1 in layers, count in layers
    if not first:
        for name in names.source_embedding:
            setattr(encoder, name, None)
    project = getattr(root, names.projection, None) if names.projection else None
    if not finishes:
        setattr(encoder, names.encoder_norm, None)
        if project is not None:
            setattr(root, names.projection, None)
    if not begins:
        setattr(decoder, names.embedding, None)
        setattr(decoder, names.positions, None)
    if not last:
        setattr(decoder, names.norm, None)
        owner, _, head = names.head.rpartition(".")
        setattr(root.get_submodule(owner), head, None)
    norm = getattr(encoder, names.encoder_norm)

    def finish(hidden: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = norm(hidden)
        return rows if project is None else project(rows)

    held_decoder = [index - count for index in layers if index >= count]
    return Seq2SeqSkeleton(
        root=root,
        embed_source=embed if first else None,
        encoder_layers=tuple(encoder.layers[index] for index in layers if index < count),
        finish_source=finish if finishes else None,
        embedding=getattr(decoder, names.embedding),
        positions=getattr(decoder, names.positions),
        decoder_layers=tuple(stack[index] for index in held_decoder),
        cross=names.cross,
        norm=getattr(decoder, names.norm),
        head=root.get_submodule(names.head) if last else None,
    )


def find_sources(
    shape: ModelShape,
    skeleton: Seq2SeqSkeleton,
    checkpoint: Checkpoint,
    names: PartNames,
    stored: Callable[[str], str],
) -> Mapping[str, str]:
    """Return which of the checkpoint's tensors each of the skeleton's parameters is.

    `stored`: the name that a checkpoint may have a parameter under instead of its own.

    Raises:
        UnsupportedModelError: there is no language-model head.
    """
    table, head = f"{names.decoder}.{names.embedding}.weight", f"{names.head}.weight"
    sources = {}
    for name, _ in skeleton.root.named_parameters(remove_duplicate=False):
        sources[name] = name if name in checkpoint.tensors else stored(name)
    for one, other in ((head, table), (table, head)):
        if shape.tied and one in sources and sources[one] not in checkpoint.tensors:
            sources[one] = other
    if head in sources and sources[head] not in checkpoint.tensors:
        raise UnsupportedModelError(
            f"{checkpoint.directory}: this {shape.model_type} checkpoint has no language-model "
            f"head ({head}) and no embeddings that are one; use one that was trained to write text"
        )
    return sources


def seq2seq_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    paged: Any = None,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """A decoder's attention to its text so far where `paged` is given, else an encoder's.

    Args and result as those of `paged_attention`.
    """
    if paged is not None:
        assert scaling is not None
        return paged_attention(
            module, query, key, value, attention_mask, paged=paged, scaling=scaling
        )
    assert attention_mask is None, "every source has the same length"
    output = scaled_dot_product_attention(query, key, value, scale=scaling)
    return output.transpose(1, 2), None


AttentionInterface.register(SEQ2SEQ_ATTENTION, seq2seq_attention)
