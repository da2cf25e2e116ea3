"""Encoder layers in fewer and larger operations, for CPUs.

What transformers' layer modules compute, with the same roundings in float32 but for the order
of a product's sums: query, key and value are one product, weights lie as the matrix kernels
read them, residuals are added in place, and a layer is one call. The modules' parameters become
views of the memory that is laid out here, or are unpacked from it where the modules themselves
are called (explanations), so nothing is held twice. What it gains:
`python -m tests.bench --only layers`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from torch.nn.functional import layer_norm

from miaotui.models.attention import PackedSequences, attend_runs
from miaotui.models.compressed import CompressedModule
from miaotui.models.compressed_layer import CompressedLayer, fused_activation
from miaotui.models.integer import largest_weight
from miaotui.models.packed import LinearPart, PackedLinear, can_pack


@dataclass(frozen=True, slots=True)
class LayerNames:
    """Where a post-norm encoder layer of transformers keeps its parts, as attribute paths."""

    query: str
    key: str
    value: str
    attention_out: str
    attention_norm: str
    up: str
    activation: str
    down: str
    output_norm: str


@dataclass(frozen=True, slots=True)
class LayerParts:
    """The modules of a post-norm encoder layer."""

    query: Any
    key: Any
    value: Any
    attention_out: Any
    attention_norm: Any
    up: Any
    activation: Any
    down: Any
    output_norm: Any


_BERT = LayerNames(
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    attention_out="attention.output.dense",
    attention_norm="attention.output.LayerNorm",
    up="intermediate.dense",
    activation="intermediate.intermediate_act_fn",
    down="output.dense",
    output_norm="output.LayerNorm",
)
_DISTILBERT = LayerNames(
    query="attention.q_lin",
    key="attention.k_lin",
    value="attention.v_lin",
    attention_out="attention.out_lin",
    attention_norm="sa_layer_norm",
    up="ffn.lin1",
    activation="ffn.activation",
    down="ffn.lin2",
    output_norm="output_layer_norm",
)
_NAMES: Mapping[str, LayerNames] = {
    "bert": _BERT,
    "distilbert": _DISTILBERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "electra": _BERT,
}

Layer = Callable[[torch.Tensor, PackedSequences], torch.Tensor]
"""Maps a layer's input [tokens, hidden_size] to its output."""


def encoder_layers(
    layers: Sequence[nn.Module],
    model_type: str,
    heads: int,
    *,
    fuse: bool,
    attention: torch.dtype = torch.float32,
) -> list[Layer]:
    """Return how to compute each of transformers' layers: fused where that is known to be faster.

    Args:
        layers: loaded modules of one of the extractive families.
        model_type: the family.
        heads: attention heads.
        fuse: whether they may be fused; otherwise, and not on a CPU, the modules are called.
        attention: what compressed layers may attend in; others attend in their own type.
    """
    names = _NAMES.get(model_type)
    if not fuse or names is None or any(p.device.type != "cpu" for p in layers[0].parameters()):
        return [_called(layer) for layer in layers]
    return [_fused(layer, layer_parts(layer, model_type), heads, attention) for layer in layers]


def takes_round_rows(layers: Sequence[Layer]) -> bool:
    """Whether layers take rows beyond their tokens, and gain by it (`packed.rounded_rows`)."""
    return all(isinstance(layer, FusedLayer | CompressedLayer) for layer in layers) and any(
        isinstance(layer, CompressedLayer) or (isinstance(layer, FusedLayer) and layer.packed)
        for layer in layers
    )


def distinct(layers: Sequence[Layer]) -> list[Layer]:
    """Return one of those layers that are computed by the same kernels."""
    return list(
        {
            layer.shapes if isinstance(layer, FusedLayer) else layer: layer for layer in layers
        }.values()
    )


def layer_parts(layer: nn.Module, model_type: str) -> LayerParts:
    """Return the modules of a layer of an extractive family.

    Raises:
        KeyError: it is not known where this family keeps them.
    """
    names = _NAMES[model_type]
    return LayerParts(*(layer.get_submodule(getattr(names, f.name)) for f in fields(names)))


