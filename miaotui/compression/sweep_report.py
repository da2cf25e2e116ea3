"""What a sweep found: as JSON, as a table, and as a plot of F1 against time (SVG)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from miaotui.compression.evaluate import Measurement

JSON_FILE, TEXT_FILE, PLOT_FILE = "sweep.json", "sweep.txt", "sweep.svg"
_COLUMNS = (
    # heading, attribute of `Measurement`, divisor
    ("F1", "f1", 1.0),
    ("CPU ms/question", "cpu_ms_question", 1.0),
    ("alone, ms", "latency_ms", 1.0),
    ("parameters, MB", "memory_bytes", 1e6),
    ("disk, MB", "disk_bytes", 1e6),
)


@dataclass(frozen=True)
class Tried:
    """A method: points of F1 lost and the measurement, or why it was refused."""

    method: str
    f1_loss: float | None
    measured: Measurement | None
    refused: str | None


def sweep_text(before: Measurement, tried: Sequence[Tried], kept: str) -> str:
    """A table for a terminal, the fastest first; `*` marks what was kept."""
    width = max(14, *(len(one.method) for one in tried)) + 2
    lines = [" " * width + "".join(f"{heading:>17}" for heading, _, _ in _COLUMNS)]
    measured = [(one.method, one.measured) for one in tried if one.measured is not None]
    measured.sort(key=lambda item: item[1].cpu_ms_question or 0.0)
    for name, figures in [("uncompressed", before), *measured]:
        mark = "* " if name == kept else "  "
        values = (getattr(figures, key) / divisor for _, key, divisor in _COLUMNS)
        lines.append(f"{mark}{name}".ljust(width) + "".join(f"{v:>17,.2f}" for v in values))
    lines += [f"  {one.method}: {one.refused}" for one in tried if one.refused is not None]
    return "\n".join(lines) + "\n"


def write_sweep(
    directory: Path, before: Measurement, tried: Sequence[Tried], kept: str, max_loss: float
) -> None:
    """Write `sweep.json` and `.txt`, and `.svg` where matplotlib is installed."""
    content = {
        "max_loss": max_loss,
        "kept": kept,
        "uncompressed": asdict(before),
        "tried": [asdict(one) for one in tried],
    }
    text = json.dumps(content, indent=2, ensure_ascii=False)
    (directory / JSON_FILE).write_text(text + "\n", encoding="utf-8")
    (directory / TEXT_FILE).write_text(sweep_text(before, tried, kept), encoding="utf-8")
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure = Figure(figsize=(9, 6), layout="constrained")
        axes = figure.subplots()
        points = [("uncompressed", before)]
        points += [(one.method, one.measured) for one in tried if one.measured is not None]
        for name, one in points:
            axes.scatter(
                one.cpu_ms_question or 0.0,
                one.f1 or 0.0,
                s=one.memory_bytes / max(before.memory_bytes, 1) * 300,
                alpha=0.6,
                color={"uncompressed": "#4472a8", kept: "#2a9d5c"}.get(name, "#999"),
            )
            axes.annotate(name, (one.cpu_ms_question or 0.0, one.f1 or 0.0), fontsize=6)
        axes.axhline((before.f1 or 0.0) - max_loss, color="#c8553d", linestyle="--", linewidth=1)
        axes.set_xlabel("CPU ms a question, batched (area of a point: bytes of the parameters)")
        axes.set_ylabel("F1")
        figure.savefig(directory / PLOT_FILE, metadata={"Date": None})
