"""Encoder layers with gradients, in few products, and for no more rows than are asked for.

They compute what transformers' modules do. Made once for many passes: serving may hold weights
packed or in half precision, and unpacking them takes as long as a short pass does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.functional import layer_norm, linear, scaled_dot_product_attention

from miaotui.models.attention import PackedSequences, attend_runs
from miaotui.models.compressed import CompressedModule
from miaotui.models.fused import LayerParts, layer_parts


class GradientLayer(Protocol):
    """An encoder layer that can be differentiated."""

    def __call__(self, hidden: torch.Tensor, packed: PackedSequences) -> torch.Tensor:
        """Map float32 [tokens, hidden_size] to the layer's output."""
        ...

    def at(self, hidden: torch.Tensor, packed: PackedSequences, places: list[int]) -> torch.Tensor:
        """Return the output at some tokens of each sequence, [sequences * places, hidden_size].

        The sequences must be of one length.
        """
        ...


def gradient_layers(
    layers: tuple[nn.Module, ...], model_type: str, heads: int
) -> list[GradientLayer]:
    """Return loaded float32 layers of an extractive family, which keep what they unpack."""
    made: list[GradientLayer] = []
    for layer in layers:
        if any(isinstance(module, CompressedModule) for module in layer.modules()):
            made.append(_CalledLayer(layer))
        else:
            made.append(_DenseLayer(layer_parts(layer, model_type), heads))
    return made


class _CalledLayer:
    """Transformers' module itself."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    def __call__(self, hidden: torch.Tensor, packed: PackedSequences) -> torch.Tensor:
        output: torch.Tensor = self._layer(hidden[None], None, packed=packed)
        return output[0]

    def at(self, hidden: torch.Tensor, packed: PackedSequences, places: list[int]) -> torch.Tensor:
        return _at(self(hidden, packed), packed, places)


class _DenseLayer:
    """The products of a post-norm layer: self-attention and a feed-forward network."""

    def __init__(self, parts: LayerParts, heads: int) -> None:
        # Heads may have been pruned, layer by layer; each is as wide as it was.
        self._head_dim = parts.attention_out.out_features // heads
        inputs = (parts.query, parts.key, parts.value)
        self._inputs = (
            torch.cat([module.weight for module in inputs]),
            torch.cat([module.bias for module in inputs]),
        )
        self._width = parts.query.out_features
        self._attention_out = _weights(parts.attention_out)
        self._attention_norm: nn.LayerNorm = parts.attention_norm
        self._up = _weights(parts.up)
        self._activation: Callable[[torch.Tensor], torch.Tensor] = parts.activation
        self._down = _weights(parts.down)
        self._output_norm: nn.LayerNorm = parts.output_norm

    def __call__(self, hidden: torch.Tensor, packed: PackedSequences) -> torch.Tensor:
        rows = len(hidden)
        inputs = linear(hidden, *self._inputs).view(rows, 3, -1, self._head_dim)
        query, key, value = inputs.permute(1, 2, 0, 3).unsqueeze(1)
        attended = attend_runs(query, key, value, packed)
        return self._rest(attended.reshape(rows, -1), hidden)

    def at(self, hidden: torch.Tensor, packed: PackedSequences, places: list[int]) -> torch.Tensor:
        # All tokens are looked at; nothing else is computed of those that are not asked for.
        asked = _at(hidden, packed, places)
        weight, bias = self._inputs
        width, count = self._width, len(packed.lengths)
        query = linear(asked, weight[:width], bias[:width])
        looked_at = linear(hidden, weight[width:], bias[width:])
        key, value = looked_at.view(count, -1, 2, width // self._head_dim, self._head_dim).permute(
            2, 0, 3, 1, 4
        )
        query = query.view(count, len(places), -1, self._head_dim).transpose(1, 2)
        attended = scaled_dot_product_attention(query, key, value).transpose(1, 2)
        return self._rest(attended.reshape(len(asked), -1), asked)

    def _rest(self, attended: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        hidden = _norm(self._attention_norm, linear(attended, *self._attention_out) + hidden)
        inner = self._activation(linear(hidden, *self._up))
        return _norm(self._output_norm, linear(inner, *self._down) + hidden)


def _weights(module: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    return module.weight, module.bias


def _norm(norm: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    return layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _at(rows: torch.Tensor, packed: PackedSequences, places: list[int]) -> torch.Tensor:
    """The rows of some tokens of each sequence: [sequences * places, …]."""
    by_sequence = rows.view(len(packed.lengths), -1, rows.shape[-1])
    return by_sequence[:, places].flatten(0, 1)
