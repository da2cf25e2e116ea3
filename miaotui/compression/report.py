"""What a compression did: as JSON, as text, and as a plot (SVG)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from miaotui.compression.evaluate import Measurement
from miaotui.compression.plot import plot_report

JSON_FILE, TEXT_FILE, PLOT_FILE = "compression.json", "compression.txt", "compression.svg"

# (heading, attribute of `Measurement`, divisor, unit, whether less is better)
ROWS: tuple[tuple[str, str, float, str, bool], ...] = (
    ("size on disk", "disk_bytes", 1e6, "MB", True),
    ("parameters in memory", "memory_bytes", 1e6, "MB", True),
    ("latency, one question, p50", "latency_ms", 1, "ms", True),
    ("CPU time, one question", "cpu_ms_single", 1, "ms", True),
    ("CPU time a question, batched", "cpu_ms_question", 1, "ms", True),
    ("throughput", "questions_per_second", 1, "1/s", False),
    ("throughput of a CPU second", "questions_per_cpu_second", 1, "1/s", False),
    ("exact match", "em", 1, "%", False),
    ("F1", "f1", 1, "%", False),
)


@dataclass(frozen=True)
class Report:
    """Of one compression. `details` has what each step did, and the sensitivities."""

    model: str
    method: str
    settings: Mapping[str, Any]
    before: Measurement
    after: Measurement
    evaluated_on: Mapping[str, Any] | None
    threads: int
    cpu_seconds: float
    details: Mapping[str, Any]

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @property
    def f1_loss(self) -> float | None:
        """Points of F1 lost; negative where it gained."""
        if self.before.f1 is None or self.after.f1 is None:
            return None
        return round(self.before.f1 - self.after.f1, 2)


def as_text(report: Report) -> str:
    """A table for a terminal."""
    lines = [f"{report.model}, {report.method}"]
    lines.append(f"{'':30}{'before':>12}{'after':>12}{'after/before':>14}")
    for heading, name, divisor, unit, _ in ROWS:
        before, after = (getattr(m, name) for m in (report.before, report.after))
        if before is None or after is None:
            continue
        shown = f"{before / divisor:>9,.2f} {unit:<3}"[:13], f"{after / divisor:>8,.2f} {unit:<3}"
        ratio = f"{after / before:.2f}" if before else "–"
        lines.append(f"{heading:30}{shown[0]}{shown[1]}{ratio:>13}")
    if report.evaluated_on:
        lines.append(
            f"{report.evaluated_on['questions']} questions, windows of "
            f"{report.evaluated_on['mean_tokens']} tokens on average, {report.threads} threads"
        )
    spent = report.settings.get("privacy")
    if spent:
        lines.append(
            f"recovery with differential privacy: epsilon {spent['epsilon']:g} at delta "
            f"{spent['delta']:.3g} spent, for {spent['unit']} of the private files "
            f"({spent['passages']} passages, {spent['steps']} steps); calibration, sensitivity "
            "and scores are of other questions, which are not protected"
        )
    found = report.details.get("sensitivity")
    if found:
        lines.append(f"loss {found['loss']:.3f}; without a layer, and its weights' sensitivity:")
        for index, (loss, weights) in enumerate(
            zip(found["loss_without_layer"], found["weights"], strict=True)
        ):
            parts = " ".join(f"{part} {value:.2f}" for part, value in weights.items())
            lines.append(f"  layer {index}: {loss:7.3f}   {parts}")
    return "\n".join(lines) + "\n"


def write_report(report: Report, directory: Path) -> None:
    """Write `compression.json`, `.txt` and `.svg` into a directory."""
    content = json.dumps(report.as_json(), indent=2, ensure_ascii=False, default=str)
    (directory / JSON_FILE).write_text(content + "\n", encoding="utf-8")
    (directory / TEXT_FILE).write_text(as_text(report), encoding="utf-8")
    (directory / PLOT_FILE).write_text(plot_report(report.as_json(), ROWS), encoding="utf-8")
