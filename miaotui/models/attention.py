"""Attention over packed sequences: many sequences end to end, none padded.

Everything else in a transformer layer works token by token and does not notice packing, so
transformers' own layer modules run unchanged on `[1, tokens, hidden]` once their attention
function keeps the sequences apart. This module registers such a function with transformers'
`AttentionInterface`; the layers hand their keyword arguments through to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby
from typing import Any, cast

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from miaotui.models.precision import multiplies_bfloat16
from miaotui.models.product_attention import attend_by_products, fits_products

# The value of `config._attn_implementation` that selects `packed_attention`.
PACKED_ATTENTION = "miaotui_packed"

AttentionObserver = Callable[[torch.Tensor, torch.Tensor, float | None], None]

_VARLEN_DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class PackedSequences:
    """How the tokens of a batch divide into sequences.

    `lengths` are the sequences' tokens, in order; sequence i holds the tokens
    `offsets[i]:offsets[i + 1]`. Made once a batch and shared by all its layers.
    """

    lengths: tuple[int, ...]
    device: torch.device

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> PackedSequences:
        """Return the layout of sequences of the given lengths (each at least 1)."""
        return cls(tuple(lengths), device)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """First token of each sequence, and the token count as the last element."""
        return tuple(accumulate(self.lengths, initial=0))

    @cached_property
    def runs(self) -> tuple[tuple[int, int, int], ...]:
        """(first token, sequences, length) of each run of neighbours of equal length."""
        runs = []
        first = 0
        for length, group in groupby(self.lengths):
            count = sum(1 for _ in group)
            runs.append((first, count, length))
            first += count * length
        return tuple(runs)

    def groups(self, most: int) -> list[PackedSequences]:
        """The same sequences as neighbours of at most `most` tokens together, or one that is
        longer."""
        if self.offsets[-1] <= most:
            return [self]
        groups: list[list[int]] = []
        room = 0
        for length in self.lengths:
            if length > room or not groups:
                groups.append([])
                room = most
            groups[-1].append(length)
            room -= length
        return [PackedSequences.of(lengths, self.device) for lengths in groups]

    @cached_property
    def cumulative(self) -> torch.Tensor:
        """`offsets` as int32 [sequences + 1] on the device, as varlen kernels take them."""
        return torch.tensor(self.offsets, dtype=torch.int32, device=self.device)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths)


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    packed: PackedSequences,
    scaling: float | None = None,
    observe: AttentionObserver | None = None,
    **_unused: Any,
) -> tuple[torch.Tensor, None]:
    """Scaled dot-product attention, bidirectional, of each sequence to itself.

    On CUDA in half precision this is one variable-length flash attention call (Dao, 2023,
    arXiv:2307.08691) where torch offers it. Elsewhere it is one
    `scaled_dot_product_attention` call for each run of neighbouring sequences of equal
    length, on views of the packed tensors, or what `attend_runs` knows to be faster.

    Args:
        module: the calling attention module; not used.
        query: [1, heads, tokens, head_dim]; likewise `key` and `value`.
        attention_mask: must be None: nothing is padded.
        packed: how the tokens divide into sequences.
        scaling: factor on the scores; None: 1/sqrt(head_dim).
        observe: called with query, key and scaling, as explanations do.

    Returns:
        [1, tokens, heads, head_dim], and None for the weights, as transformers expects.
    """
    assert attention_mask is None, "packed sequences are never padded"
    if observe is not None:
        observe(query, key, scaling)
    if _varlen_attention is not None and _fits_varlen(query):
        output = _varlen_attention(
            query[0].transpose(0, 1),
            key[0].transpose(0, 1),
            value[0].transpose(0, 1),
            packed.cumulative,
            packed.cumulative,
            packed.longest,
            packed.longest,
            scale=scaling,
        )
        return output[None], None
    return attend_runs(query, key, value, packed, scaling), None


def attend_runs(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packed: PackedSequences,
    scaling: float | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Attend by one call a run of neighbours of equal length.

    That is `scaled_dot_product_attention`, or in bfloat16 on CPUs that multiply it
    `attend_by_products`.

    Args and result as `packed_attention`'s; the tensors may be strided views, and may have rows
    beyond the tokens, of which nothing that is said here is true. `dtype`: to compute in, where
    that may be bfloat16 for inputs that are not; None: the inputs'.
    """
    _, heads, rows, dim = query.shape
    tokens = packed.offsets[-1]
    by_products = _multiplies(query, dtype or query.dtype)
    if not by_products and len(packed.lengths) == 1:
        # The rows beyond are asked along, which spares copying the others.
        lone: torch.Tensor = scaled_dot_product_attention(
            query, key[:, :, :tokens], value[:, :, :tokens], scale=scaling
        )
        return lone.transpose(1, 2)
    if not by_products and len(packed.runs) == 1 and rows == tokens:
        return _run_attention(query, key, value, packed.runs[0], scaling)
    output = query.new_empty((1, rows, heads, dim))
    output[:, tokens:] = 0
    for run in packed.runs:
        first, count, length = run
        place = slice(first, first + count * length)
        if by_products and fits_products(heads, length):
            inputs = (query[0, :, place], key[0, :, place], value[0, :, place])
            attend_by_products(inputs, count, length, scaling, output[0, place])
        else:
            output[:, place] = _run_attention(query, key, value, run, scaling)
    return output


def _multiplies(query: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether to attend by products in bfloat16; they are not differentiable."""
    return (
        dtype is torch.bfloat16
        and query.device.type == "cpu"
        and not (torch.is_grad_enabled() and query.requires_grad)
        and multiplies_bfloat16(query.device)
    )


def _run_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    run: tuple[int, int, int],
    scaling: float | None,
) -> torch.Tensor:
    """Attend within `count` equally long neighbours; [1, count * length, heads, head_dim]."""
    first, count, length = run
    heads, dim = query.shape[1], query.shape[3]

    def batched(tensor: torch.Tensor) -> torch.Tensor:
        part = tensor[0, :, first : first + count * length]
        return part.view(heads, count, length, dim).transpose(0, 1)

    output: torch.Tensor = scaled_dot_product_attention(
        batched(query), batched(key), batched(value), scale=scaling
    )
    return output.transpose(1, 2).reshape(1, count * length, heads, dim)


def _fits_varlen(query: torch.Tensor) -> bool:
    return (
        query.is_cuda
        and query.dtype in _VARLEN_DTYPES
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= 256
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _find_varlen_attention() -> Callable[..., torch.Tensor] | None:
    if not torch.cuda.is_available():
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # torch before 2.10
        return None
    return cast(Callable[..., torch.Tensor], varlen_attn)


_varlen_attention = _find_varlen_attention()

AttentionInterface.register(PACKED_ATTENTION, packed_attention)
