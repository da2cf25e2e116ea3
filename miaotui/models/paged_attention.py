"""Attention of decoders over packed slices of sequences and the paged KV cache.

Transformers' layers call this as their attention function (`AttentionInterface`) on
`[1, heads, tokens, head_dim]` with the tokens of many sequences laid end to end. It writes the
tokens' keys and values into the cache, then attends:

- a prompt's first chunk to itself, causally, without a look at the cache;
- a later chunk to its gathered context and itself;
- single tokens (plain decoding, verification of a draft) row by row to their contexts.

For the last, copying contexts out of the cache costs several times what attending to them does
(a copy is one read and one write of what would be read once), and so does growing a dense cache.
In float32 on a CPU the rows read the cache in place instead: scores are a product sampled at the
rows' slots (`torch.sparse.sampled_addmm`), and their application to the values is a weighted
sum of table rows (`embedding_bag`). A single row whose slots follow one another, as those of a
sequence that grows alone do, reads a slice of the cache, which is faster still.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from miaotui.models.paged_layout import PagedLayout, Rows, Span

# The value of `config._attn_implementation` that selects `paged_attention`.
PAGED_ATTENTION = "miaotui_paged"

# Most tokens of a slice that attend row by row where rows read the cache in place, and where
# they copy their contexts out.
ROW_TOKENS, COPIED_ROW_TOKENS = 8, 1

# Query tokens a soft-capped block of scores has at most: its scores are held in memory.
_CAPPED_TOKENS = 256


@dataclass(slots=True)
class Paged:
    """A batch's layout, and what layers of the same shape share."""

    layout: PagedLayout
    first_layer: int
    patterns: dict[tuple[int, int], SparseRows] = field(default_factory=dict)


@dataclass(slots=True)
class SparseRows:
    """The places [rows * heads, slots * kv_heads] at which rows meet their contexts.

    `pattern` is a CSR tensor of them, `indices` int32 [rows * heads * longest] its columns,
    `offsets` int32 [rows * heads] where each row's begin, `mask` float32 [rows, 1, longest] is
    -inf where padded, or None.
    """

    pattern: torch.Tensor
    indices: torch.Tensor
    offsets: torch.Tensor
    mask: torch.Tensor | None


