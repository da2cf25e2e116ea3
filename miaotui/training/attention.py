"""Attention for training on a CPU: few passes over memory, bfloat16 where the step is.

torch's fused CPU attention is slow backwards in bfloat16: its gradient costs four times what the
plain products do, and these do without the copies that autograd would keep.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

NAME = "miaotui_training"


class _Attention(torch.autograd.Function):
    """softmax(q k^T + mask) v, q scaled; all [batch * heads, tokens, width]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        scores = torch.bmm(q, k.transpose(1, 2))
        if mask is not None:
            scores.view(mask.shape[0], -1, *scores.shape[1:]).add_(mask)
        weights = torch.softmax(scores, -1)
        ctx.save_for_backward(q, k, v, weights)
        return torch.bmm(weights, v)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, weights = ctx.saved_tensors
        out = gradients[0].contiguous()
        scores = torch._softmax_backward_data(
            torch.bmm(out, v.transpose(1, 2)), weights, -1, weights.dtype
        )
        return (
            torch.bmm(scores, k),
            torch.bmm(scores.transpose(1, 2), q),
            torch.bmm(weights.transpose(1, 2), out),
            None,
        )


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """As transformers calls attention: float [batch, heads, tokens, width] each.

    Returns float [batch, tokens, heads, width]. ``attention_mask``: the eager form, float
    [batch, 1, tokens, tokens] with equal rows. No dropout on the weights.
    """
    batch, heads, tokens, width = query.shape
    scale = width**-0.5 if scaling is None else scaling
    flat = (batch * heads, tokens, width)
    mask = None if attention_mask is None else attention_mask[:, :, :1].to(query.dtype)
    with torch.autocast(query.device.type, enabled=False):
        out: Tensor = _Attention.apply(  # type: ignore[no-untyped-call]
            (query * scale).reshape(flat), key.reshape(flat), value.reshape(flat), mask
        )
    return out.view(batch, heads, tokens, width).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, eager_mask)
