"""`miaotui plan`: how a model is split, for a person to see."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from miaotui.models.costs import measure_costs
from miaotui.models.loading import model_kind
from miaotui.models.partition import LayerRange, parse_layers, plan_stages

_ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_BAR_CELLS = 10


@dataclass(frozen=True)
class Row:
    """One stage of the plan."""

    stage: int
    first_layer: int
    end_layer: int
    parameters: int
    bytes: int
    cost: float
    cost_share: float


@dataclass(frozen=True)
class Planned:
    """A whole plan."""

    model: str
    dtype: str
    # "flop" (estimated from the model's dimensions) or "s" (measured here), for one sequence.
    cost_unit: str
    # Mean cost of a stage over that of the slowest: 1 is perfect.
    balance: float
    stages: tuple[Row, ...]
    # "extractive" or "generative".
    kind: str = "extractive"
    # Of an encoder-decoder model: so many of its layers, the first ones, are the encoder's.
    encoder_layers: int = 0

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def make_plan(
    directory: Path, stages: int, *, layers: str, dtype: str, device: str, measure: bool
) -> Planned:
    """Plans without loading the model, except where costs are to be measured.

    Raises `ValueError` where it cannot be planned.
    """
    ranges: int | list[LayerRange] = parse_layers(layers) if layers else stages
    costs = measure_costs(directory, dtype=dtype, device=device) if measure else None
    partition = plan_stages(directory, ranges, dtype=dtype, device=device, costs=costs)
    size = _ELEMENT_BYTES[partition.dtype]
    rows = tuple(
        Row(
            stage.index,
            stage.layers.first,
            stage.layers.end,
            stage.parameter_bytes // size,
            stage.parameter_bytes,
            stage.cost,
            stage.cost_share,
        )
        for stage in partition.stages
    )
    return Planned(
        directory.name,
        partition.dtype,
        partition.costs.unit,
        partition.balance,
        rows,
        model_kind(directory),
        partition.encoder_layers,
    )


def show_plan(console: Console, plan: Planned) -> None:
    """A table of the stages, and the `--layers` that would make it so."""
    table = Table(box=None, pad_edge=False, header_style="dim", title_justify="left")
    table.add_column("stage", justify="right")
    for heading in ("layers", "holds"):
        table.add_column(heading)
    for heading in ("parameters", "memory", "cost"):
        table.add_column(heading, justify="right")
    table.add_column("share of cost", no_wrap=True)
    last = len(plan.stages) - 1
    head = "answer head" if plan.kind == "extractive" else "head, sampler"
    for row in plan.stages:
        extras = ["+ embeddings"] if row.stage == 0 else []
        extras += [f"+ {head}"] if row.stage == last else []
        count = row.end_layer - row.first_layer
        held = str(count)
        if plan.encoder_layers:
            encoder = max(0, min(row.end_layer, plan.encoder_layers) - row.first_layer)
            sides = ((encoder, "encoder"), (count - encoder, "decoder"))
            held = " + ".join(f"{layers} {side}" for layers, side in sides if layers)
        table.add_row(
            str(row.stage),
            f"{row.first_layer}–{row.end_layer - 1}" if count > 1 else str(row.first_layer),
            " ".join([held, *extras]),
            f"{row.parameters:,}",
            f"{row.bytes / 1e6:,.1f} MB",
            f"{row.cost * 1e3:.2f} ms" if plan.cost_unit == "s" else f"{row.cost / 1e9:.2f} GFLOP",
            f"{'█' * round(row.cost_share * _BAR_CELLS)} {row.cost_share:.1%}",
        )
    total = sum(row.parameters for row in plan.stages)
    size = sum(row.bytes for row in plan.stages)
    console.print(
        f"[bold]{plan.model}[/]: {total:,} parameters, {size / 1e6:,.1f} MB in {plan.dtype}, "
        f"over {len(plan.stages)} stage{'s' if last else ''}\n",
        highlight=False,
    )
    console.print(table, highlight=False)
    how = "measured on this machine" if plan.cost_unit == "s" else "estimated from its dimensions"
    ranges = ",".join(f"{row.first_layer}-{row.end_layer}" for row in plan.stages)
    console.print(
        f"\nCost of one sequence of 256 tokens, {how}; balance {plan.balance:.0%} "
        f"(mean over slowest stage).\nThe same by hand: --layers {ranges}",
        style="dim",
        highlight=False,
    )