def _fused(layer: nn.Module, parts: LayerParts, heads: int, attention: torch.dtype) -> Layer:
    # Heads may have been pruned, layer by layer; each is as wide as it was.
    head_dim = parts.attention_out.out_features // heads
    if not any(isinstance(module, CompressedModule) for module in layer.modules()):
        return FusedLayer(layer, parts, parts.query.out_features // head_dim)
    if parts.output_norm.weight.dtype is torch.float32 and largest_weight():
        return CompressedLayer(parts, head_dim, attention)
    return _called(layer)


def _called(layer: Any) -> Layer:
    def call(hidden: torch.Tensor, packed: PackedSequences) -> torch.Tensor:
        output: torch.Tensor = layer(hidden[None], None, packed=packed)
        return output[0]

    return call


class FusedLayer:
    """Self-attention and feed-forward network, each with a residual and a norm after it."""

    def __init__(self, layer: nn.Module, parts: LayerParts, heads: int) -> None:
        """Take over a layer's parameters; the layer itself computes as before, from views or
        from weights that are unpacked for as long as it takes.
        """
        self._heads = heads
        self._inputs = _Product(layer, [parts.query, parts.key, parts.value])
        self._attention_out = _Product(layer, [parts.attention_out])
        self._attention_norm: nn.LayerNorm = parts.attention_norm
        self._up = _Product(layer, [parts.up])
        self._activation: Callable[[torch.Tensor], torch.Tensor] = parts.activation
        self._fused = fused_activation(parts.activation)
        self._down = _Product(layer, [parts.down])
        self._output_norm: nn.LayerNorm = parts.output_norm
        products = (self._inputs, self._attention_out, self._up, self._down)
        self.packed = any(product.packed for product in products)
        """Whether oneDNN computes its products."""
        self.shapes = tuple(product.shape for product in products)
        """Outputs and inputs of each product."""

    def __call__(self, hidden: torch.Tensor, packed: PackedSequences) -> torch.Tensor:
        """Return the layer's output for [rows, hidden_size], which is kept.

        The first rows are the tokens; others, up to a round number, are computed and mean
        nothing.
        """
        rows, heads = len(hidden), self._heads
        inputs = self._inputs(hidden).view(rows, 3, heads, -1)
        query, key, value = inputs.permute(1, 2, 0, 3).unsqueeze(1)
        attended = attend_runs(query, key, value, packed).reshape(rows, -1)
        hidden = _norm(self._attention_norm, self._attention_out(attended).add_(hidden))
        inner = self._up.activated(hidden, self._activation, self._fused)
        return _norm(self._output_norm, self._down(inner).add_(hidden))


class _Product:
    """x W + b for the weights of one or more linear modules side by side."""

    def __init__(self, layer: nn.Module, modules: Sequence[nn.Linear]) -> None:
        """Take over the modules' parameters; `layer` has them, or what stands for them."""
        weight = torch.cat([module.weight.detach() for module in modules])
        bias = torch.cat([module.bias.detach() for module in modules])
        ends = list(accumulate(module.out_features for module in modules))
        begins = [0, *ends]
        self.shape = tuple(weight.shape)
        self._packed = PackedLinear(weight, bias) if can_pack(weight) else None
        if self._packed is not None:
            for module, begin, end in zip(modules, begins, ends, strict=False):
                _replace(layer, module, LinearPart(self._packed, begin, end))
            return
        self._weight, self._bias = weight.t().contiguous(), bias
        for module, begin, end in zip(modules, begins, ends, strict=False):
            module.weight = nn.Parameter(self._weight[:, begin:end].t(), requires_grad=False)
            module.bias = nn.Parameter(bias[begin:end], requires_grad=False)

    @property
    def packed(self) -> bool:
        """Whether oneDNN computes it."""
        return self._packed is not None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._packed is not None:
            return self._packed.forward(x)
        return torch.addmm(self._bias, x, self._weight)

    def activated(
        self,
        x: torch.Tensor,
        activation: Callable[[torch.Tensor], torch.Tensor],
        fused: tuple[str, str] | None,
    ) -> torch.Tensor:
        """An activation of the product; `fused`: what oneDNN calls it, if it can."""
        if self._packed is not None and fused is not None:
            return self._packed.forward(x, fused)
        return activation(self(x))


def _replace(layer: nn.Module, module: nn.Module, other: nn.Module) -> None:
    (name,) = (name for name, found in layer.named_modules() if found is module)
    parent, _, attribute = name.rpartition(".")
    setattr(layer.get_submodule(parent), attribute, other)


def _norm(norm: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    return layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
