"""Encoder layers in fewer and larger operations, for CPUs.

What transformers' layer modules compute, with the same roundings in float32 but for the order
of a product's sums: query, key and value are one product, weights lie as the matrix kernels
read them, residuals are added in place, and a layer is one call. The modules stay the
parameters' owners: theirs become views of the memory that is laid out here, so nothing is
held twice. Measured on two cores (`python -m tests.bench --only layers`), this takes about a
tenth off.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import layer_norm

from miaotui.models.attention import PackedSequences, attend_runs


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
    layers: Sequence[nn.Module], model_type: str, heads: int, *, fuse: bool
) -> list[Layer]:
    """Return how to compute each of transformers' layers: fused where that is known to be faster.

    Args:
        layers: loaded modules of one of the extractive families.
        model_type: the family.
        heads: attention heads.
        fuse: whether they may be fused; otherwise, and not on a CPU, the modules are called.
    """
    names = _NAMES.get(model_type)
    if not fuse or names is None or any(p.device.type != "cpu" for p in layers[0].parameters()):
        return [_called(layer) for layer in layers]
    return [FusedLayer(layer, names, heads) for layer in layers]


def _called(layer: Any) -> Layer:
    def call(hidden: torch.Tensor, packed: PackedSequences) -> torch.Tensor:
        output: torch.Tensor = layer(hidden[None], None, packed=packed)
        return output[0]

    return call


class FusedLayer:
    """Self-attention and feed-forward network, each with a residual and a norm after it."""

    def __init__(self, layer: nn.Module, names: LayerNames, heads: int) -> None:
        """Take over a layer's parameters; `layer` itself computes as before, from views."""

        def part(name: str) -> Any:
            return layer.get_submodule(name)

        self._heads = heads
        inputs = [part(names.query), part(names.key), part(names.value)]
        self._inputs = _Product(inputs)
        self._attention_out = _Product([part(names.attention_out)])
        self._attention_norm: nn.LayerNorm = part(names.attention_norm)
        self._up = _Product([part(names.up)])
        self._activation: Callable[[torch.Tensor], torch.Tensor] = part(names.activation)
        self._down = _Product([part(names.down)])
        self._output_norm: nn.LayerNorm = part(names.output_norm)

    def __call__(self, hidden: torch.Tensor, packed: PackedSequences) -> torch.Tensor:
        """Return the layer's output [tokens, hidden_size] for such an input, which is kept."""
        tokens, heads = len(hidden), self._heads
        inputs = self._inputs(hidden).view(tokens, 3, heads, -1)
        query, key, value = inputs.permute(1, 2, 0, 3).unsqueeze(1)
        attended = attend_runs(query, key, value, packed).view(tokens, -1)
        hidden = _norm(self._attention_norm, self._attention_out(attended).add_(hidden))
        inner = self._activation(self._up(hidden))
        return _norm(self._output_norm, self._down(inner).add_(hidden))


class _Product:
    """x W + b for the weights of one or more linear modules side by side."""

    def __init__(self, modules: Sequence[nn.Linear]) -> None:
        self._weight = torch.cat([module.weight.detach() for module in modules]).t().contiguous()
        self._bias = torch.cat([module.bias.detach() for module in modules])
        begin = 0
        for module in modules:
            end = begin + module.out_features
            module.weight = nn.Parameter(self._weight[:, begin:end].t(), requires_grad=False)
            module.bias = nn.Parameter(self._bias[begin:end], requires_grad=False)
            begin = end

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self._bias, x, self._weight)


def _norm(norm: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    return layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
