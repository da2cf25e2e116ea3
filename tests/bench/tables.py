"""The comparison's report: tables for a terminal and in Markdown, and a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Cells = list[list[str]]
"""The heading, then the lines."""
SERVED_TARGET, BARE_TARGET = 1.5, 1.2
# Miaotui's sides that have the peers' weights, but for the rounding.
SAME_WEIGHTS = tuple(f"Miaotui {n}" for n in ("float32", "bfloat16", "int8", "int8-static"))


def _number(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def engine_cells(rows: Sequence[Mapping[str, Any]]) -> Cells:
    """All sides at all concurrencies."""
    cells = [["side", "at once", "q/s", "p50 ms", "p99 ms", "cores", "MB", "equal %", "F1", "±"]]
    cells += [
        [
            row["name"],
            str(row["at_once"] or "batch"),
            _number(row["questions_a_second"], 1),
            _number(row["p50"]),
            _number(row["p99"]),
            _number(row["cores"], 2),
            _number(row["memory"]),
            _number(row["equal"], 1),
            _number(row["f1"], 1),
            _number(row.get("f1_error"), 1),
        ]
        for row in sorted(rows, key=lambda row: (row["at_once"], -row["questions_a_second"]))
    ]
    return cells


def dict_cells(rows: Sequence[Mapping[str, Any]]) -> Cells:
    """A part's lines under their own names."""
    return [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]


def _cell(value: float | str | None) -> str:
    if isinstance(value, float):
        return _number(value, 1 if abs(value) < 1000 else 0)
    return "" if value is None else str(value)


def verdict(rows: Sequence[Mapping[str, Any]], at_once: int = 32) -> list[str]:
    """The target for uncached questions at this concurrency, in words.

    Of Miaotui's sides with the peers' weights, the fastest within 0.5 F1 of its float32 counts.
    """
    ours = [row for row in rows if row["name"] in SAME_WEIGHTS and row["at_once"] == at_once]
    plain = next((row["f1"] for row in ours if row["name"] == "Miaotui float32"), None)
    ours = [row for row in ours if plain is None or row["f1"] >= plain - 0.5]
    if not ours:
        return []
    best = max(ours, key=lambda row: float(row["questions_a_second"]))
    lines = []
    for kind, target in (("served", SERVED_TARGET), ("bare", BARE_TARGET)):
        peers = [r for r in rows if r["kind"] == kind and r["at_once"] in (0, at_once)]
        if peers:
            peer = max(peers, key=lambda row: float(row["questions_a_second"]))
            ratio = best["questions_a_second"] / peer["questions_a_second"]
            lines.append(
                f"{best['name']} at {at_once} at once is {ratio:.2f} times the best {kind} peer, "
                f"{peer['name']} (target {target}): {'reached' if ratio >= target else 'missed'}"
            )
    return lines


def smaller(
    rows: Sequence[Mapping[str, Any]], parameters: Mapping[str, int], at_once: int = 32
) -> list[str]:
    """The target for a smaller model, in words: of the fastest that loses one F1 at most.

    `parameters`: bytes in memory by side. Where the CPU does not multiply bfloat16 faster,
    speed is told against float32, memory against bfloat16 all the same.
    """
    ours = {
        row["name"].removeprefix("Miaotui "): row
        for row in rows
        if row["kind"] == "miaotui" and row["at_once"] == at_once
    }
    whole = ours.get("bfloat16") or ours.get("float32")
    least = None if whole is None or whole["f1"] is None else whole["f1"] - 1
    small = [
        row
        for name, row in ours.items()
        if name not in ("float32", "bfloat16") and (least is None or row["f1"] >= least)
    ]
    if whole is None or not small:
        return []
    best = max(small, key=lambda row: float(row["questions_a_second"]))
    share = parameters[best["name"]] / parameters["Miaotui bfloat16"]
    speed = best["questions_a_second"] / whole["questions_a_second"]
    lost = "" if least is None else f", for {whole['f1'] - best['f1']:.1f} F1"
    return [
        f"{best['name']} holds {share:.2f} of bfloat16's bytes (target 0.5) and is {speed:.2f} "
        f"times as fast as {whole['name']} (target 2 times bfloat16){lost}"
    ]


def where(rows: Sequence[Mapping[str, Any]], at_once: int = 32) -> list[str]:
    """CPU time a question of each of Miaotui's services, side by side."""
    return [
        f"CPU ms a question, {row['name']}, {at_once} at once: "
        + ", ".join(f"{name} {spent:.1f}" for name, spent in row["parts"].items())
        for row in rows
        if row.get("parts") and row["at_once"] == at_once
    ]


def markdown(cells: Cells) -> str:
    """A Markdown table; numbers to the right."""
    head, *lines = cells
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *lines))


def print_cells(cells: Cells, console: Console) -> None:
    """The same on a terminal, as wide as it is: 80 columns cut no figure off."""
    table = Table(pad_edge=False)
    for place, name in enumerate(cells[0]):
        table.add_column(name, justify="right" if place else "left", no_wrap=place > 0)
    for line in cells[1:]:
        table.add_row(*line)
    needed = Console(width=1000).measure(table).maximum
    wide = Console(file=console.file, width=max(console.width, needed), soft_wrap=True)
    wide.print(table)


def sections(report: Mapping[str, Any]) -> list[tuple[str, Cells, list[str]]]:
    """Heading, table and remarks of every part that was measured."""
    found = []
    for name, part in report["parts"].items():
        if part["rows"]:
            of_engines = name == "engines"
            cells = (engine_cells if of_engines else dict_cells)(part["rows"])
            remarks = _of_engines(part) if of_engines else []
            remarks += part.get("remarks", [])
            remarks += [f"left out: {side}: {why}" for side, why in part.get("skipped", [])]
            found.append((part["title"], cells, remarks))
    return found


def _of_engines(part: Mapping[str, Any]) -> list[str]:
    rows = part["rows"]
    parameters = part.get("parameters")
    small = smaller(rows, parameters) if parameters else []
    return [*verdict(rows), *small, *where(rows)]


def write_markdown(report: Mapping[str, Any], file: Path) -> None:
    """The whole report."""
    blocks = [f"# Bench\n\n{report['model']}; {report['machine']}"]
    for title, cells, remarks in sections(report):
        blocks += [f"## {title}", markdown(cells), "\n".join(f"- {line}" for line in remarks)]
    file.write_text("\n\n".join(filter(None, blocks)) + "\n")


def plot(rows: Sequence[Mapping[str, Any]], file: Path, at_once: int = 32) -> bool:
    """Questions a second against F1 as SVG or PNG; whether there was anything to draw."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = [row for row in rows if row["f1"] is not None and row["at_once"] in (0, at_once)]
    if not drawn:
        return False
    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    for kind, mark in (("bare", "o"), ("served", "s"), ("miaotui", "*")):
        of = [row for row in drawn if row["kind"] == kind]
        axes.scatter(
            [row["questions_a_second"] for row in of],
            [row["f1"] for row in of],
            marker=mark,
            s=120 if mark == "*" else 50,
            label=kind,
        )
    for number, row in enumerate(sorted(drawn, key=lambda row: float(row["questions_a_second"]))):
        axes.annotate(
            row["name"],
            (row["questions_a_second"], row["f1"]),
            xytext=(4, 6 if number % 2 else -12),
            textcoords="offset points",
            fontsize=7,
        )
    axes.set(xlabel=f"questions a second ({at_once} at once)", ylabel="F1, %", xlim=(0, None))
    axes.legend(loc="lower left")
    figure.savefig(file)
    pyplot.close(figure)
    return True
