"""Writes matrices as products of two thin ones.

Plain: the truncated singular value decomposition, nearest in squared weights (Eckart & Young,
1936). Activation-aware: the one nearest in squared *outputs* over inputs X, by decomposing W C with
C C^T = X^T X (SVD-LLM: Wang et al., ICLR 2025).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from miaotui.compression.errors import CompressionError
from miaotui.compression.statistics import InputStatistics
from miaotui.compression.workspace import INPUTS, Workspace
from miaotui.models.compressed import CompressedModule, LowRankLinear


@dataclass(frozen=True)
class Decomposition:
    """W = left @ right, its singular values descending; `left` [out, r], `right` [r, in]."""

    left: torch.Tensor
    right: torch.Tensor
    values: torch.Tensor


def decompose(weight: torch.Tensor, gram: torch.Tensor | None = None) -> Decomposition:
    """Decompose float32 [out, in], weighted by the inputs' Gram matrix [in, in] where given."""
    exact = weight.double()
    if gram is None:
        left, values, right = torch.linalg.svd(exact, full_matrices=False)
    else:
        size = len(gram)
        ridge = 1e-6 * float(gram.diagonal().mean()) or 1e-6
        factor = torch.linalg.cholesky(gram + ridge * torch.eye(size, dtype=torch.float64))
        left, values, right = torch.linalg.svd(exact @ factor, full_matrices=False)
        # right @ factor^-1, by solving with a triangle.
        right = torch.linalg.solve_triangular(factor, right, upper=False, left=False)
    root = values.sqrt()
    return Decomposition(
        (left * root).float().contiguous(), (root[:, None] * right).float().contiguous(), values
    )


def low_rank(module: nn.Linear, found: Decomposition, rank: int) -> LowRankLinear:
    """A linear's best replacement of a rank."""
    inner = nn.Linear(module.in_features, rank, bias=False)
    outer = nn.Linear(rank, module.out_features, bias=module.bias is not None)
    inner.weight = nn.Parameter(found.right[:rank].clone(), requires_grad=False)
    outer.weight = nn.Parameter(found.left[:, :rank].contiguous().clone(), requires_grad=False)
    if module.bias is not None:
        outer.bias = nn.Parameter(module.bias.detach().clone(), requires_grad=False)
    return LowRankLinear(inner, outer).eval()


def factorize(
    workspace: Workspace,
    share: float,
    statistics: Mapping[tuple[int, str], InputStatistics] | None = None,
) -> dict[str, int]:
    """Replace linears so that all of them together keep about a share of their parameters.

    Ranks are given out one at a time to where a parameter takes most off the error, relative to
    the matrix's whole; a matrix whose rank would save nothing stays whole. Activation-aware
    where `statistics` with Gram matrices are given. Returns the ranks by "layer.part".

    Raises:
        CompressionError: the model is factorised already.
    """
    linears = list(workspace.linears())
    if any(isinstance(module, CompressedModule) for _, _, module in linears):
        raise CompressionError(f"{workspace.directory}: factorised already")
    found: list[tuple[str, nn.Linear, Decomposition]] = []
    for layer, part, module in linears:
        assert isinstance(module, nn.Linear)
        gram = None if statistics is None else statistics[layer, INPUTS[part]].gram
        found.append((f"{layer}.{part}", module, decompose(module.weight.detach(), gram)))
    ranks = choose_ranks([(m.weight.shape, d.values) for _, m, d in found], share)
    chosen = {}
    for (name, module, decomposition), rank in zip(found, ranks, strict=True):
        if rank is not None:
            workspace.replace(module, low_rank(module, decomposition, rank))
            chosen[name] = rank
    return chosen


def choose_ranks(
    matrices: list[tuple[tuple[int, ...], torch.Tensor]], share: float
) -> list[int | None]:
    """Ranks of matrices, given their shapes and singular values; None: left whole.

    By bisection for the least gain per parameter that keeps within the budget.
    """
    costs = [sum(shape) for shape, _ in matrices]
    gains = [v.square() / v.square().sum() / c for (_, v), c in zip(matrices, costs, strict=True)]
    sizes = [shape[0] * shape[1] for shape, _ in matrices]
    budget = share * sum(sizes)

    def ranks(limit: float) -> list[int | None]:
        counts = [max(1, int((gain > limit).sum())) for gain in gains]
        return [
            None if count * cost >= size else count
            for count, cost, size in zip(counts, costs, sizes, strict=True)
        ]

    def spent(limit: float) -> int:
        return sum(
            size if rank is None else rank * cost
            for rank, cost, size in zip(ranks(limit), costs, sizes, strict=True)
        )

    low, high = 0.0, max(float(gain[0]) for gain in gains)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if spent(middle) <= budget else (middle, high)
    return ranks(high)
