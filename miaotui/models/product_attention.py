"""Attention in bfloat16 on CPUs, as two matrix products and a softmax.

torch's fused attention gains nothing by bfloat16 on CPUs without AMX, while oneDNN's products do:
of 12 heads 32 wide, 190 tokens take 0.4 ms of one core (AMD Zen 5) in place of 1.2 in bfloat16 and
1.0 in float32. Scores are rounded to bfloat16, as transformers' eager attention in bfloat16 does.

torch's softmax takes longer than both products. Most of it goes to finding each row's greatest
score, which is taken off so that no exponential overflows. Scores are rarely so large: here
exponentials are taken of the scores as they are, with 2 for their base, and what is summed up is
divided by their sum (half the time). Where sums show that scores were too large or too small for
that, the softmax is computed as usual.
"""

from __future__ import annotations

import math

import torch

# Rows come in multiples of this. Softmax takes twice as long for odd ones, and oneDNN makes a
# kernel for every number of rows, half a millisecond each.
_MULTIPLE = 32
# Scores of so many elements stay in a core's caches; longer sequences are computed by
# themselves, and up to the second limit.
_SCORES = 1 << 20
_MOST_SCORES = 1 << 23
# Rows' sums of exponentials between which nothing has overflowed, and what has become 0 would
# not have counted.
_LEAST_SUM, _MOST_SUM = 2.0**-100, 2.0**100


def fits_products(heads: int, length: int) -> bool:
    """Whether a sequence's scores are few enough to be written out."""
    return heads * _padded(length) ** 2 <= _MOST_SCORES


def attend_by_products(
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    count: int,
    length: int,
    scaling: float | None,
    output: torch.Tensor,
) -> None:
    """Attend within `count` equally long neighbours, bidirectionally.

    Args:
        inputs: query, key and value, [heads, count * length, head_dim] each, strided as may be,
            of any floating-point type; they are rounded to bfloat16.
        count: sequences.
        length: tokens of each.
        scaling: factor on the scores; None: 1/sqrt(head_dim).
        output: [count * length, heads, head_dim], written; of any floating-point type.
    """
    heads, _, dim = inputs[0].shape
    rows = _padded(length)
    factor = 1 / math.sqrt(dim) if scaling is None else scaling
    most = max(1, _SCORES // (heads * rows * rows))
    for first in range(0, count, most):
        group = min(most, count - first)
        tokens = slice(first * length, (first + group) * length)
        parts = output.new_zeros((3, heads, group, rows, dim), dtype=torch.bfloat16)
        for part, tensor in zip(parts, inputs, strict=True):
            part[:, :, :length] = tensor[:, tokens].unflatten(1, (group, length))
        query, key, value = parts.flatten(1, 2)
        attended = _attend(query, key, value, length, factor)
        attended = attended.view(heads, group, rows, dim)[:, :, :length]
        output[tokens].unflatten(0, (group, length)).copy_(attended.permute(1, 2, 0, 3))


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, length: int, factor: float
) -> torch.Tensor:
    """Attend to the first `length` rows; all are bfloat16 [sequences * heads, rows, head_dim]."""
    scores = query.new_empty((query.shape[0], query.shape[1], key.shape[1]))
    scores.baddbmm_(query, key.transpose(1, 2), beta=0, alpha=factor / math.log(2))
    scores.exp2_()
    scores[:, :, length:] = 0
    sums = scores.sum(-1, keepdim=True)
    attended = torch.bmm(scores, value).div_(sums)
    least, most = sums.aminmax(dim=1)
    for one in ((least < _LEAST_SUM) | ~(most < _MOST_SUM)).flatten().nonzero().flatten().tolist():
        usual = torch.mm(query[one], key[one].t()).mul_(factor)[:, :length].softmax(-1)
        torch.mm(usual, value[one, :length], out=attended[one])
    return attended


def _padded(length: int) -> int:
    return -(-length // _MULTIPLE) * _MULTIPLE
