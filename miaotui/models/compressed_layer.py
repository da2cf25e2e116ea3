"""Encoder layers of compressed checkpoints, on CPUs: integer, low-rank and float products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.functional import layer_norm
from transformers.activations import ACT2CLS, GELUActivation, NewGELUActivation

from miaotui.models.attention import PackedSequences, attend_runs
from miaotui.models.compressed import AnyLinear, Int8Linear, LowRankLinear, PackedLinear
from miaotui.models.integer import FUSED_ACTIVATIONS, DynamicProduct, StaticProduct


class Product(Protocol):
    """x W + b."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, in] to a new [rows, out], float32."""
        ...

    def add_to(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """`other` [rows, out], changed in place, with the product added."""
        ...


class CompressedLayer:
    """Self-attention and feed-forward network, each with a residual and a norm after it.

    As `miaotui.models.fused.FusedLayer`, for modules of any kind of `compressed`. Takes over
    their weights.
    """

    def __init__(self, parts: Any, head_dim: int, attention: torch.dtype = torch.float32) -> None:
        """Take a layer's `fused.LayerParts`; `attention`: what it may be computed in."""
        self._head_dim = head_dim
        self._attention = attention
        self._inputs = make_product([parts.query, parts.key, parts.value])
        self._attention_out = make_product([parts.attention_out])
        self._attention_norm: nn.LayerNorm = parts.attention_norm
        self._up = make_product([parts.up])
        self._activation: Callable[[torch.Tensor], torch.Tensor] = parts.activation
        self._down = make_product([parts.down])
        self._output_norm: nn.LayerNorm = parts.output_norm
        self._fused = fused_activation(parts.activation)

    def __call__(self, hidden: torch.Tensor, packed: PackedSequences) -> torch.Tensor:
        """Return the layer's output for float32 [rows, hidden_size], which is kept.

        The first rows are the tokens; others, up to a round number, are computed and mean
        nothing.
        """
        inputs = self._inputs(hidden).view(len(hidden), 3, -1, self._head_dim)
        query, key, value = inputs.permute(1, 2, 0, 3).unsqueeze(1)
        attended = attend_runs(query, key, value, packed, dtype=self._attention)
        attended = attended.reshape(len(hidden), -1)
        hidden = _norm(self._attention_norm, self._attention_out.add_to(attended, hidden.clone()))
        return _norm(self._output_norm, self._feed_forward(hidden))

    def _feed_forward(self, hidden: torch.Tensor) -> torch.Tensor:
        up, down = self._up, self._down
        if (
            self._fused
            and isinstance(up, StaticProduct)
            and isinstance(down, StaticProduct)
            and down.smooth is None
        ):
            return down.add_codes(up.activate(hidden, self._fused, down), hidden)
        return down.add_to(self._activation(up(hidden)), hidden)


class _FloatProduct:
    def __init__(self, module: nn.Linear) -> None:
        self._weight, self._bias = module.weight.float().t().contiguous(), module.bias
        module.weight = nn.Parameter(self._weight.t(), requires_grad=False)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        product = x @ self._weight
        return product if self._bias is None else product.add_(self._bias)

    def add_to(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        other.addmm_(x, self._weight)
        return other if self._bias is None else other.add_(self._bias)


class _Chain:
    def __init__(self, inner: Product, outer: Product) -> None:
        self._inner, self._outer = inner, outer

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._outer(self._inner(x))

    def add_to(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return self._outer.add_to(self._inner(x), other)


class _SideBySide:
    def __init__(self, products: Sequence[Product]) -> None:
        self._products = products

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([product(x) for product in self._products], 1)

    def add_to(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return other.add_(self(x))


def make_product(modules: Sequence[AnyLinear]) -> Product:
    """Return how to compute modules that share an input, their outputs side by side."""
    integer = [m.as_int8() for m in modules if isinstance(m, Int8Linear | PackedLinear)]
    if len(integer) == len(modules):
        if not any(module.static for module in integer):
            return DynamicProduct(integer)
        first = integer[0]
        if all(
            module.static
            and torch.equal(module.input_scale, first.input_scale)
            and torch.equal(module.input_zero_point, first.input_zero_point)
            and module.smooth == first.smooth
            and (not first.smooth or torch.equal(module.input_smooth, first.input_smooth))
            for module in integer
        ):
            return StaticProduct(integer)
    if len(modules) > 1:
        return _SideBySide([make_product([module]) for module in modules])
    module = modules[0]
    if isinstance(module, LowRankLinear):
        inner: Any = module.inner
        outer: Any = module.outer
        return _Chain(make_product([inner]), make_product([outer]))
    assert isinstance(module, nn.Linear)
    return _FloatProduct(module)


def fused_activation(module: object) -> tuple[str, str] | None:
    """Return what oneDNN calls an activation of transformers; None where it has none."""
    if isinstance(module, GELUActivation):
        return FUSED_ACTIVATIONS["gelu"]
    if isinstance(module, NewGELUActivation):
        return FUSED_ACTIVATIONS["gelu_new"]
    return FUSED_ACTIVATIONS["relu"] if type(module) is ACT2CLS["relu"] else None


def _norm(norm: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    return layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
