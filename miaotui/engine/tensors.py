"""Tensors to raw little-endian bytes and back, without copies or per-element conversion."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

# Element types on the wire, by the names that the protocol's Dtype has them under.
WIRE_DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in WIRE_DTYPES.items()}

# Not an element type of torch's tensors: codes with a scale a row, for activations only.
INT8 = "int8"

# No tensor on the wire has more dimensions, or comes near this many bytes.
_MAX_DIMENSIONS = 8
_MAX_BYTES = 1 << 40

if sys.byteorder != "little":  # pragma: no cover - torch runs on little-endian machines
    raise ImportError("Miaotui's tensors travel as little-endian bytes; this machine is not")


class TensorFormatError(ValueError):
    """A tensor's dtype, shape and bytes contradict each other or cannot be accepted."""


@dataclass(frozen=True, slots=True)
class WireTensor:
    """A tensor as it travels: dtype name, shape, and its bytes in row-major order.

    `data` is a flat view (format "B") of the tensor's own memory and keeps it alive.
    """

    dtype: str
    shape: tuple[int, ...]
    data: memoryview

    @property
    def nbytes(self) -> int:
        """Length of `data`."""
        return self.data.nbytes


def to_wire(tensor: torch.Tensor, dtype: str | None = None) -> WireTensor:
    """Return a tensor's bytes; no copy for a contiguous CPU tensor already of that dtype.

    Args:
        tensor: floating-point, of any shape, on any device.
        dtype: element type on the wire, a key of `WIRE_DTYPES`, or `INT8` (loses precision);
            None: the tensor's own.

    Raises:
        TensorFormatError: the dtype is not one that travels.
    """
    if dtype == INT8:
        return _to_int8(tensor)
    target = tensor.dtype if dtype is None else _wire_dtype(dtype)
    if target not in _NAMES:
        raise TensorFormatError(
            f"tensors of {target} do not travel; convert to one of {', '.join(WIRE_DTYPES)}"
        )
    ready = tensor.detach().to(device="cpu", dtype=target).contiguous()
    flat = ready.view(-1) if ready.dim() else ready.view(1)
    return WireTensor(_NAMES[target], tuple(ready.shape), flat.view(torch.uint8).numpy().data)


def from_wire(
    data: bytes | bytearray | memoryview, dtype: str, shape: Sequence[int]
) -> torch.Tensor:
    """Return the tensor that bytes on the wire hold, over the same memory where possible.

    The tensor keeps `data` alive and must be treated as read-only: `data` may be immutable.
    It is copied only where its address is not a multiple of the element size.

    Args:
        data: the tensor's bytes, contiguous.
        dtype: element type, a key of `WIRE_DTYPES`, or `INT8`, which becomes float32.
        shape: dimensions, outermost first.

    Raises:
        TensorFormatError: unknown dtype, impossible shape, or another number of bytes than
            dtype and shape call for.
    """
    expected = checked_nbytes(dtype, shape)
    view = memoryview(data)
    if not view.contiguous:
        raise TensorFormatError("the tensor's bytes are not contiguous in memory")
    if view.nbytes != expected:
        raise TensorFormatError(
            f"a {dtype} tensor of shape {list(shape)} has {expected} bytes, got {view.nbytes}"
        )
    if dtype == INT8:
        return _from_int8(view, shape[0], shape[1])
    target = _wire_dtype(dtype)
    if expected == 0:
        return torch.empty(tuple(shape), dtype=target)
    flat = torch.frombuffer(view.cast("B"), dtype=torch.uint8)
    if flat.data_ptr() % target.itemsize:
        flat = flat.clone()
    return flat.view(target).view(tuple(shape))


def checked_nbytes(dtype: str, shape: Sequence[int]) -> int:
    """Return the bytes that a tensor of this dtype and shape has.

    To be called on a header before memory is set aside for what it announces.

    Raises:
        TensorFormatError: unknown dtype; negative, too many or too large dimensions.
    """
    itemsize = 1 if dtype == INT8 else _wire_dtype(dtype).itemsize
    if len(shape) > _MAX_DIMENSIONS or any(n < 0 or n > _MAX_BYTES for n in shape):
        raise TensorFormatError(
            f"{list(shape)[: _MAX_DIMENSIONS + 1]} is not an acceptable shape: at most "
            f"{_MAX_DIMENSIONS} dimensions, none negative or above {_MAX_BYTES}"
        )
    nbytes = math.prod(shape) * itemsize
    if dtype == INT8:
        if len(shape) != 2:
            raise TensorFormatError(f"an int8 tensor has rows and columns, not shape {list(shape)}")
        nbytes += 4 * shape[0]
    if nbytes > _MAX_BYTES:
        raise TensorFormatError(
            f"a {dtype} tensor of shape {list(shape)} would have {nbytes} bytes; "
            f"at most {_MAX_BYTES} are accepted"
        )
    return nbytes


def _to_int8(tensor: torch.Tensor) -> WireTensor:
    if tensor.dim() != 2 or not tensor.is_floating_point():
        raise TensorFormatError(
            f"only floats of two dimensions travel as int8, not {tensor.dtype} of shape "
            f"{list(tensor.shape)}"
        )
    x = tensor.detach().to(device="cpu", dtype=torch.float32)
    rows, columns = x.shape
    data = torch.empty(rows * (columns + 4), dtype=torch.uint8)
    if data.numel() and columns:
        scale = x.abs().amax(1, keepdim=True).div_(127).clamp_min_(1e-30)
        codes = data[: rows * columns].view(torch.int8).view(rows, columns)
        # A row with an infinity or no number comes out without a number, not as wrong ones.
        codes.copy_((x / scale).round_().nan_to_num_(0.0))
        data[rows * columns :] = scale.view(-1).contiguous().view(torch.uint8)
    else:
        data.zero_()
    return WireTensor(INT8, (rows, columns), data.numpy().data)


def _from_int8(view: memoryview, rows: int, columns: int) -> torch.Tensor:
    if rows * columns == 0:
        return torch.empty(rows, columns)
    flat = torch.frombuffer(view.cast("B"), dtype=torch.uint8)
    codes = flat[: rows * columns].view(torch.int8).view(rows, columns)
    scale = flat[rows * columns :].clone().view(torch.float32).view(rows, 1)
    return codes.float().mul_(scale)


def _wire_dtype(name: str) -> torch.dtype:
    dtype = WIRE_DTYPES.get(name)
    if dtype is None:
        raise TensorFormatError(
            f"{name!r} is not a dtype on the wire; use one of {', '.join(WIRE_DTYPES)}"
        )
    return dtype


# torch warns once a process when it wraps read-only memory; the first time is here, unheard.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.frombuffer(b"\0", dtype=torch.uint8)
