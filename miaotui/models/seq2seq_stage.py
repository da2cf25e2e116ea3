"""One stage of an encoder-decoder model: a range of its encoder's and its decoder's layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import pad

from miaotui.engine.decode.sampler import Sampler
from miaotui.engine.decode.types import DecodeSlice, SampledTokens, SamplingParams, SequenceStart
from miaotui.models.cross_attention import CrossAttention, SourceLayout, SourceReader
from miaotui.models.errors import BatchError, UnsupportedModelError
from miaotui.models.families import Family
from miaotui.models.kv_cache import KVCache
from miaotui.models.paged_attention import Paged
from miaotui.models.paged_layout import PagedLayout
from miaotui.models.seq2seq_families import Seq2SeqFamily
from miaotui.models.seq2seq_skeleton import Seq2SeqSkeleton
from miaotui.models.shape import ModelShape
from miaotui.models.stage import accept_hidden, accept_ids
from miaotui.models.stage_info import StageInfo
from miaotui.models.writing_stage import WARM_UP_ID, DecoderBatch, WritingStage


class Seq2SeqStageModel(WritingStage[Seq2SeqSkeleton]):
    """The modules of one stage and its KV cache. Use from one thread at a time.

    What travels between stages, [rows, hidden_size]: of each sequence that begins, in the order
    of the slices, the encoder's rows, and after them, behind the decoder's first layer, a row a
    token. Rows that are narrower than `hidden_size` are padded with zeros.
    """

    def __init__(
        self,
        skeleton: Seq2SeqSkeleton,
        shape: ModelShape,
        info: StageInfo,
        cache: KVCache,
        sampler: Sampler | None,
    ) -> None:
        """Take loaded modules; use `load` instead."""
        super().__init__(skeleton, shape, info, cache, sampler)
        assert shape.source is not None
        self._source = shape.source
        self._source_blocks = -(-self._source.rows // info.kv_block_tokens)
        self._reader = SourceReader()
        for index, layer in enumerate(skeleton.decoder_layers):
            attention = getattr(layer, skeleton.cross)
            keys, values = cache.keys[index], cache.values[index]
            setattr(layer, skeleton.cross, CrossAttention(attention, keys, values, self._reader))

    @classmethod
    def _family(cls, found: Family, directory: Path) -> Seq2SeqFamily:
        if isinstance(found, Seq2SeqFamily):
            return found
        raise UnsupportedModelError(
            f"{directory}: a {found.model_type} model has no encoder beside a decoder"
        )

    @torch.inference_mode()
    def run(self, batch: DecoderBatch) -> torch.Tensor | list[SampledTokens]:
        """Compute what this stage computes, and keep the slices' keys and values.

        The slices' `tokens` are read, and at the first stage `begin.source`; `input_ids` is not.

        Returns:
            [rows, hidden_size] in the compute dtype, on `info.device`; on the last stage one
            entry for each slice with `samples`, in order.

        Raises:
            BatchError: the batch does not fit this stage.
        """
        self._release(batch.released)
        self._check(batch)
        rows, hidden = self._inputs(batch)
        if rows is not None:
            rows = self._encode(rows)
        if not self._skeleton.decoder_layers:
            return self._joined(rows, None)
        hidden, layout = self._decode(batch, rows, hidden)
        if self._sampler is None:
            return self._joined(rows, hidden)
        return self._sample(self._sampler, hidden, batch, layout)

    def warm_up(self) -> None:
        """Run a made-up source and tokens, so that no request pays for first-call set-up.

        Writes to the cache's first blocks; call it before the first batch.
        """
        blocks = np.arange(self._source_blocks + 1, dtype=np.int32)
        none = np.zeros(0, np.int32)
        features = np.zeros(self._source.shape, np.float32) if self.info.is_first else None
        begin = SequenceStart(SamplingParams(), none, none, features)
        for start in range(min(2, self.info.kv_block_tokens, self.info.max_sequence_length)):
            item = DecodeSlice(
                WARM_UP_ID,
                start,
                blocks,
                samples=1,
                begin=None if start else begin,
                tokens=np.zeros(1, np.int32),
            )
            hidden = None
            if not self.info.is_first:
                rows = self._incoming_rows([item], 1)
                hidden = torch.zeros(rows, self.info.hidden_size)
            self.run(DecoderBatch([1], [item], hidden=hidden))
        self._release([WARM_UP_ID])

    def _check(self, batch: DecoderBatch) -> None:
        if len(batch.lengths) != len(batch.slices) or not batch.slices:
            raise BatchError(
                f"the batch has {len(batch.slices)} slices and {len(batch.lengths)} lengths"
            )
        limit = self.info.max_sequence_length
        for item, length in zip(batch.slices, batch.lengths, strict=True):
            if item.start + length > limit:
                raise BatchError(
                    f"a sequence of {item.start + length} tokens; this model takes 1 to {limit}"
                )
            if item.begin is not None and item.start:
                raise BatchError(f"a sequence that begins at position {item.start}")

    def _incoming_rows(self, slices: Sequence[DecodeSlice], tokens: int) -> int:
        """How many rows the stage before sends for a batch."""
        begun = sum(item.begin is not None for item in slices)
        embedded = self.info.first_layer > self._source.layers
        return begun * self._source.rows + (tokens if embedded else 0)

    def _inputs(self, batch: DecoderBatch) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The rows of sequences that begin, [begun, rows, width], and tokens' [tokens, width]."""
        starts = [item.begin for item in batch.slices if item.begin is not None]
        if self._skeleton.embed_source is not None:
            return (self._embed_source(starts) if starts else None), None
        if batch.hidden is None:
            raise BatchError(f"the stage of layers {self._range} takes hidden, and got none")
        tokens = sum(batch.lengths)
        expected = (self._incoming_rows(batch.slices, tokens), self.info.hidden_size)
        hidden = accept_hidden(batch.hidden, expected, self._device, self._dtype)
        source = self._source
        split = len(starts) * source.rows
        encodes = self.info.first_layer < source.layers
        width = source.width if encodes else source.memory_width
        rows = hidden[:split, :width].reshape(-1, source.rows, width) if starts else None
        return rows, hidden[split:, : self.shape.heads * self.shape.head_dim]

    def _embed_source(self, starts: Sequence[SequenceStart]) -> torch.Tensor:
        features = [start.source for start in starts]
        for one in features:
            if one is None or one.shape != self._source.shape:
                raise BatchError(
                    f"features of shape {None if one is None else list(one.shape)}; this model "
                    f"takes {list(self._source.shape)}"
                )
        stacked = torch.from_numpy(np.stack([one for one in features if one is not None]))
        assert self._skeleton.embed_source is not None
        return self._skeleton.embed_source(stacked.to(self._device, self._dtype))

    def _encode(self, rows: torch.Tensor) -> torch.Tensor:
        for layer in self._skeleton.encoder_layers:
            rows = layer(rows, None)
        finish = self._skeleton.finish_source
        return rows if finish is None else finish(rows)

    def _decode(
        self, batch: DecoderBatch, rows: torch.Tensor | None, hidden: torch.Tensor | None
    ) -> tuple[torch.Tensor, PagedLayout]:
        """Run the decoder's layers; the result is [tokens, width]."""
        self._reader.layout = SourceLayout(
            batch.lengths,
            batch.slices,
            self._source.rows,
            self.cache,
            self._device,
            row_tokens=self._row_tokens,
            memory=None if rows is None else rows.flatten(0, 1),
        )
        slices = [replace(item, blocks=item.blocks[self._source_blocks :]) for item in batch.slices]
        layout = PagedLayout(
            batch.lengths, slices, self.cache, self._device, row_tokens=self._row_tokens
        )
        if self._skeleton.embedding is not None:
            hidden = self._embed(batch.slices, layout)
        assert hidden is not None
        held = self.info.first_layer - self._source.layers
        paged = Paged(layout, first_layer=max(0, held))
        hidden = hidden[None]
        for layer in self._skeleton.decoder_layers:
            # What the encoder made is read from the cache; transformers only asks whether it is.
            hidden = layer(hidden, encoder_hidden_states=hidden, paged=paged)
        return hidden[0], layout

    def _embed(self, slices: Sequence[DecodeSlice], layout: PagedLayout) -> torch.Tensor:
        assert self._skeleton.embedding is not None
        assert self._skeleton.positions is not None
        ids = torch.from_numpy(np.concatenate([item.tokens for item in slices]))
        tokens = layout.offsets[-1]
        ids = accept_ids(ids, "tokens", self.shape.vocab_size, tokens, self._device)
        table: torch.Tensor = self._skeleton.positions.weight  # type: ignore[assignment]
        embedded: torch.Tensor = self._skeleton.embedding(ids)
        return embedded + table[layout.positions]

    def _joined(self, rows: torch.Tensor | None, hidden: torch.Tensor | None) -> torch.Tensor:
        """What travels to the next stage."""
        width = self.info.hidden_size
        parts = [] if rows is None else [rows.flatten(0, 1)]
        if hidden is not None:
            parts.append(hidden)
        if not parts:
            return torch.zeros(0, width, dtype=self._dtype, device=self._device)
        padded = [pad(part, (0, width - part.shape[1])) for part in parts]
        return padded[0] if len(padded) == 1 else torch.cat(padded)
