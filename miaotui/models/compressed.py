"""Modules of compressed checkpoints: int8, p-bit and low-rank linears, int8 embedding tables.

A compressed checkpoint's `config.json` has a `miaotui_compression` block. Its `linears` and
`embeddings` say, by module name, which of transformers' modules are replaced by which of these,
and their shapes; everything else about the checkpoint is as usual. The modules' `forward` is
plain arithmetic for any device; on CPUs `compressed_layer` computes the same by integer kernels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from miaotui.models.errors import CheckpointError
from miaotui.models.rounding import (
    dequantize_groups,
    quantize_rows,
    round_per_token,
    round_static,
    unpack_codes,
    unpack_even_codes,
)

BLOCK = "miaotui_compression"
TABLE_BITS = (2, 4)  # of a packed table: several codes a byte, none across two
VERSION = 1


class CompressedModule(nn.Module):
    """A module whose buffers are read from the checkpoint in the types they are stored in."""

    def resident_bytes(self) -> int:
        """Bytes that the buffers take in memory once the stage computes."""
        return sum(buffer.numel() * buffer.itemsize for buffer in self.buffers(recurse=False))


class QuantizedLinear(CompressedModule):
    """What linears with rounded weights share: a bias, and the scales of static activations."""

    weight: torch.Tensor
    weight_scale: torch.Tensor
    input_scale: torch.Tensor
    input_zero_point: torch.Tensor
    input_smooth: torch.Tensor

    def __init__(
        self, inputs: int, outputs: int, *, bias: bool, static: bool, smooth: bool
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.static, self.smooth = static, smooth
        if static:
            self.register_buffer("input_scale", torch.ones(1))
            self.register_buffer("input_zero_point", torch.zeros(1, dtype=torch.int32))
        if smooth:
            self.register_buffer("input_smooth", torch.ones(inputs))
        self.bias = nn.Parameter(torch.zeros(outputs), requires_grad=False) if bias else None


class Int8Linear(QuantizedLinear):
    """x W^T + b with 8-bit weights per output channel and 8-bit activations.

    `weight` int8 [out, in], `weight_scale` float32 [out], symmetric, so that W is their product.
    Static activations (`static`) have `input_scale` float32 [1] and `input_zero_point` int32 [1]
    of unsigned 8-bit codes, found by calibration; dynamic ones get a scale for every token.
    `input_smooth` float32 [in], where there (`smooth`), is what static activations are multiplied
    by before, and the weights' columns were divided by, so that no few channels decide the
    scale of all (SmoothQuant: Xiao et al., ICML 2023).
    """

    def __init__(
        self, inputs: int, outputs: int, *, bias: bool, static: bool, smooth: bool = False
    ) -> None:
        super().__init__(inputs, outputs, bias=bias, static=static, smooth=smooth)
        self.register_buffer("weight", torch.zeros(outputs, inputs, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.ones(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] to [..., out], in x's type; activations are rounded as the kernels do."""
        if self.static:
            x = x * self.input_smooth if self.smooth else x
            rounded = round_static(x.float(), self.input_scale, self.input_zero_point)
        else:
            rounded = round_per_token(x.float())
        weight = self.weight.float() * self.weight_scale[:, None]
        bias = None if self.bias is None else self.bias.float()
        return linear(rounded, weight, bias).to(x.dtype)

    def as_int8(self) -> Int8Linear:
        """Itself."""
        return self


