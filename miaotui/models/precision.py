"""Which device and element type to compute with on this machine."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from torch.nn.functional import linear

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

# Of processors with AVX512-BF16 alone some multiply twice as fast as in float32, others more
# slowly once inputs are converted; the layers around the products gain less than these do.
_TRIAL_FLAG, _SURE_FLAG = "avx512_bf16", "amx_bf16"
_TRIAL_GAIN = 1.5


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

    "auto" is bfloat16 on GPUs that multiply it and float32 on every CPU, so that answers do not
    depend on which CPU it is. "fast" is bfloat16 on CPUs too, where `multiplies_bfloat16`.

    Raises:
        ValueError: not one of auto, fast, float32, float16, bfloat16; or float16 on a CPU.
    """
    if dtype == "auto" and device.type == "cpu":
        return torch.float32
    if dtype in ("auto", "fast"):
        return torch.bfloat16 if multiplies_bfloat16(device) else torch.float32
    resolved = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if resolved not in DTYPES.values():
        raise ValueError(f"{dtype!r} is not a dtype; use auto, fast, {', '.join(DTYPES)}")
    if resolved is torch.float16 and device.type == "cpu":
        raise ValueError("float16 is not computed on CPUs; use float32, bfloat16, fast or auto")
    assert resolved is not None
    return resolved


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name without "torch."."""
    return str(dtype).removeprefix("torch.")


@cache
def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are clearly faster here than in float32.

    GPUs from compute capability 8.0, and CPUs with AMX; CPUs with AVX512-BF16 alone are asked
    by a trial of some 20 ms, once a process.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    flags = _cpu_flags()
    return _SURE_FLAG in flags or (_TRIAL_FLAG in flags and _trial() > _TRIAL_GAIN)


def _trial() -> float:
    """How many times as fast a product is in bfloat16.

    By this thread's CPU time, the least of several in turns: other work on the machine must not
    decide, or two stages of a model would disagree.
    """
    inputs = {
        dtype: (torch.ones(256, 384, dtype=dtype), torch.ones(1536, 384, dtype=dtype))
        for dtype in (torch.float32, torch.bfloat16)
    }
    least = dict.fromkeys(inputs, math.inf)
    with torch.inference_mode():
        for _ in range(8):
            for dtype, (left, right) in inputs.items():
                began = time.thread_time()
                linear(left, right)
                least[dtype] = min(least[dtype], time.thread_time() - began)
    return least[torch.float32] / least[torch.bfloat16]


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


if __name__ == "__main__":  # `miaotui up` asks so, without torch in its own process
    try:
        print(dtype_name(resolve_dtype(sys.argv[1], resolve_device(sys.argv[2]))))
    except ValueError as error:
        sys.exit(str(error))
