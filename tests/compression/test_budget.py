"""The fastest compression within a loss."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from miaotui.compression.budget import compress_within, grid
from miaotui.compression.errors import CompressionError
from miaotui.compression.methods import parse_method
from miaotui.models.stage import StageModel


def test_the_fastest_within_the_loss_is_kept(model: Path, questions: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = compress_within(
        model,
        out,
        max_loss=100.0,
        evaluate=[questions],
        calibrate=[questions],
        methods=("int8", "prune-layers=2,int8-static", "prune-layers=9"),
    )
    costs = {one.method: one.measured.cpu_ms_question for one in found.tried if one.measured}
    fastest = min(costs, key=lambda method: costs[method] or 0.0)
    assert found.report.method == fastest
    expected = 1 if "prune-layers" in fastest else 3
    assert StageModel.load(out).info.model_layers == expected
    assert [one.refused is None for one in found.tried] == [True, True, False]
    told = json.loads((out / "sweep.json").read_text(encoding="utf-8"))
    assert told["kept"] == fastest
    assert [one["method"] for one in told["tried"]] == [one.method for one in found.tried]
    assert f"* {fastest}" in (out / "sweep.txt").read_text(encoding="utf-8")
    assert fastest in (out / "sweep.svg").read_text(encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_grid() -> None:
    for calibrated in (True, False):
        methods = grid(calibrated=calibrated)
        assert len(set(methods)) == len(methods) > 3
        for method in methods:
            steps = parse_method(method)
            assert calibrated or not any(step.needs_questions for step in steps)


def test_refused_budgets(model: Path, questions: Path, tmp_path: Path) -> None:
    with pytest.raises(CompressionError, match="at most -101 F1: int8"):
        compress_within(
            model, tmp_path / "out", max_loss=-101, evaluate=[questions], methods=["int8"]
        )
    assert not (tmp_path / "out").exists()
    with pytest.raises(CompressionError, match="--evaluate"):
        compress_within(model, tmp_path / "out", max_loss=1, evaluate=[])
