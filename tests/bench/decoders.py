"""The peer for generation: transformers' `generate` in this process, and a model for both."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

VOCABULARY, LAYERS, HIDDEN, CONTEXT = 8192, 12, 512, 2048


def make_decoder(directory: Path, *, copying: bool = False) -> None:
    """Write a Llama of 43 million parameters with random weights, and a tokenizer of its ids.

    With `copying`, layers add next to nothing and the head sends every token to the next id of
    a cycle of 8, so that the text repeats itself and prompt lookup can guess it: how fast a
    copying task goes does not depend on what is copied.
    """
    torch.manual_seed(20261124)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HIDDEN // 64,
        num_key_value_heads=HIDDEN // 128,
        intermediate_size=1344,
        vocab_size=VOCABULARY,
        max_position_embeddings=CONTEXT,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model: Any = LlamaForCausalLM(config)
    if copying:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    parameter.mul_(1e-4)
            following = torch.arange(VOCABULARY)
            following = following // 8 * 8 + (following + 1) % 8
            table = model.model.embed_tokens.weight
            table.normal_()
            model.lm_head.weight[following] = table.clone()
    model.save_pretrained(directory)
    words = Tokenizer(WordLevel({f" w{number}": number for number in range(VOCABULARY)}, " w0"))
    words.pre_tokenizer = pre_tokenizers.Split(" w", "merged_with_next")
    words.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(directory)


def prompts(count: int, tokens: int, *, seed: int, copying: bool = False) -> list[list[int]]:
    """Token ids of `count` prompts that have nothing in common."""
    random = np.random.default_rng(seed)
    if copying:
        cycles = random.choice(VOCABULARY // 8, count, replace=False)
        return [[int(cycle) * 8 + place % 8 for place in range(tokens)] for cycle in cycles]
    ids: list[list[int]] = random.integers(8, VOCABULARY, (count, tokens)).tolist()
    return ids


def agreement(texts: Sequence[Sequence[int]], reference: Sequence[Sequence[int]]) -> float:
    """Percent of the reference's tokens that come before the first one that is another.

    What follows a different token has another past, and may differ for that reason alone.
    """
    equal = 0
    for text, expected in zip(texts, reference, strict=True):
        pairs = enumerate(zip(text, expected, strict=True))
        equal += next((at for at, (one, other) in pairs if one != other), len(expected))
    return 100 * equal / sum(map(len, reference))


class TransformersDecoder:
    """`AutoModelForCausalLM` in float32 on all cores."""

    name = "transformers generate, one batch"

    def __init__(self, directory: Path) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32
        ).eval()

    @torch.inference_mode()
    def generate(self, batch: list[list[int]], tokens: int) -> tuple[list[list[int]], float]:
        """Greedy continuations of equally long prompts in one batch, and its tokens a second."""
        ids = torch.tensor(batch)
        started = time.perf_counter()
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        )
        seconds = time.perf_counter() - started
        return out[:, ids.shape[1] :].tolist(), len(batch) * tokens / seconds
