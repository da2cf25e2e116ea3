"""Training through the rounding: a model computes as it will once its weights are codes.

Values are rounded forwards, and gradients pass as if they were not (the straight-through estimator:
Bengio et al., arXiv:1308.3432; of whole models: Jacob et al., CVPR 2018).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from miaotui.compression.statistics import InputCodes
from miaotui.models.rounding import dequantize_groups, group_codes, quantize_rows, round_static


class _RoundedWeight(nn.Module):
    """A linear's weights, float [out, in], as they come out of their codes."""

    def __init__(self, bits: int, group: int, smooth: torch.Tensor | None) -> None:
        super().__init__()
        self._bits, self._group, self._smooth = bits, group, smooth

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            inner = weight if self._smooth is None else weight / self._smooth
            if self._bits == 8:
                codes, scale = quantize_rows(inner)
                rounded = codes * scale[:, None]
            else:
                rounded = dequantize_groups(
                    *group_codes(inner, self._bits, self._group), self._group
                )
            if self._smooth is not None:
                rounded = rounded * self._smooth
            off = rounded - weight
        return weight + off


class _RoundedInput:
    """A forward pre-hook that rounds what goes into a linear by calibrated scales."""

    def __init__(self, codes: InputCodes, smooth: torch.Tensor | None) -> None:
        self._scale, self._zero = torch.tensor([codes.scale]), torch.tensor([codes.zero])
        self._smooth = smooth
        self._low = -codes.zero * codes.scale
        self._high = (255 - codes.zero) * codes.scale

    def __call__(self, _module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x = inputs[0] if self._smooth is None else inputs[0] * self._smooth
        # What is cut off has no gradient.
        x = x.clamp(self._low, self._high)
        with torch.no_grad():
            off = round_static(x, self._scale, self._zero) - x
        x = x + off
        return (x if self._smooth is None else x / self._smooth, *inputs[1:])


@contextmanager
def rounded(
    linears: Mapping[nn.Linear, InputCodes | None], bits: int, group: int
) -> Iterator[None]:
    """Let linears compute with rounded weights and inputs meanwhile; their weights stay floats.

    Args:
        linears: of each how its inputs are rounded; None: not by scales that are known before.
        bits: of the weights: 8, a scale an output channel, or 2 to 7 in groups.
        group: inputs that share a scale, below 8 bits.
    """
    hooks = []
    try:
        for module, codes in linears.items():
            # A copy: statistics are made where gradients cannot pass.
            smooth = None if codes is None or codes.smooth is None else codes.smooth.clone()
            rounding = _RoundedWeight(bits, group, smooth)
            parametrize.register_parametrization(module, "weight", rounding)
            if codes is not None:
                hooks.append(module.register_forward_pre_hook(_RoundedInput(codes, smooth)))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module in linears:
            if parametrize.is_parametrized(module, "weight"):
                parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
