"""Training through the rounding of a quantisation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from miaotui.compression import CompressionError, compress_model
from miaotui.compression.quantize import quantize
from miaotui.compression.questions import Labelled
from miaotui.compression.recover import recover
from miaotui.compression.steps import Options, calibration_batches
from miaotui.compression.workspace import Workspace
from miaotui.models.compressed import LowRankLinear
from miaotui.models.stage import StageModel
from miaotui.text.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def batches(model: Path, questions: Path) -> list[Labelled]:
    """The questions as a model sees them."""
    return calibration_batches(load_tokenizer(model), Options(calibrate=(questions,)))


def _hidden(workspace: Workspace, batches: list[Labelled]) -> torch.Tensor:
    with torch.inference_mode():
        return torch.cat([workspace.hidden(item.batch) for item in batches])


@pytest.mark.parametrize("method", ["int8-static", "int4-static", "int3", "svd=0.7,int8-static"])
def test_it_trains_what_the_checkpoint_will_compute(
    model: Path, questions: Path, batches: list[Labelled], tmp_path: Path, method: str
) -> None:
    """While it trains, a model computes what its codes give; afterwards its weights are codes."""
    compress_model(model, tmp_path / "made", method=method, calibrate=[questions])
    made = StageModel.load(tmp_path / "made", device="cpu", dtype="float32", fuse=False)
    workspace = Workspace.open(model)
    if "svd" in method:
        compress_model(model, tmp_path / "thin", method="svd=0.7")
        workspace = Workspace.open(tmp_path / "thin")
    exact = _hidden(workspace, batches)
    seen: list[torch.Tensor] = []

    def look() -> None:
        with torch.inference_mode():
            seen.extend(workspace.logits(item.batch) for item in batches)

    static, bits = "static" in method, int(method.split(",")[-1][3])
    quantize(workspace, bits, static=static, batches=batches, train=look)
    wanted = torch.cat([made.run(item.batch) for item in batches])
    found = torch.cat(seen)
    # Weights below 8 bits are rounded twice; a value on the border of two codes may go either way.
    off = (found - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
    assert off < (1e-3 if bits == 8 else 0.02), off
    assert not torch.equal(_hidden(workspace, batches), exact)
    for _, _, module in workspace.linears():
        factors = (module.inner, module.outer) if isinstance(module, LowRankLinear) else (module,)
        assert not any(isinstance(one, nn.Linear) for one in factors)


def test_gradients_pass_the_rounding_and_training_makes_up_for_it(
    model: Path, batches: list[Labelled]
) -> None:
    teacher = Workspace.open(model)
    wanted = _hidden(teacher, batches)

    def distance(steps: int) -> float:
        student = Workspace.open(model)
        losses: list[float] = []

        def train() -> None:
            losses.extend(
                recover(student, teacher, batches, steps, learning_rate=5e-4, exactly=True)
            )

        quantize(student, 3, static=True, batches=batches, group=64, train=train)
        assert len(losses) == steps
        return float((_hidden(student, batches) - wanted).square().mean())

    assert distance(60) < 0.5 * distance(0)


def test_recovery_of_a_quantisation_is_told(model: Path, questions: Path, tmp_path: Path) -> None:
    def made(method: str, steps: int) -> Any:
        out = tmp_path / f"{method}-{steps}"
        report = compress_model(
            model, out, method=method, calibrate=[questions], recover_steps=steps
        )
        assert report.settings["recover_steps"] == (0 if method == "int8" else steps)
        return report.details[method]

    assert "recovery_loss" in made("int8-static", 2)
    assert "recovery_loss" not in made("int8-static", 0)
    assert "recovery_loss" not in made("int8", 2)  # which rounds finely already
    with pytest.raises(CompressionError, match="recovery: needs questions"):
        compress_model(model, tmp_path / "none", method="int4", recover_steps=2)
