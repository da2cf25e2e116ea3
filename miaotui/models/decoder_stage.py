"""One stage of a decoder: embeddings if it is the first, layers, head and sampler if the last."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from miaotui.engine.decode.types import DecodeSlice, SampledTokens, SamplingParams, SequenceStart
from miaotui.models.decoder_families import DecoderFamily, DecoderSkeleton
from miaotui.models.decoder_fused import fuse
from miaotui.models.errors import BatchError, UnsupportedModelError
from miaotui.models.families import Family
from miaotui.models.paged_attention import Paged
from miaotui.models.paged_layout import PagedLayout
from miaotui.models.stage import accept_hidden, accept_ids
from miaotui.models.writing_stage import WARM_UP_ID, DecoderBatch, WritingStage


class DecoderStageModel(WritingStage[DecoderSkeleton]):
    """The modules of one decoder stage and its KV cache. Use from one thread at a time."""

    @classmethod
    def _family(cls, found: Family, directory: Path) -> DecoderFamily:
        if isinstance(found, DecoderFamily):
            return found
        raise UnsupportedModelError(
            f"{directory}: a {found.model_type} model finds answers and does not generate text"
        )

    @classmethod
    def _ready(
        cls, skeleton: DecoderSkeleton, device: torch.device, *, fused: bool
    ) -> DecoderSkeleton:
        if skeleton.rotary is not None:
            skeleton.rotary.to(device)
        return fuse(skeleton) if fused else skeleton

    @torch.inference_mode()
    def run(self, batch: DecoderBatch) -> torch.Tensor | list[SampledTokens]:
        """Compute what this stage computes, and keep the slices' keys and values.

        Returns:
            [tokens, hidden_size] in the compute dtype, on `info.device`; on the last stage one
            entry for each slice with `samples`, in order.

        Raises:
            BatchError: the batch does not fit this stage.
        """
        self._release(batch.released)
        layout = PagedLayout(
            batch.lengths, batch.slices, self.cache, self._device, row_tokens=self._row_tokens
        )
        self._check_lengths(batch)
        if self._skeleton.embedding is not None:
            hidden = self._embed(batch.input_ids, layout)
        else:
            hidden = self._accept(batch.hidden, layout)
        hidden = self._layers(hidden, layout)
        if self._sampler is None:
            return hidden
        return self._sample(self._sampler, hidden, batch, layout)

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
            item = DecodeSlice(WARM_UP_ID, start, blocks, samples=1, begin=begin)
            self.run(self._made_up([end - start], [item]))
        self._release([WARM_UP_ID])

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
        turn = self._skeleton.rotation
        rotations: dict[str | None, Any] = {None: None}
        if rotary is not None:
            positions = layout.positions[None]
            rotations = (
                {kind: turn(*rotary(hidden, positions, kind)) for kind in set(kinds)}
                if kinds
                else {None: turn(*rotary(hidden, positions))}
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

    def _fresh(self, length: int) -> PagedLayout:
        blocks = np.arange(-(-length // self.info.kv_block_tokens), dtype=np.int32)
        item = DecodeSlice(WARM_UP_ID, 0, blocks, samples=0)
        return PagedLayout([length], [item], self.cache, self._device, row_tokens=self._row_tokens)

    def _made_up(self, lengths: Sequence[int], slices: Sequence[DecodeSlice]) -> DecoderBatch:
        tokens = sum(lengths)
        if self.info.is_first:
            return DecoderBatch(lengths, slices, torch.zeros(tokens, dtype=torch.int64))
        return DecoderBatch(lengths, slices, hidden=torch.zeros(tokens, self.info.hidden_size))
