"""What the stages of all models that write have in common: loading, cache, head and sampler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from torch import nn

from miaotui.engine.decode.grammar import Grammars
from miaotui.engine.decode.sampler import Sampler, SampleRows
from miaotui.engine.decode.suppression import Suppression
from miaotui.engine.decode.types import DecodeSlice, SampledTokens
from miaotui.models.checkpoint import Checkpoint
from miaotui.models.errors import BatchError
from miaotui.models.families import Family, StageSkeleton
from miaotui.models.filling import fill_root
from miaotui.models.kv_cache import KVCache, count_blocks
from miaotui.models.layers import LayerRange
from miaotui.models.memory import trim_heap
from miaotui.models.paged_attention import COPIED_ROW_TOKENS, ROW_TOKENS, reads_in_place
from miaotui.models.paged_layout import PagedLayout
from miaotui.models.precision import resolve_device, resolve_dtype
from miaotui.models.shape import ModelShape
from miaotui.models.stage_info import StageInfo, held_layers, inspect_model, parameter_bytes

# The id of the sequence that warms up; the head's count from 0.
WARM_UP_ID = -1

# A stage without layers that keep keys and values: others bound the number of its blocks.
_UNBOUNDED_BLOCKS = 1 << 20


@dataclass(frozen=True, slots=True)
class DecoderBatch:
    """A writing stage's input: slices of sequences laid end to end, without padding.

    `lengths` are the slices' tokens, in order. `input_ids`, integer [tokens], for the first
    stage; `hidden`, [tokens, hidden_size] of any floating-point type, for the others.
    `released` are ids of sequences that have ended.
    """

    lengths: Sequence[int]
    slices: Sequence[DecodeSlice]
    input_ids: torch.Tensor | None = None
    hidden: torch.Tensor | None = None
    released: Sequence[int] = ()


class WritingSkeleton(StageSkeleton, Protocol):
    """The modules that every writing stage has, or lacks by its place."""

    @property
    def decoder_layers(self) -> tuple[nn.Module, ...]:
        """The layers that keep keys and values."""
        ...

    @property
    def norm(self) -> nn.Module | None:
        """What stands before the head; on the last stage only."""
        ...

    @property
    def head(self) -> nn.Module | None:
        """Makes logits [rows, vocab_size] of activations; on the last stage only."""
        ...


SkeletonT = TypeVar("SkeletonT", bound=WritingSkeleton)


class WritingFamily(Protocol[SkeletonT]):
    """How a kind of writing model splits into stages."""

    def skeleton(self, config: Any, layers: LayerRange) -> SkeletonT:
        """Return the modules of the stage that holds `layers`, on the meta device."""
        ...

    def sources(self, skeleton: SkeletonT, checkpoint: Checkpoint) -> Mapping[str, str]:
        """Return which of the checkpoint's tensors each of the skeleton's parameters is."""
        ...


class WritingStage(Generic[SkeletonT]):
    """The modules of a stage, its KV cache and, on the last, the sampler."""

    def __init__(
        self,
        skeleton: SkeletonT,
        shape: ModelShape,
        info: StageInfo,
        cache: KVCache,
        sampler: Sampler | None,
    ) -> None:
        """Take loaded modules; use `load` instead."""
        self.info = info
        self.shape = shape
        self.cache = cache
        self._skeleton = skeleton
        self._sampler = sampler
        self._device = torch.device(info.device)
        self._dtype: torch.dtype = getattr(torch, info.dtype)
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
    ) -> Self:
        """Read a stage from a Hugging Face model directory: its own tensors and no others.

        Args:
            directory: holds `config.json` and safetensors weights.
            layers: the layers to hold, of an encoder-decoder model the encoder's and then the
                decoder's; None: all.
            dtype: "auto", "float32", "float16" or "bfloat16", or a torch dtype.
            device: "auto", "cpu", "cuda", "cuda:N".
            fingerprint: the model's, where it is known already; None: computed or cached.
            kv_cache_bytes: for this stage's keys and values; None: see `count_blocks`.
            kv_block_tokens: tokens a block of the cache.
            kv_sharers: stages that share this machine's memory; see `count_blocks`.
            fused: whether faster stand-ins, where there are any (`miaotui.models.decoder_fused`),
                are put in place; else transformers' modules compute as they are, as a reference.

        Raises:
            UnsupportedModelError: not a model of this kind, or one that cannot be served.
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
        found, config, shape = inspect_model(checkpoint)
        family = cls._family(found, directory)
        layers = held_layers(directory, layers, shape)
        skeleton = family.skeleton(config, layers)
        size = parameter_bytes(skeleton, compute)
        sources = family.sources(skeleton, checkpoint)
        fill_root(skeleton.root, sources, checkpoint, compute, target)
        skeleton = cls._ready(skeleton, target, fused=fused)
        kept = len(skeleton.decoder_layers)
        blocks = _UNBOUNDED_BLOCKS
        if kept:
            longest = _with_source(shape, kv_block_tokens)
            blocks = count_blocks(
                longest, kept, kv_block_tokens, compute, target, kv_cache_bytes, kv_sharers
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
        cache = KVCache(shape, kept, blocks, kv_block_tokens, compute, target)
        sampler = _sampler(directory, shape, target) if info.is_last else None
        stage = cls(skeleton, shape, info, cache, sampler)
        trim_heap()
        return stage

    @classmethod
    def _family(cls, found: Family, directory: Path) -> WritingFamily[SkeletonT]:
        """The family, which must be of the stage's kind. Raises `UnsupportedModelError`."""
        raise NotImplementedError

    @classmethod
    def _ready(cls, skeleton: SkeletonT, device: torch.device, *, fused: bool) -> SkeletonT:
        """The loaded modules as they compute."""
        return skeleton

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return float32 logits [rows, vocab_size] of the decoder's activations [rows, width].

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

    def _release(self, sequence_ids: Sequence[int]) -> None:
        """Let the sampler forget sequences that have ended."""
        if self._sampler is not None:
            self._sampler.release(sequence_ids)

    def _sample(
        self, sampler: Sampler, hidden: torch.Tensor, batch: DecoderBatch, layout: PagedLayout
    ) -> list[SampledTokens]:
        """Tell the sampler of sequences that begin, and let it choose the slices' next tokens."""
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
        if not rows:
            return []
        if len(places) < layout.offsets[-1]:
            hidden = hidden[torch.tensor(places, device=self._device)]
        return sampler.sample(self.logits(hidden), rows)


def _with_source(shape: ModelShape, block_tokens: int) -> ModelShape:
    """The shape of a decoder whose texts are longer by the blocks of the encoder's rows, if any."""
    if shape.source is None:
        return shape
    rows = -(-shape.source.rows // block_tokens) * block_tokens
    return replace(shape, max_sequence_length=shape.max_sequence_length + rows)


def _sampler(directory: Path, shape: ModelShape, device: torch.device) -> Sampler:
    # Only models that hear or see are held to what their makers rule out.
    suppression = None
    if shape.source is not None:
        suppression = Suppression.read(directory, shape.vocab_size, device)
    return Sampler(shape.vocab_size, device, Grammars(directory, shape.vocab_size), suppression)
