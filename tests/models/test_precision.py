"""Which element type a stage computes in."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from miaotui.models import precision
from miaotui.models.precision import multiplies_bfloat16, resolve_dtype

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("flags", "gain", "multiplies"),
    [
        ({"avx512f"}, 9.0, False),
        ({"avx512_bf16"}, 1.2, False),
        ({"avx512_bf16"}, 1.9, True),
        ({"avx512_bf16", "amx_bf16"}, 0.5, True),
    ],
)
def test_only_fast_asks_what_the_cpu_multiplies(
    flags: set[str], gain: float, multiplies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_cpu_flags", lambda: frozenset(flags))
    monkeypatch.setattr(precision, "_trial", lambda: gain)
    multiplies_bfloat16.cache_clear()
    try:
        fast = resolve_dtype("fast", CPU)
        assert fast is (torch.bfloat16 if multiplies else torch.float32)
        assert resolve_dtype("auto", CPU) is torch.float32
        assert resolve_dtype("bfloat16", CPU) is torch.bfloat16
    finally:
        multiplies_bfloat16.cache_clear()


def test_trial_compares_two_types() -> None:
    assert 0.001 < precision._trial() < 1000


def test_asked_from_outside() -> None:
    argv = [sys.executable, "-m", "miaotui.models.precision"]
    for asked, device, code in (("fast", "cpu", 0), ("fast", "tpu", 1)):
        done = subprocess.run([*argv, asked, device], capture_output=True, text=True, timeout=120)
        assert done.returncode == code, done.stderr
        if code == 0:
            assert done.stdout.strip() in ("float32", "bfloat16")
        else:
            assert "'tpu'" in done.stderr
            assert "Traceback" not in done.stderr
