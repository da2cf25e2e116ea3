"""Finds the fastest compression that loses at most so much F1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from miaotui.compression.compress import tried
from miaotui.compression.errors import CompressionError
from miaotui.compression.evaluate import Measurement
from miaotui.compression.report import Report, write_report
from miaotui.compression.steps import Options
from miaotui.compression.sweep import Advance, Candidate, Tell
from miaotui.compression.sweep_report import Tried, write_sweep

_PRUNINGS = ("", "prune-neurons=0.2", "prune-heads=0.2,prune-neurons=0.4", "prune-layers=1")
_FACTORINGS = ("", "asvd=0.8", "asvd=0.6")
_QUANTIZATIONS = ("int8", "int8-static")


def grid(*, calibrated: bool) -> tuple[str, ...]:
    """Combinations of pruning, factorisation and quantisation, each at a few strengths.

    Without questions to calibrate on, only what needs none.
    """
    if not calibrated:
        return "int8", "svd=0.8,int8", "svd=0.6,int8", "svd=0.4,int8"
    return tuple(
        ",".join(part for part in parts if part)
        for parts in product(_PRUNINGS, _FACTORINGS, _QUANTIZATIONS)
    )


@dataclass(frozen=True)
class Found:
    """The report of the chosen compression, and what came of all."""

    report: Report
    tried: tuple[Tried, ...]


def compress_within(
    model_dir: Path | str,
    out_dir: Path | str,
    *,
    max_loss: float,
    evaluate: Sequence[Path | str],
    calibrate: Sequence[Path | str] = (),
    methods: Sequence[str] = (),
    dask: str | None = None,
    tell: Tell = lambda text: None,
    advance: Advance = lambda done, total: None,
    **options: Any,
) -> Found:
    """Try methods, and keep the checkpoint of the fastest that is good enough.

    Fastest by CPU time a question. All checkpoints lie beside `out_dir` until the choice is made.
    `sweep.json`, `.txt` and (with matplotlib) `.svg` in `out_dir` tell of all of them.

    Args:
        model_dir, out_dir, evaluate, calibrate, dask, tell, advance: as for `compress_model`.
        max_loss: points of F1 that may be lost on `evaluate`.
        methods: none: those of `grid`. One that does not fit the model is passed over.
        options: others of `Options`.

    Raises:
        CompressionError: none loses so little, or as for `compress_model`.
    """
    out = Path(out_dir)
    if not evaluate:
        raise CompressionError("a loss can only be kept to where it is measured; give --evaluate")
    if options.get("private"):
        raise CompressionError(
            "each method tried would spend privacy; choose the method first, on other questions"
        )
    methods = tuple(dict.fromkeys(methods)) or grid(calibrated=bool(calibrate))
    chosen = Options(tuple(map(Path, calibrate)), tuple(map(Path, evaluate)), **options)
    with tried(Path(model_dir), out, methods, chosen, dask, tell, advance) as candidates:
        before = _before(candidates)
        found = tuple(_tried(candidate) for candidate in candidates)
        good = [
            (cost, candidate, candidate.report)
            for candidate, (loss, cost) in zip(candidates, map(_costs, candidates), strict=True)
            if candidate.report is not None and loss <= max_loss
        ]
        if not good:
            shown = ", ".join(
                f"{one.method} {one.f1_loss:.2f}" for one in found if one.f1_loss is not None
            )
            raise CompressionError(f"nothing loses at most {max_loss:g} F1: {shown}")
        _, best, report = min(good, key=lambda item: item[0])
        write_report(report, best.directory)
        write_sweep(best.directory, before, found, best.method, max_loss)
        best.directory.rename(out)
    return Found(report, found)


def _before(candidates: Sequence[Candidate]) -> Measurement:
    for candidate in candidates:
        if candidate.report is not None:
            if candidate.report.before.f1 is None:
                raise CompressionError("the evaluated questions have no answers to score against")
            return candidate.report.before
    refused = candidates[0].refused
    assert refused is not None
    raise refused


def _tried(candidate: Candidate) -> Tried:
    report = candidate.report
    return Tried(
        candidate.method,
        None if report is None else report.f1_loss,
        None if report is None else report.after,
        None if candidate.refused is None else str(candidate.refused),
    )


def _costs(candidate: Candidate) -> tuple[float, float]:
    """F1 lost, and CPU ms a question."""
    if candidate.report is None or candidate.report.f1_loss is None:
        return float("inf"), float("inf")
    return candidate.report.f1_loss, candidate.report.after.cpu_ms_question or 0.0
