"""A report's plot: what is left of each figure, and how much each layer matters, as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

_WIDTH, _ROW, _LEFT, _BAR = 760, 26, 250, 380
_GOOD, _BAD, _PLAIN = "#2a9d5c", "#c8553d", "#4472a8"


def plot_report(
    report: Mapping[str, Any], rows: Sequence[tuple[str, str, float, str, bool]]
) -> str:
    """Return an SVG document: bars of after / before, then the loss without each layer.

    `rows`: heading, key of the measurements, divisor, unit, whether less is better.
    """
    drawn: list[str] = []
    y = 56
    ratios = []
    for heading, key, divisor, unit, less in rows:
        before, after = report["before"][key], report["after"][key]
        if before and after is not None:
            ratios.append((heading, before / divisor, after / divisor, unit, less))
    widest = max([after / before for _, before, after, _, _ in ratios] + [1.0])
    for heading, before, after, unit, less in ratios:
        better = after <= before if less else after >= before
        drawn += _bar(
            y,
            heading,
            after / before / widest,
            f"{before:,.1f} → {after:,.1f} {unit}",
            _GOOD if better else _BAD,
        )
        y += _ROW
    mark = _LEFT + _BAR / widest
    drawn.append(
        f'<line x1="{mark:.1f}" y1="48" x2="{mark:.1f}" y2="{y}" stroke="#666" '
        'stroke-dasharray="3 3"/>'
    )
    found = report["details"].get("sensitivity")
    if found:
        y += 30
        drawn.append(_text(16, y, f"Loss without a layer (with all: {found['loss']:.2f})", bold=1))
        y += 12
        most = max(found["loss_without_layer"]) or 1.0
        for index, loss in enumerate(found["loss_without_layer"]):
            drawn += _bar(y, f"layer {index}", loss / most, f"{loss:.2f}", _PLAIN)
            y += _ROW
    title = _text(16, 28, f"{report['model']}, {report['method']}: after / before", bold=1)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{y + 16}" '
        f'viewBox="0 0 {_WIDTH} {y + 16}" font-family="sans-serif" font-size="13">'
        '<rect width="100%" height="100%" fill="#fff"/>' + "".join([title, *drawn]) + "</svg>\n"
    )


def _bar(y: float, heading: str, share: float, value: str, colour: str) -> list[str]:
    width = max(1.0, share * _BAR)
    return [
        _text(16, y + 15, heading),
        f'<rect x="{_LEFT}" y="{y + 2}" width="{width:.1f}" height="17" fill="{colour}"/>',
        _text(_LEFT + 6, y + 15, value, halo=True),
    ]


def _text(x: float, y: float, content: str, *, bold: bool | int = False, halo: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    outline = ' stroke="#fff" stroke-width="3" paint-order="stroke"' if halo else ""
    return f'<text x="{x}" y="{y}" fill="#222"{weight}{outline}>{escape(content)}</text>'
