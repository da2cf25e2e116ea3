"""Linear layers whose weights lie in the order that oneDNN's kernels read them in.

The plain product packs its weight anew at each call. Packed once, it takes 0.5 to 0.9 times as
long for 1 to 200 tokens in float32, measured on two AVX512 cores with the layers of a model 384
wide.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

# Smaller weights stay in a core's cache, where a packed product's set-up (20 us) outweighs it.
_PACKED_ELEMENTS = 1 << 17

_NONE: tuple[str, list[float], str] = ("none", [], "")

# Rows computed at once, but for a longer sequence: oneDNN keeps working memory for every number
# of rows, megabytes each for thousands of rows, and gains nothing by more than some hundreds.
MOST_ROWS = 512


def rounded_rows(tokens: int) -> int:
    """Return with how many rows to compute so many tokens: about 2 % more.

    oneDNN makes kernels for every number of rows, two milliseconds for the four products of a
    layer, and keeps about a thousand. Lengths that it meets for the first time are most of what
    a service is asked at first; so rounded, 48 numbers cover all up to 512.
    """
    step = 8 << max(0, (tokens - 1).bit_length() - 8)
    return -(-tokens // step) * step


def can_pack(weight: torch.Tensor) -> bool:
    """Whether a weight, [outputs, inputs], can be packed here and is large enough to gain by it."""
    return (
        weight.device.type == "cpu"
        and weight.numel() >= _PACKED_ELEMENTS
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and _computes(weight.dtype)
    )


def _computes(dtype: torch.dtype) -> bool:
    """Whether oneDNN has products of this type for this CPU; without AVX512 not of halves."""
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype is torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return True


@cache
def _fuses_gelu() -> bool:
    """Whether GELU is faster within oneDNN's product than in place after it.

    With AVX512 it is. With AVX2, 192 rows of 1,536 take 0.6 ms more on two cores, 2.5 for 1.9.
    """
    return "AVX512" in torch.backends.cpu.get_cpu_capability()


class PackedLinear(nn.Module):
    """A linear layer whose weight oneDNN has packed; [tokens, inputs] to [tokens, outputs]."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.bias = bias if bias is None else nn.Parameter(bias, requires_grad=False)
        # Opaque to torch, hence neither parameter nor buffer.
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())

    def forward(
        self, hidden: torch.Tensor, activation: tuple[str, str] = ("none", "")
    ) -> torch.Tensor:
        """Return the product, or an activation of it, one of `FUSED_ACTIVATIONS`."""
        name, algorithm = activation
        apart = name == "gelu" and not _fuses_gelu()
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            hidden, self._packed, self.bias, *(_NONE if apart else (name, [], algorithm))
        )
        return torch.ops.aten.gelu_(result, approximate=algorithm) if apart else result

    def unpacked(self) -> torch.Tensor:
        """Return the weight, [outputs, inputs], in memory of its own."""
        dense: torch.Tensor = self._packed.to_dense()
        return dense


class LinearPart(nn.Module):
    """Some outputs of a `PackedLinear`, in place of the linear module that they came from.

    Holds nothing: the weight is unpacked where it is asked for. Differentiable in its input.
    """

    def __init__(self, whole: PackedLinear, begin: int, end: int) -> None:
        super().__init__()
        self._whole = (whole,)  # not a submodule: the parameters have one owner
        self._begin, self._end = begin, end

    def __deepcopy__(self, memo: object) -> LinearPart:
        """Itself: nothing in it can change."""
        return self

    @property
    def weight(self) -> torch.Tensor:
        """[outputs, inputs]."""
        return self._whole[0].unpacked()[self._begin : self._end]

    @property
    def bias(self) -> torch.Tensor | None:
        """[outputs], or None."""
        bias = self._whole[0].bias
        return None if bias is None else bias[self._begin : self._end]

    @property
    def out_features(self) -> int:
        """Outputs."""
        return self._end - self._begin

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return [..., outputs] of [..., inputs], in the input's precision."""
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        return nn.functional.linear(hidden, self.weight.to(hidden.dtype), bias)
