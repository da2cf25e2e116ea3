"""One stage of a decoder: embeddings if it is the first, layers, head and sampler if the last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from miaotui.engine.decode.grammar import Grammars
from miaotui.engine.decode.sampler import Sampler, SampleRows
from miaotui.engine.decode.types import DecodeSlice, SampledTokens, SamplingParams, SequenceStart
from miaotui.models.checkpoint import Checkpoint
from miaotui.models.decoder_families import DecoderFamily, DecoderSkeleton
from miaotui.models.decoder_fused import fuse, fused_head, fused_norm, rotation
from miaotui.models.errors import BatchError, UnsupportedModelError
from miaotui.models.kv_cache import KVCache, count_blocks
from miaotui.models.layers import LayerRange
from miaotui.models.memory import trim_heap
from miaotui.models.paged_attention import COPIED_ROW_TOKENS, ROW_TOKENS, Paged, reads_in_place
from miaotui.models.paged_layout import PagedLayout
from miaotui.models.precision import resolve_device, resolve_dtype
from miaotui.models.shape import ModelShape
from miaotui.models.stage import (
    StageInfo,
    accept_hidden,
    accept_ids,
    check_materialised,
    held_layers,
    inspect_model,
    parameter_bytes,
)

# The id of the sequence that warms up; the head's count from 0.
_WARM_UP_ID = -1


@dataclass(frozen=True, slots=True)
class DecoderBatch:
    """A decoder stage's input: slices of sequences laid end to end, without padding.

    `lengths` are the slices' tokens, in order. `input_ids`, integer [tokens], for the first
    stage; `hidden`, [tokens, hidden_size] of any floating-point type, for the others.
    `released` are ids of sequences that have ended.
    """

    lengths: Sequence[int]
    slices: Sequence[DecodeSlice]
    input_ids: torch.Tensor | None = None
    hidden: torch.Tensor | None = None
    released: Sequence[int] = ()


class DecoderStageModel:
    """The modules of one decoder stage and its KV cache. Use from one thread at a time."""

    def __init__(
        self,
        skeleton: DecoderSkeleton,
        shape: ModelShape,
        info: StageInfo,
        cache: KVCache,
        sampler: Sampler | None,
        *,
        fused: bool,
    ) -> None:
        """Take loaded modules; use `load` instead."""
        self.info = info
        self.shape = shape
        self.cache = cache
        self._skeleton = skeleton
        self._sampler = sampler
        self._device = torch.device(info.device)
        self._dtype: torch.dtype = getattr(torch, info.dtype)
        self._rotation = rotation if fused else _unchanged
        in_place = reads_in_place(self._dtype, self._device)
        self._row_tokens = ROW_TOKENS if in_place else COPIED_ROW_TOKENS
        config: Any = skeleton.root.config
        self._softcap: float | None = getattr(config, "final_logit_softcapping", None)

    @classmethod
    def load(
        cls,
        directory: Path | str,
        layers: LayerRange | None = None,
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        fingerprint: str | None = None,
        kv_cache_bytes: int | None = None,
        kv_block_tokens: int = 16,
        kv_sharers: int = 1,
        fused: bool = True,
    ) -> DecoderStageModel:
        """Read a stage from a Hugging Face model directory: its own tensors and no others.

        Args:
            directory: holds `config.json` and safetensors weights.
            layers: the layers to hold; None: all.
            dtype: "auto", "float32", "float16" or "bfloat16", or a torch dtype.
            device: "auto", "cpu", "cuda", "cuda:N".
            fingerprint: the model's, where it is known already; None: computed or cached.
            kv_cache_bytes: for this stage's keys and values; None: see `count_blocks`.
            kv_block_tokens: tokens a block of the cache.
            kv_sharers: stages that share this machine's memory; see `count_blocks`.
            fused: whether the faster stand-ins of `miaotui.models.decoder_fused` are put in place;
                else transformers' modules compute as they are, as a reference.

        Raises:
            UnsupportedModelError: not a decoder that can be served.
            CheckpointError: files are missing, damaged or do not belong together.
            PartitionError: the model has no such layers.
            ModelError: the KV cache would be too small.
            ValueError: no such dtype or device, or `kv_block_tokens` is below 1.
        """
        directory = Path(directory)
        if kv_block_tokens < 1:
            raise ValueError(f"kv_block_tokens is {kv_block_tokens}; it must be at least 1")
        target = resolve_device(device)
        compute = resolve_dtype(dtype, target)
        checkpoint = Checkpoint.open(directory)
        family, config, shape = inspect_model(checkpoint)
        if not isinstance(family, DecoderFamily):
            raise UnsupportedModelError(
                f"{directory}: a {family.model_type} model finds answers and does not generate text"
            )
        layers = held_layers(directory, layers, shape)
        skeleton = family.skeleton(config, layers)
        size = parameter_bytes(skeleton, compute)
        sources = family.sources(skeleton, checkpoint)
        fill_root(skeleton.root, sources, checkpoint, compute, target)
        if skeleton.rotary is not None:
            skeleton.rotary.to(target)
        if fused:
            skeleton = _fuse(skeleton)
        blocks = count_blocks(
            shape, len(layers), kv_block_tokens, compute, target, kv_cache_bytes, kv_sharers
        )
        whole = family.skeleton(config, LayerRange(0, shape.layers))
        info = StageInfo.of(
            directory,
            layers,
            shape,
            compute,
            target,
            fingerprint=fingerprint,
            parameter_bytes=size,
            model_parameter_bytes=parameter_bytes(whole, compute),
            kv_blocks=blocks,
            kv_block_tokens=kv_block_tokens,
        )
        cache = KVCache(shape, len(layers), blocks, kv_block_tokens, compute, target)
        sampler = None
        if info.is_last:
            grammars = Grammars(directory, shape.vocab_size)
            sampler = Sampler(shape.vocab_size, target, grammars)
        stage = cls(skeleton, shape, info, cache, sampler, fused=fused)
        trim_heap()
        return stage

    @torch.inference_mode()
    def run(self, batch: DecoderBatch) -> torch.Tensor | list[SampledTokens]:
        """Compute what this stage computes, and keep the slices' keys and values.

        Returns:
            [tokens, hidden_size] in the compute dtype, on `info.device`; on the last stage one
            entry for each slice with `samples`, in order.

        Raises:
            BatchError: the batch does not fit this stage.
        """
        if self._sampler is not None:
            self._sampler.release(batch.released)
        layout = PagedLayout(
            batch.lengths, batch.slices, self.cache, self._device, row_tokens=self._row_tokens
        )
        self._check_lengths(batch)
        if self._skeleton.embedding is not None:
            hidden = self._embed(batch.input_ids, layout)
        else:
            hidden = self._accept(batch.hidden, layout)
        hidden = self._layers(hidden, layout)
        return hidden if self._sampler is None else self._sample(hidden, batch, layout)

    def warm_up(self) -> None:
        """Run made-up tokens, so that no request pays for first-call set-up.

        Writes to the cache's first block; call it before the first batch.
        """
        length = min(8, self.info.kv_block_tokens, self.info.max_sequence_length)
        blocks = np.zeros(1, np.int32)
        none = np.zeros(0, np.int32)
        begin = SequenceStart(SamplingParams(), none, none)
        for start, end in ((0, length - 1), (length - 1, length)):
            if start == end:
                continue
            item = DecodeSlice(_WARM_UP_ID, start, blocks, samples=1, begin=begin)
            self.run(self._made_up([end - start], [item]))
        if self._sampler is not None:
            self._sampler.release([_WARM_UP_ID])

    @torch.inference_mode()
    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings [tokens, hidden_size] of a sequence's first tokens' ids.

        Raises:
            BatchError: not the first stage; ids out of range.
        """
        return self._embed(input_ids, self._fresh(len(input_ids)))

    @torch.inference_mode()
    def layers(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return this stage's layers' output for a sequence's first tokens; overwrites blocks.

        Raises:
            BatchError: the shape does not fit.
        """
        layout = self._fresh(len(hidden))
        return self._layers(self._accept(hidden, layout), layout)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return float32 logits [rows, vocab_size] of activations [rows, hidden_size].

        Raises:
            BatchError: not the last stage.
        """
        if self._skeleton.head is None or self._skeleton.norm is None:
            raise BatchError(f"the stage of layers {self._range} has no head")
        logits: torch.Tensor = self._skeleton.head(self._skeleton.norm(hidden))
        if self._softcap is not None:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return logits.to(torch.float32)

    @property
    def _range(self) -> LayerRange:
        return LayerRange(self.info.first_layer, self.info.end_layer)

    def _check_lengths(self, batch: DecoderBatch) -> None:
        limit = self.info.max_sequence_length
        longest = max(s.start + n for s, n in zip(batch.slices, batch.lengths, strict=True))
        if longest > limit:
            raise BatchError(f"a sequence of {longest} tokens; this model takes 1 to {limit}")

    def _embed(self, input_ids: torch.Tensor | None, layout: PagedLayout) -> torch.Tensor:
        if self._skeleton.embedding is None:
            raise BatchError(f"the stage of layers {self._range} does not embed token ids")
        if input_ids is None:
            raise BatchError("the first stage takes input_ids, and got none")
        tokens = layout.offsets[-1]
        ids = accept_ids(input_ids, "input_ids", self.shape.vocab_size, tokens, self._device)
        hidden: torch.Tensor = self._skeleton.embedding(ids)
        if self._skeleton.positions is not None:
            hidden = hidden + self._skeleton.positions(layout.positions)
        return hidden

    def _accept(self, hidden: torch.Tensor | None, layout: PagedLayout) -> torch.Tensor:
        if hidden is None:
            raise BatchError(f"the stage of layers {self._range} takes hidden, and got none")
        expected = (layout.offsets[-1], self.info.hidden_size)
        return accept_hidden(hidden, expected, self._device, self._dtype)

    def _layers(self, hidden: torch.Tensor, layout: PagedLayout) -> torch.Tensor:
        hidden = hidden[None]
        paged = Paged(layout, self.info.first_layer)
        rotary, kinds = self._skeleton.rotary, self._skeleton.layer_types
        rotations: dict[str | None, Any] = {None: None}
        if rotary is not None:
            positions = layout.positions[None]
            rotations = (
                {kind: self._rotation(*rotary(hidden, positions, kind)) for kind in set(kinds)}
                if kinds
                else {None: self._rotation(*rotary(hidden, positions))}
            )
        for index, layer in enumerate(self._skeleton.layers):
            if rotary is None:
                hidden = layer(hidden, paged=paged)
            else:
                rotation = rotations[kinds[index] if kinds else None]
                hidden = layer(
                    hidden, attention_mask=None, position_embeddings=rotation, paged=paged
                )
        return hidden[0]

    def _sample(
        self, hidden: torch.Tensor, batch: DecoderBatch, layout: PagedLayout
    ) -> list[SampledTokens]:
        assert self._sampler is not None
        rows, places = begin_sampling(self._sampler, batch, layout)
        if not rows:
            return []
        if len(places) < layout.offsets[-1]:
            hidden = hidden[torch.tensor(places, device=self._device)]
        return self._sampler.sample(self.logits(hidden), rows)

    def _fresh(self, length: int) -> PagedLayout:
        blocks = np.arange(-(-length // self.info.kv_block_tokens), dtype=np.int32)
        item = DecodeSlice(_WARM_UP_ID, 0, blocks, samples=0)
        return PagedLayout([length], [item], self.cache, self._device, row_tokens=self._row_tokens)

    def _made_up(self, lengths: Sequence[int], slices: Sequence[DecodeSlice]) -> DecoderBatch:
        tokens = sum(lengths)
        if self.info.is_first:
            return DecoderBatch(lengths, slices, torch.zeros(tokens, dtype=torch.int64))
        return DecoderBatch(lengths, slices, hidden=torch.zeros(tokens, self.info.hidden_size))


def begin_sampling(
    sampler: Sampler, batch: DecoderBatch, layout: PagedLayout
) -> tuple[list[SampleRows], list[int]]:
    """Tell the sampler of sequences that begin; return what to sample, and at which tokens."""
    rows: list[SampleRows] = []
    places: list[int] = []
    for index, item in enumerate(batch.slices):
        if item.begin is not None:
            sampler.begin(item.sequence_id, item.begin)
        if item.samples:
            end = layout.offsets[index + 1]
            places.extend(range(end - item.samples, end))
            position = item.start + batch.lengths[index] - item.samples + 1
            draft = item.draft[: item.samples - 1].tolist()
            rows.append(SampleRows(item.sequence_id, position, draft))
    return rows, places


def _fuse(skeleton: DecoderSkeleton) -> DecoderSkeleton:
    fuse(skeleton)
    if skeleton.head is None or skeleton.norm is None:
        return skeleton
    shared = skeleton.embedding is not None and (skeleton.embedding.weight is skeleton.head.weight)
    head = fused_head(skeleton.head, shared=shared)
    # What is packed is copied: the plain weight must not stay beside it.
    skeleton.root.lm_head = head
    return replace(skeleton, head=head, norm=fused_norm(skeleton.norm))


def _unchanged(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return cos, sin


def fill_root(
    root: nn.Module,
    sources: Mapping[str, str],
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Read a skeleton's tensors in place of its meta ones.

    `sources`: which of the checkpoint's tensors each parameter is.
    """
    parameters = dict(root.named_parameters(remove_duplicate=False))
    shapes = {sources[name]: tuple(parameter.shape) for name, parameter in parameters.items()}
    tensors = checkpoint.read(shapes, dtype, device)
    # A tensor that several parameters are read from is held once.
    held = {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()}
    for name, source in sources.items():
        owner, _, attribute = name.rpartition(".")
        setattr(root.get_submodule(owner), attribute, held[source])
    for module in root.modules():
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(device)
    check_materialised(root)