def reads_in_place(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether rows read the cache in place; no such kernels exist elsewhere."""
    return dtype is torch.float32 and device.type == "cpu"


def paged_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    paged: Paged,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_unused: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of each token to its sequence so far, through the cache.

    Args:
        module: the calling attention module; its `layer_idx` selects the cache.
        query: [1, heads, tokens, head_dim].
        key: [1, kv_heads, tokens, head_dim]; likewise `value`.
        attention_mask: must be None: nothing is padded.
        paged: the batch's layout.
        scaling: factor on the scores.
        sliding_window: positions attended to, the token's own included; None: all.
        softcap: scores are soft-capped at this (Gemma 2): `softcap * tanh(score / softcap)`.

    Returns:
        [1, tokens, heads, head_dim], and None for the weights, as transformers expects.
    """
    assert attention_mask is None, "paged sequences are never padded"
    layer = module.layer_idx - paged.first_layer  # type: ignore[operator]
    output = attend(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        paged,
        layer,  # type: ignore[arg-type]
        scaling,
        sliding_window,
        softcap,
    )
    return output[None], None


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    paged: Paged,
    layer: int,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Return [tokens, heads, head_dim] for `query` of that shape and new keys and values.

    `key` and `value` are [tokens, kv_heads, head_dim]; the other arguments are those of
    `paged_attention`, and `layer` counts from the stage's first.
    """
    layout = paged.layout
    keys, values = layout.cache.keys[layer], layout.cache.values[layer]
    keys.index_copy_(0, layout.slots, key)
    values.index_copy_(0, layout.slots, value)
    groups, spans = layout.rows(window), layout.spans(window)
    if len(groups) == 1 and not spans and groups[0].rows is None:
        return attend_rows(query, keys, values, paged.patterns, groups[0], scaling, softcap)
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    for group in groups:
        assert group.rows is not None
        picked = query.index_select(0, group.rows)
        done = attend_rows(picked, keys, values, paged.patterns, group, scaling, softcap)
        output.index_copy_(0, group.rows, done)
    for span in spans:
        here = slice(span.first, span.first + span.length)
        if span.context is None:
            context = key[here], value[here]
        else:
            context = keys.index_select(0, span.context), values.index_select(0, span.context)
        output[here] = _attend_span(query[here], *context, span, scaling, window, softcap)
    return output


def attend_rows(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    patterns: dict[tuple[int, int], SparseRows],
    group: Rows,
    scaling: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """Return [rows, heads, head_dim] for `query` of that shape: each row to its own context.

    `keys` and `values` are a layer's cache, [slots, kv_heads, head_dim]; `patterns` keeps what
    layers of the same shape share of a batch.
    """
    if group.run is not None:
        here = slice(group.run, group.run + group.context.shape[1])
        return _attend_dense(query, keys[here][None], values[here][None], None, scaling, softcap)
    if not reads_in_place(keys.dtype, keys.device):
        return _attend_copied(query, keys, values, group, scaling, softcap)
    count, heads, dim = query.shape
    kv_heads = keys.shape[1]
    name = (id(group), heads)
    rows = patterns.get(name)
    if rows is None:
        rows = patterns[name] = _sparse_rows(group, heads, kv_heads, keys.shape[0])
    torch.sparse.sampled_addmm(
        rows.pattern,
        query.reshape(count * heads, dim),
        keys.view(-1, dim).t(),
        beta=0.0,
        alpha=scaling,
        out=rows.pattern,
    )
    scores = rows.pattern.values().view(count, heads, -1)
    if softcap is not None:
        scores = (scores / softcap).tanh_() * softcap
    if rows.mask is not None:
        scores = scores + rows.mask
    weights = scores.softmax(-1)
    output = torch._embedding_bag_forward_only(
        values.view(-1, dim), rows.indices, rows.offsets, False, 0, False, weights.view(-1)
    )[0]
    return output.view(count, heads, dim)


def _sparse_rows(group: Rows, heads: int, kv_heads: int, slots: int) -> SparseRows:
    count, longest = group.context.shape
    columns = group.context.to(torch.int32)[:, None] * kv_heads
    of_head = torch.arange(heads, dtype=torch.int32) // (heads // kv_heads)
    indices = (columns + of_head[None, :, None]).view(-1)
    bounds = torch.arange(0, indices.numel() + 1, longest, dtype=torch.int32)
    pattern = torch.sparse_csr_tensor(
        bounds,
        indices,
        torch.zeros(indices.numel()),
        size=(count * heads, slots * kv_heads),
        check_invariants=False,
    )
    mask = None
    if group.mask is not None:
        mask = torch.zeros(group.mask.shape).masked_fill_(~group.mask, -torch.inf)[:, None]
    return SparseRows(pattern, indices, bounds[:-1], mask)


def _attend_copied(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    group: Rows,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    shape = (query.shape[0], -1, *keys.shape[1:])
    index = group.context.view(-1)
    key, value = (item.index_select(0, index).view(shape) for item in (keys, values))
    mask = None if group.mask is None else group.mask[:, None, None]
    return _attend_dense(query, key, value, mask, scaling, softcap)


def _attend_dense(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    """Return [rows, heads, head_dim]; `key` and `value` are [rows, context, kv_heads, dim]."""
    count, heads, dim = query.shape
    kv_heads = key.shape[2]
    key, value = key.transpose(1, 2), value.transpose(1, 2)
    # A key's query heads are its query tokens: nothing is repeated.
    grouped = query.reshape(count, kv_heads, heads // kv_heads, dim)
    if softcap is None:
        output = scaled_dot_product_attention(grouped, key, value, mask, scale=scaling)
    else:
        output = _capped(grouped, key, value, mask, scaling, softcap)
    return output.reshape(count, heads, dim)


def _attend_span(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    span: Span,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Return [length, heads, head_dim]: a slice attends to its context, itself included.

    `key` and `value`, [context, kv_heads, head_dim], begin at position `span.low`.
    """
    context = key.shape[0]
    mask = None
    slides = window is not None and span.start + span.length > window
    if span.context is not None or slides or softcap is not None:
        ends = torch.arange(span.start, span.start + span.length, device=query.device)[:, None]
        places = torch.arange(span.low, span.low + context, device=query.device)
        mask = places <= ends
        if slides:
            assert window is not None
            mask &= places > ends - window
    grouped = query.shape[1] != key.shape[1]
    query, key, value = (item.transpose(0, 1)[None] for item in (query, key, value))
    if softcap is None:
        output = scaled_dot_product_attention(
            query, key, value, mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
        )
    else:
        assert mask is not None
        repeats = query.shape[1] // key.shape[1]
        key, value = (item.repeat_interleave(repeats, 1) for item in (key, value))
        parts = zip(query.split(_CAPPED_TOKENS, 2), mask.split(_CAPPED_TOKENS), strict=True)
        capped = [_capped(part, key, value, allowed, scaling, softcap) for part, allowed in parts]
        output = torch.cat(capped, 2)
    return output[0].transpose(0, 1)


def _capped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float,
) -> torch.Tensor:
    scores = torch.matmul(query, key.transpose(-1, -2)) * scaling
    scores = (scores / softcap).tanh_() * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(weights, value)


def _say_nothing_of_beta() -> None:
    """Make a CSR tensor once, so that torch's remark that they are in beta is not logged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 1], [0], [0.0], size=(1, 1))


_say_nothing_of_beta()
AttentionInterface.register(PAGED_ATTENTION, paged_attention)
