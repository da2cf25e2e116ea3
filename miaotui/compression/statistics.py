"""What the inputs of a model's linears look like, over questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import nn

from miaotui.compression.questions import Labelled
from miaotui.compression.workspace import INPUTS, Workspace
from miaotui.models.rounding import quantize_rows

_ROWS = 384  # tokens on which scales are chosen
_SHRINKS = (1.0, 0.9, 0.8, 0.7)
_SMOOTHINGS = (0.0, 0.4, 0.6, 0.8)  # 0: none


@dataclass(frozen=True)
class InputCodes:
    """How static activations are rounded: see `miaotui.models.compressed.Int8Linear`."""

    scale: float
    zero: int
    smooth: torch.Tensor | None = None


@dataclass
class InputStatistics:
    """Of one linear's inputs: a sample of tokens, the channels' bounds, the Gram matrix X^T X."""

    width: int
    low: torch.Tensor = field(default_factory=lambda: torch.zeros(1))
    high: torch.Tensor = field(default_factory=lambda: torch.zeros(1))
    rows: list[torch.Tensor] = field(default_factory=list)
    gram: torch.Tensor | None = None

    def add(self, x: torch.Tensor, *, gram: bool) -> None:
        """Take in float [tokens, width]."""
        self.low = torch.minimum(self.low, x.amin(0))
        self.high = torch.maximum(self.high, x.amax(0))
        self.rows.append(x[:: max(1, len(x) // 64)].clone())
        if gram:
            found = x.double().t() @ x.double()
            self.gram = found if self.gram is None else self.gram + found

    def codes(self, weight: torch.Tensor, *, smooth: bool) -> InputCodes:
        """The unsigned 8-bit codes with the least squared error of x W^T over the sample.

        Args:
            weight: of all linears that take this input, float32 [out, in], one above the other.
            smooth: whether channels may be scaled against one another, as in SmoothQuant (Xiao et
                al., ICML 2023), by max|x|^a / max|w|^(1-a), for a few a.

        The range is searched from the bounds inwards: a few values far out are cut off where
        that makes all others finer. 0 always has a code.
        """
        rows = torch.cat(self.rows)
        rows = rows[:: max(1, len(rows) // _ROWS)]
        best: tuple[float, InputCodes] | None = None
        for strength in _SMOOTHINGS if smooth else (0.0,):
            factors = self._smoothing(weight, strength)
            values = rows if factors is None else rows * factors
            changed = weight if factors is None else weight / factors
            codes, exact = quantize_rows(changed), rows @ weight.t()
            changed = codes[0] * codes[1][:, None]
            scaled = 1.0 if factors is None else factors
            low, high = float((self.low * scaled).min()), float((self.high * scaled).max())
            for shrink in product(_SHRINKS, _SHRINKS) if low else ((1.0, s) for s in _SHRINKS):
                scale = max((high * shrink[1] - low * shrink[0]) / 255, 1e-8)
                zero = min(max(round(-low * shrink[0] / scale), 0), 255)
                rounded = (((values / scale).round() + zero).clamp(0, 255) - zero) * scale
                error = float((rounded @ changed.t() - exact).square().mean())
                if best is None or error < best[0]:
                    best = error, InputCodes(scale, zero, factors)
        assert best is not None
        return best[1]

    def _smoothing(self, weight: torch.Tensor, strength: float) -> torch.Tensor | None:
        """What to multiply the channels by; None for none."""
        if not strength:
            return None
        inputs = torch.maximum(-self.low, self.high).clamp_min(1e-5)
        weights = weight.abs().amax(0).clamp_min(1e-5)
        factors = weights ** (1 - strength) / inputs**strength
        return factors / factors.log().mean().exp()


@torch.inference_mode()
def input_statistics(
    workspace: Workspace, batches: Sequence[Labelled], *, gram: bool = False
) -> dict[tuple[int, str], InputStatistics]:
    """Run the model over batches and look; keys are (layer, name of the input)."""
    found: dict[tuple[int, str], InputStatistics] = {}
    hooks = []

    def watch(key: tuple[int, str]) -> Callable[[nn.Module, Any], None]:
        def look(_module: nn.Module, arguments: Any) -> None:
            x = arguments[0].reshape(-1, arguments[0].shape[-1])
            found.setdefault(key, InputStatistics(x.shape[1])).add(x, gram=gram)

        return look

    for layer, part, module in workspace.linears():
        if INPUTS[part] == part:
            hooks.append(module.register_forward_pre_hook(watch((layer, part))))
    try:
        for item in batches:
            workspace.hidden(item.batch)
    finally:
        for hook in hooks:
            hook.remove()
    return found
