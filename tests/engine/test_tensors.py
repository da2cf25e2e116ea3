"""Tensors survive the wire bit for bit, without copies; nonsense is refused."""

from __future__ import annotations

import math
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miaotui.engine.tensors import (
    INT8,
    WIRE_DTYPES,
    TensorFormatError,
    WireTensor,
    checked_nbytes,
    from_wire,
    to_wire,
)


@given(
    dtype=st.sampled_from(sorted(WIRE_DTYPES)),
    shape=st.lists(st.integers(0, 5), max_size=4),
    offset=st.integers(0, 9),
)
def test_round_trip(dtype: str, shape: list[int], offset: int) -> None:
    tensor = torch.randn(shape).to(WIRE_DTYPES[dtype])
    wire = to_wire(tensor)
    assert (wire.dtype, wire.shape, wire.nbytes) == (dtype, tuple(shape), tensor.nbytes)
    assert wire.data.format == "B"
    # As from a protobuf message: read-only, at any address.
    received = memoryview(b"\xff" * offset + bytes(wire.data))[offset:]
    assert torch.equal(from_wire(received, dtype, shape), tensor)


@given(
    rows=st.integers(0, 5),
    columns=st.integers(0, 9),
    offset=st.integers(0, 5),
    size=st.sampled_from([1e-6, 1.0, 1e4]),
)
def test_int8_loses_half_a_step_at_most(rows: int, columns: int, offset: int, size: float) -> None:
    """Of a 127th of the row's greatest value: rows do not disturb one another."""
    tensor = torch.randn(rows, columns) * torch.logspace(0, 2, rows)[:, None] * size
    wire = to_wire(tensor, INT8)
    assert (wire.dtype, wire.shape, wire.nbytes) == (INT8, (rows, columns), rows * (columns + 4))
    assert checked_nbytes(INT8, (rows, columns)) == wire.nbytes
    received = from_wire(memoryview(b"\xff" * offset + bytes(wire.data))[offset:], *wire_key(wire))
    assert received.dtype is torch.float32
    assert received.shape == tensor.shape
    if tensor.numel():
        step = tensor.abs().amax(1, keepdim=True) / 127
        assert ((received - tensor).abs() <= 0.501 * step).all()


def wire_key(wire: WireTensor) -> tuple[str, tuple[int, ...]]:
    return wire.dtype, wire.shape


def test_int8_bytes() -> None:
    """Codes, then a float32 scale a row; half of bfloat16's bytes but for the scales."""
    wire = to_wire(torch.tensor([[127.0, -2.0], [0.0, 0.0]]), INT8)
    assert bytes(wire.data)[:8] == bytes([127, 254, 0, 0]) + struct.pack("<f", 1.0)
    wide = torch.randn(7, 384)
    assert to_wire(wide, INT8).nbytes == to_wire(wide, "bfloat16").nbytes / 2 + 4 * 7
    broken = from_wire(
        to_wire(torch.tensor([[math.inf, 1.0], [1.0, 2.0]]), INT8).data, INT8, (2, 2)
    )
    assert broken[0].isnan().all()
    assert broken[1].isfinite().all()
    with pytest.raises(TensorFormatError, match="two dimensions"):
        to_wire(torch.ones(3), INT8)


def test_bytes_are_little_endian_ieee() -> None:
    wire = to_wire(torch.tensor([1.0, -2.5]))
    assert bytes(wire.data) == struct.pack("<2f", 1.0, -2.5)
    assert bytes(to_wire(torch.tensor([1.5]), "float16").data) == struct.pack("<e", 1.5)
    # bfloat16 is float32's upper half.
    assert bytes(to_wire(torch.tensor([-2.5]), "bfloat16").data) == struct.pack("<f", -2.5)[2:]


def test_neither_way_copies() -> None:
    tensor = torch.randn(4, 6)
    wire = to_wire(tensor)
    assert np.frombuffer(wire.data, np.uint8).ctypes.data == tensor.data_ptr()
    data = bytes(wire.data)
    assert from_wire(data, "float32", (4, 6)).data_ptr() == np.frombuffer(data, "u1").ctypes.data


def test_a_received_tensor_keeps_its_bytes_alive() -> None:
    tensor = from_wire(bytes(to_wire(torch.arange(1000.0)).data), "float32", (1000,))
    assert torch.equal(tensor + 0, torch.arange(1000.0))


def test_other_layouts_and_dtypes_are_converted() -> None:
    tensor = torch.randn(3, 5).t()
    assert torch.equal(from_wire(to_wire(tensor).data, "float32", (5, 3)), tensor)
    double = torch.randn(3, dtype=torch.float64)
    assert torch.equal(from_wire(to_wire(double, "float32").data, "float32", (3,)), double.float())
    with torch.inference_mode():
        assert to_wire(torch.ones(2)).nbytes == 8
    assert to_wire(torch.ones(2, requires_grad=True)).nbytes == 8


def test_read_only_bytes_give_no_warning() -> None:
    code = (
        "from miaotui.engine.tensors import from_wire; import torch; "
        "print((from_wire(bytes(8), 'float32', (2,)) + 1).sum().item())"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout == "2.0\n"
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("data", "dtype", "shape", "message"),
    [
        (b"\0" * 8, "float64", (1,), "not a dtype on the wire"),
        (b"", "", (0,), "not a dtype on the wire"),
        (b"\0" * 8, "float32", (3,), "has 12 bytes, got 8"),
        (b"\0" * 8, "float32", (), "has 4 bytes, got 8"),
        (b"\0" * 7, "bfloat16", (4,), "has 8 bytes, got 7"),
        (b"", "float32", (-1,), "not an acceptable shape"),
        (b"\0" * 4, "float32", (-1, -1), "not an acceptable shape"),
        (b"", "float32", (1 << 62, 0), "not an acceptable shape"),
        (b"", "float32", (1 << 20, 1 << 20), "at most"),
        (b"", "float32", (1,) * 9, "not an acceptable shape"),
        (b"", "float32", (1 << 33, 1 << 33), "at most"),
        (b"\0" * 6, "int8", (1, 6), "has 10 bytes, got 6"),
        (b"\0" * 9, "int8", (5,), "rows and columns"),
        (b"\0" * 9, "int8", (), "rows and columns"),
        (b"", "int8", (-1, 2), "not an acceptable shape"),
        (b"", "int8", (1 << 39, 0), "at most"),
    ],
)
def test_refusals(data: bytes, dtype: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(TensorFormatError, match=message):
        from_wire(data, dtype, shape)


def test_more_refusals() -> None:
    with pytest.raises(TensorFormatError, match=r"int64 do not travel"):
        to_wire(torch.arange(3))
    with pytest.raises(TensorFormatError, match="not a dtype on the wire"):
        to_wire(torch.ones(3), "float8")
    with pytest.raises(TensorFormatError, match="not contiguous"):
        from_wire(memoryview(bytes(16))[::2], "float32", (2,))
    assert checked_nbytes("bfloat16", (3, 5)) == 30


def test_special_values_survive() -> None:
    values = torch.tensor([math.inf, -math.inf, -0.0, 1e-45])
    assert bytes(to_wire(from_wire(to_wire(values).data, "float32", (4,))).data) == bytes(
        to_wire(values).data
    )
