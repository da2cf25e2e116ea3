"""What a stage is, as far as its checkpoint's files tell before any tensor is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from miaotui.models.checkpoint import Checkpoint
from miaotui.models.compressed import compressed_modules
from miaotui.models.decomposed import check_held
from miaotui.models.errors import PartitionError
from miaotui.models.families import Family, StageSkeleton, build_config, find_family
from miaotui.models.fingerprint import model_fingerprint
from miaotui.models.layers import LayerRange
from miaotui.models.precision import dtype_name
from miaotui.models.shape import ModelKind, ModelShape, SourceShape, Task


@dataclass(frozen=True, slots=True)
class StageInfo:
    """Who a stage is and what it holds. Bytes count parameters in the compute dtype.

    `kv_blocks` and `kv_block_tokens`, its KV cache's blocks and the tokens of each, are 0 for
    extractive models, which keep nothing. `source` is there of encoder-decoder models.
    """

    first_layer: int
    end_layer: int
    model_layers: int
    hidden_size: int
    vocab_size: int
    max_sequence_length: int
    model_type: str
    model_name: str
    fingerprint: str
    parameter_bytes: int
    model_parameter_bytes: int
    dtype: str
    device: str
    kind: ModelKind = "extractive"
    kv_blocks: int = 0
    kv_block_tokens: int = 0
    source: SourceShape | None = None

    @classmethod
    def of(
        cls,
        directory: Path,
        layers: LayerRange,
        shape: ModelShape,
        dtype: torch.dtype,
        device: torch.device,
        *,
        fingerprint: str | None,
        parameter_bytes: int,
        model_parameter_bytes: int,
        kv_blocks: int = 0,
        kv_block_tokens: int = 0,
    ) -> StageInfo:
        """Describe the stage that holds these layers; `fingerprint`: None: found out."""
        return cls(
            first_layer=layers.first,
            end_layer=layers.end,
            model_layers=shape.layers,
            hidden_size=shape.hidden_size,
            vocab_size=shape.vocab_size,
            max_sequence_length=shape.max_sequence_length,
            model_type=shape.model_type,
            model_name=directory.resolve().name,
            fingerprint=fingerprint or model_fingerprint(directory),
            parameter_bytes=parameter_bytes,
            model_parameter_bytes=model_parameter_bytes,
            dtype=dtype_name(dtype),
            device=str(device),
            kind=shape.kind,
            kv_blocks=kv_blocks,
            kv_block_tokens=kv_block_tokens,
            source=shape.source,
        )

    @property
    def is_first(self) -> bool:
        """Whether the stage embeds what the model reads first: token ids, or features."""
        return self.first_layer == 0

    @property
    def is_last(self) -> bool:
        """Whether the stage returns span logits, or tokens."""
        return self.end_layer == self.model_layers


def inspect_model(checkpoint: Checkpoint, task: Task = "auto") -> tuple[Family, Any, ModelShape]:
    """Return a checkpoint's family, transformers' configuration, and dimensions.

    Raises:
        UnsupportedModelError: not a family or head that can be served.
        CheckpointError: the configuration is not valid.
    """
    family = find_family(checkpoint.config.get("model_type"), checkpoint.directory, task)
    family.check(checkpoint)
    config = build_config(checkpoint.config, checkpoint.directory)
    return family, config, family.shape(config)


def held_layers(directory: Path, layers: LayerRange | None, shape: ModelShape) -> LayerRange:
    """Return the layers asked for; all where that is None.

    Raises:
        PartitionError: the model has no such layers, or these must stay with others.
    """
    if layers is None:
        return LayerRange(0, shape.layers)
    check_held(layers, shape.decomposed_layers)
    if layers.end > shape.layers:
        raise PartitionError(
            f"{directory}: layers {layers} asked for, the model has {shape.layers} "
            f"(0-{shape.layers})"
        )
    return layers


def parameter_bytes(skeleton: StageSkeleton, dtype: torch.dtype) -> int:
    """Return the bytes of a stage's parameters in `dtype`; a span head in float32.

    Of a compressed checkpoint, the bytes that its codes and scales take in memory, too.
    """
    head = skeleton.float32
    total = sum(parameter.numel() for parameter in skeleton.root.parameters())
    in_head = 0 if head is None else sum(parameter.numel() for parameter in head.parameters())
    codes = sum(module.resident_bytes() for _, module in compressed_modules(skeleton.root))
    return (total - in_head) * dtype.itemsize + in_head * torch.float32.itemsize + codes