class PackedLinear(QuantizedLinear):
    """An `Int8Linear` whose weights are stored in `bits` bits (2 to 7) with scales per group.

    `weight` is uint8 [out, ceil(in * bits / 8)]: each row's codes end to end, most significant
    bit first, code 2^(bits-1) meaning 0; `weight_scale` float32 [out, ceil(in / group)]. CPUs
    have no kernel for such weights that is faster than int8's, so they are turned into an
    `Int8Linear` once, as the stage is built: smaller on disk and on the way to the stages, in
    memory as int8.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        bits: int,
        group: int,
        bias: bool,
        static: bool,
        smooth: bool = False,
    ) -> None:
        super().__init__(inputs, outputs, bias=bias, static=static, smooth=smooth)
        self.bits, self.group = bits, group
        self.register_buffer(
            "weight", torch.zeros(outputs, -(-inputs * bits // 8), dtype=torch.uint8)
        )
        self.register_buffer("weight_scale", torch.ones(outputs, -(-inputs // group)))

    def resident_bytes(self) -> int:
        """As an `Int8Linear`'s, which it becomes."""
        small = (8 if self.static else 0) + (4 * self.in_features if self.smooth else 0)
        return self.out_features * self.in_features + 4 * self.out_features + small

    def dequantized(self) -> torch.Tensor:
        """The weights that the codes stand for, float32 [out, in]."""
        codes = unpack_codes(self.weight, self.bits, self.in_features)
        return dequantize_groups(codes, self.weight_scale, self.group)

    def as_int8(self) -> Int8Linear:
        """The same weights rounded once more, to 8 bits per output channel."""
        target = Int8Linear(
            self.in_features,
            self.out_features,
            bias=False,
            static=self.static,
            smooth=self.smooth,
        )
        target.weight, target.weight_scale = quantize_rows(self.dequantized())
        target.bias = self.bias
        if self.static:
            target.input_scale, target.input_zero_point = self.input_scale, self.input_zero_point
        if self.smooth:
            target.input_smooth = self.input_smooth
        return target

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] to [..., out], as the `Int8Linear` that it becomes."""
        result: torch.Tensor = self.as_int8()(x)
        return result


class LowRankLinear(CompressedModule):
    """outer(inner(x)): a matrix [out, in] as a product of [out, rank] and [rank, in]."""

    def __init__(self, inner: nn.Module, outer: nn.Module) -> None:
        super().__init__()
        self.inner, self.outer = inner, outer

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return int(self.inner.in_features)  # type: ignore[arg-type]

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return int(self.outer.out_features)  # type: ignore[arg-type]

    @property
    def rank(self) -> int:
        """Width in between."""
        return int(self.inner.out_features)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] to [..., out]."""
        result: torch.Tensor = self.outer(self.inner(x))
        return result


