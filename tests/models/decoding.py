"""Drives decoder stages called one after another, as a head would; transformers as reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from miaotui.engine.decode.types import DecodeSlice, SampledTokens, SamplingParams, SequenceStart
from miaotui.models.decoder_stage import DecoderStageModel
from miaotui.models.layers import LayerRange
from miaotui.models.writing_stage import DecoderBatch

BLOCK = 8
NONE = np.zeros(0, np.int32)

Guess = Callable[[int], list[int]]


@lru_cache(maxsize=1)
def reference_model(directory: Path) -> Any:
    """Transformers' own model in float32; the last one is kept."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def generate(directory: Path, prompt: Sequence[int], tokens: int) -> list[int]:
    """What transformers writes after the prompt, greedily, stopping at no token."""
    model = reference_model(directory)
    ids = torch.tensor([list(prompt)])
    written = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    result: list[int] = written[0, len(prompt) :].tolist()
    return result


def load_stages(
    directory: Path,
    split: str,
    *,
    fused: bool = True,
    dtype: torch.dtype = torch.float32,
    blocks: int = 200,
) -> list[DecoderStageModel]:
    """Stages with the same number of blocks each, warmed up."""
    stages = []
    for part in split.split(","):
        layers = LayerRange.parse(part)
        probe = DecoderStageModel.load(
            directory, layers, dtype=dtype, device="cpu", kv_block_tokens=BLOCK, fused=fused
        )
        shape = probe.shape
        size = 2 * shape.kv_heads * shape.head_dim * dtype.itemsize * len(layers) * BLOCK
        stage = DecoderStageModel.load(
            directory,
            layers,
            dtype=dtype,
            device="cpu",
            kv_cache_bytes=blocks * size,
            kv_block_tokens=BLOCK,
            fused=fused,
        )
        assert stage.info.kv_blocks == blocks
        stage.warm_up()
        stages.append(stage)
    return stages


@dataclass
class Writing:
    """One sequence on its way.

    `chunk`: most tokens of the prompt a batch; `guess`: what to draft, given how many tokens
    are written; `blocks`: its block table, as long as it will ever be.
    """

    sequence_id: int
    prompt: list[int]
    tokens: int
    blocks: list[int]
    chunk: int = 1000
    guess: Guess | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    cached: int = 0
    written: list[int] = field(default_factory=list)
    samples: list[SampledTokens] = field(default_factory=list)
    begun: bool = False

    @property
    def finished(self) -> bool:
        return len(self.written) >= self.tokens

    def next_slice(self) -> tuple[DecodeSlice, list[int]]:
        begin = None
        if not self.begun:
            begin = SequenceStart(self.sampling, np.array(self.prompt, np.int32), NONE)
            self.begun = True
        draft: list[int] = []
        known = self.prompt + self.written
        ids = known[self.cached : self.cached + self.chunk]
        samples = 1 if self.cached + len(ids) == len(known) else 0
        if samples and self.written and self.guess is not None:
            draft = self.guess(len(self.written))[: self.tokens - len(self.written) - 1]
            ids = ids + draft
            samples += len(draft)
        end = self.cached + len(ids)
        blocks = np.array(self.blocks[: -(-end // BLOCK)], np.int32)
        item = DecodeSlice(
            self.sequence_id, self.cached, blocks, samples, np.array(draft, np.int32), begin
        )
        return item, ids

    def take(self, item: DecodeSlice, length: int, sampled: SampledTokens | None) -> None:
        if sampled is None:
            self.cached += length
            return
        assert sampled.sequence_id == self.sequence_id
        assert 1 <= len(sampled.token_ids) <= item.samples
        self.samples.append(sampled)
        self.cached = item.start + length - item.samples + len(sampled.token_ids)
        self.written.extend(sampled.token_ids.tolist())


def step(stages: Sequence[DecoderStageModel], writings: Sequence[Writing]) -> None:
    """Compute one batch of all the writings' next slices."""
    made = [writing.next_slice() for writing in writings]
    slices, lengths = [item for item, _ in made], [len(ids) for _, ids in made]
    ids = torch.tensor([token for _, tokens in made for token in tokens])
    result: torch.Tensor | list[SampledTokens] = ids
    for stage in stages:
        assert isinstance(result, torch.Tensor)
        first = stage.info.is_first
        batch = DecoderBatch(lengths, slices, result if first else None, None if first else result)
        result = stage.run(batch)
    assert isinstance(result, list)
    sampled = {item.sequence_id: item for item in result}
    for writing, item, length in zip(writings, slices, lengths, strict=True):
        writing.take(item, length, sampled.get(item.sequence_id))


def write(stages: Sequence[DecoderStageModel], writings: Sequence[Writing]) -> None:
    """Step until all are finished; those that are drop out."""
    while going := [writing for writing in writings if not writing.finished]:
        step(stages, going)


def scattered(count: int, tokens: int, blocks: int = 200, seed: int = 0) -> list[list[int]]:
    """`count` block tables for `tokens` tokens each, without order and disjoint."""
    each = -(-tokens // BLOCK)
    drawn = np.random.default_rng(seed).permutation(blocks)[: count * each]
    table: list[list[int]] = drawn.reshape(count, each).tolist()
    return table


def random_prompt(length: int, seed: int, vocab: int = 640) -> list[int]:
    """Token ids without the special ones."""
    drawn: list[int] = np.random.default_rng(seed).integers(5, vocab, length).tolist()
    return drawn
