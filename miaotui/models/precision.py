"""Which device and element type to compute with on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """Return the device to compute on; "auto" is CUDA where there is one, else the CPU.

    Raises:
        ValueError: no such device, or it is not there.
    """
    if device == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"{device!r} is not a device; use auto, cpu, cuda or cuda:N") from error
    if resolved.type == "cuda":
        index = 0 if resolved.index is None else resolved.index
        if index >= torch.cuda.device_count():
            raise ValueError(f"{device}: this machine has {torch.cuda.device_count()} CUDA devices")
        return torch.device("cuda", index)
    if resolved.type != "cpu":
        raise ValueError(f"{device!r} is not supported; use auto, cpu, cuda or cuda:N")
    return resolved


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """Return the element type to compute in.

    "auto" is bfloat16 where the hardware multiplies it (CUDA from compute capability 8.0;
    CPUs with AVX512-BF16 or AMX-BF16) and float32 elsewhere: emulated, it is slower.

    Raises:
        ValueError: not one of auto, float32, float16, bfloat16; or float16 on a CPU.
    """
    if dtype == "auto":
        return torch.bfloat16 if _multiplies_bf16(device) else torch.float32
    resolved = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if resolved not in DTYPES.values():
        raise ValueError(f"{dtype!r} is not a dtype; use auto, {', '.join(DTYPES)}")
    if resolved is torch.float16 and device.type == "cpu":
        raise ValueError("float16 is not computed on CPUs; use float32, bfloat16 or auto")
    assert resolved is not None
    return resolved


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name without "torch."."""
    return str(dtype).removeprefix("torch.")


def _multiplies_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return bool(_cpu_flags() & _BF16_FLAGS)


@cache
def _cpu_flags() -> frozenset[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    for line in text.splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()