class Int8Embedding(CompressedModule):
    """A table of int8 rows [rows, width], each with a float32 scale."""

    weight: torch.Tensor
    weight_scale: torch.Tensor

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.rows, self.width = rows, width
        self.register_buffer("weight", torch.zeros(rows, width, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.ones(rows))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """int64 [...] to float32 [..., width]."""
        return self.weight[ids].float().mul_(self.weight_scale[ids].unsqueeze(-1))


class PackedEmbedding(CompressedModule):
    """A table of rows [rows, width] in 2 or 4 bits with scales per group of a row's values.

    `weight` uint8 [rows, ceil(width * bits / 8)] and `weight_scale` float32
    [rows, ceil(width / group)], as `PackedLinear`'s, but that it stays packed in memory: a lookup
    unpacks the rows that it takes.
    """

    weight: torch.Tensor
    weight_scale: torch.Tensor

    def __init__(self, rows: int, width: int, *, bits: int, group: int) -> None:
        super().__init__()
        if bits not in TABLE_BITS or group < 1:
            raise ValueError(f"a table of {bits} bits in groups of {group}")
        self.rows, self.width, self.bits, self.group = rows, width, bits, group
        self.register_buffer("weight", torch.zeros(rows, -(-width * bits // 8), dtype=torch.uint8))
        self.register_buffer("weight_scale", torch.ones(rows, -(-width // group)))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """int64 [...] to float32 [..., width]."""
        codes = unpack_even_codes(self.weight[ids], self.bits, self.width)
        return dequantize_groups(codes, self.weight_scale[ids], self.group)


AnyTable = Int8Embedding | PackedEmbedding
AnyLinear = nn.Linear | Int8Linear | PackedLinear | LowRankLinear


def compressed_modules(root: nn.Module) -> Iterator[tuple[str, CompressedModule]]:
    """Yield the compressed modules below `root`, with their names."""
    for name, module in root.named_modules():
        if isinstance(module, CompressedModule):
            yield name, module


def is_quantized(root: nn.Module) -> bool:
    """Whether any weights below are held in fewer than 16 bits."""
    kinds = (Int8Linear, PackedLinear, AnyTable)
    return any(isinstance(module, kinds) for _, module in compressed_modules(root))


def describe_linear(module: nn.Module) -> dict[str, Any]:
    """Return what `build_linear` needs to make such a module."""
    if isinstance(module, LowRankLinear):
        return {
            "format": "low-rank",
            "inner": describe_linear(module.inner),
            "outer": describe_linear(module.outer),
        }
    assert isinstance(module, nn.Linear | Int8Linear | PackedLinear)
    common: dict[str, Any] = {
        "in": module.in_features,
        "out": module.out_features,
        "bias": module.bias is not None,
    }
    if isinstance(module, nn.Linear):
        return {"format": "float", **common}
    common["activations"] = "static" if module.static else "dynamic"
    common["smooth"] = module.smooth
    if isinstance(module, PackedLinear):
        return {"format": "packed", "bits": module.bits, "group": module.group, **common}
    return {"format": "int8", **common}


def build_linear(spec: Mapping[str, Any]) -> AnyLinear:
    """Return an empty module of such a kind.

    Raises:
        KeyError, TypeError, ValueError: the specification is malformed.
    """
    kind = spec["format"]
    if kind == "low-rank":
        return LowRankLinear(build_linear(spec["inner"]), build_linear(spec["outer"]))
    inputs, outputs, bias = int(spec["in"]), int(spec["out"]), bool(spec["bias"])
    if min(inputs, outputs) < 1:
        raise ValueError(f"a linear of {inputs} to {outputs} features")
    if kind == "float":
        return nn.Linear(inputs, outputs, bias=bias)
    static = {"static": True, "dynamic": False}[spec["activations"]]
    smooth = bool(spec.get("smooth", False))
    if smooth and not static:
        raise ValueError("dynamic activations cannot be smoothed")
    if kind == "int8":
        return Int8Linear(inputs, outputs, bias=bias, static=static, smooth=smooth)
    if kind != "packed":
        raise ValueError(f"unknown format {kind!r}")
    bits, group = int(spec["bits"]), int(spec["group"])
    if not 2 <= bits <= 7 or group < 1:
        raise ValueError(f"{bits} bits in groups of {group}")
    return PackedLinear(
        inputs, outputs, bits=bits, group=group, bias=bias, static=static, smooth=smooth
    )


def describe_table(module: AnyTable) -> dict[str, Any]:
    """Return what `build_table` needs to make such a module."""
    shape = {"rows": module.rows, "width": module.width}
    if isinstance(module, PackedEmbedding):
        return {"format": "packed", "bits": module.bits, "group": module.group, **shape}
    return {"format": "int8", **shape}


def build_table(spec: Mapping[str, Any]) -> AnyTable:
    """Return an empty table of such a kind.

    Raises:
        KeyError, TypeError, ValueError: the specification is malformed.
    """
    rows, width = int(spec["rows"]), int(spec["width"])
    if spec["format"] == "packed":
        return PackedEmbedding(rows, width, bits=int(spec["bits"]), group=int(spec["group"]))
    if spec["format"] != "int8":
        raise ValueError(f"unknown format {spec['format']!r}")
    return Int8Embedding(rows, width)


def apply_compression(root: nn.Module, block: Mapping[str, Any]) -> None:
    """Replace a skeleton's modules, where it has them, by those that a block names.

    Raises:
        CheckpointError: the block is malformed or of a later version.
    """
    if block.get("version") != VERSION:
        raise CheckpointError(
            f"config.json: {BLOCK} is of version {block.get('version')!r}, and this release reads "
            f"version {VERSION}; compress the model again, or use the release it was made with"
        )
    try:
        replaced: dict[str, nn.Module] = {
            name: build_linear(spec) for name, spec in block.get("linears", {}).items()
        }
        for name, spec in block.get("embeddings", {}).items():
            replaced[name] = build_table(spec)
        for name, module in replaced.items():
            parent_name, _, leaf = name.rpartition(".")
            parent = _find(root, parent_name)
            if parent is not None and isinstance(getattr(parent, leaf, None), nn.Module):
                setattr(parent, leaf, module.eval())
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"config.json: {BLOCK} is malformed ({error!r}); compress the model again"
        ) from error


def _find(root: nn.Module, name: str) -> nn.Module | None:
    """The module of a name; None where this stage does not hold it."""
    try:
        return root.get_submodule(name)
    except AttributeError:
        return None
