"""Cuts a model's layers into stages so that the slowest stage is as fast as can be.

A pipeline answers at the rate of its slowest stage. Stages are contiguous layer ranges; the
first also embeds, the last also holds the head, and both count. The cut is found exactly, by
dynamic programming over all of them (the linear partition problem).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from miaotui.models.checkpoint import Checkpoint
from miaotui.models.costs import ModelCosts, estimate_costs
from miaotui.models.decomposed import check_held
from miaotui.models.errors import PartitionError
from miaotui.models.families import Family
from miaotui.models.layers import LayerRange
from miaotui.models.precision import resolve_device, resolve_dtype
from miaotui.models.shape import Task
from miaotui.models.stage_info import inspect_model, parameter_bytes

__all__ = [
    "LayerRange",
    "Partition",
    "StagePlan",
    "check_layers",
    "parse_layers",
    "partition_layers",
    "plan_stages",
]


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage of a partition.

    `parameter_bytes` in the compute dtype; `cost` in the unit of the costs planned with;
    `cost_share` is the stage's part of the whole model's cost, 0 to 1.
    """

    index: int
    layers: LayerRange
    parameter_bytes: int
    cost: float
    cost_share: float


@dataclass(frozen=True, slots=True)
class Partition:
    """A model's stages, in order; `costs` are those that it was planned with.

    So many of the model's first layers are an encoder's beside a decoder: `encoder_layers`.
    """

    stages: tuple[StagePlan, ...]
    costs: ModelCosts
    dtype: str
    encoder_layers: int = 0

    @property
    def bottleneck(self) -> StagePlan:
        """The slowest stage."""
        return max(self.stages, key=lambda stage: stage.cost)

    @property
    def balance(self) -> float:
        """Mean cost of a stage over that of the slowest; 1 is perfect."""
        return sum(stage.cost for stage in self.stages) / len(self.stages) / self.bottleneck.cost

    @property
    def parameter_bytes(self) -> int:
        """Bytes of all stages' parameters."""
        return sum(stage.parameter_bytes for stage in self.stages)


def plan_stages(
    directory: Path | str,
    stages: int | Sequence[LayerRange],
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    costs: ModelCosts | None = None,
    task: Task = "auto",
) -> Partition:
    """Plan a model's stages; reads configuration and headers, no tensors.

    Args:
        directory: a Hugging Face model directory.
        stages: how many, to be balanced; or the layer ranges, to be checked and costed.
        dtype: element type to compute in, as for `StageModel.load`; parameters are counted
            in it.
        device: where the stages will run; decides what "auto" means for `dtype`.
        costs: what embeddings, layers and head cost; None: estimated, which is the same on
            every machine, so that stages planned apart fit together.
        task: as for `StageModel.load`.

    Raises:
        PartitionError: too many or too few stages, or ranges that do not cut the model.
        UnsupportedModelError, CheckpointError: as for `StageModel.load`.
    """
    checkpoint = Checkpoint.open(directory)
    family, config, shape = inspect_model(checkpoint, task)
    compute = resolve_dtype(dtype, resolve_device(device))
    costs = estimate_costs(shape) if costs is None else costs
    if len(costs.layers) != shape.layers:
        raise PartitionError(
            f"costs of {len(costs.layers)} layers were given for a model of {shape.layers}"
        )
    if isinstance(stages, int):
        ranges = partition_layers(costs, stages, together=shape.decomposed_layers)
    else:
        ranges = check_layers(stages, shape.layers)
        for layers in ranges:
            check_held(layers, shape.decomposed_layers)
    plans = []
    for index, layers in enumerate(ranges):
        cost = costs.of(layers)
        size = _stage_bytes(family, config, layers, compute)
        plans.append(StagePlan(index, layers, size, cost, cost / costs.total))
    encoder_layers = 0 if shape.source is None else shape.source.layers
    return Partition(tuple(plans), costs, str(compute).removeprefix("torch."), encoder_layers)


def partition_layers(costs: ModelCosts, stages: int, together: int = 0) -> list[LayerRange]:
    """Return the ranges of `stages` contiguous stages whose greatest cost is the least possible.

    Among all such, those whose costs have the least sum of squares, so that the other stages
    balance too. The first `together` layers are the first stage's. Takes
    O(stages * layers^2) time.

    Raises:
        PartitionError: fewer than one stage, or more than the layers allow.
    """
    count = len(costs.layers)
    together = max(1, together)
    most = count - together + 1
    if not 1 <= stages <= most:
        kept = f", the first {together} of which stay together," if together > 1 else ""
        raise PartitionError(
            f"{stages} stages asked for; a model of {count} layers{kept} splits into 1 to {most}"
        )
    worst = _best_cut(costs, stages, together, max, math.inf)[0]
    # The limit is loosened by what adding floats in another order can differ.
    limit = worst * (1 + 1e-12)
    cuts = _best_cut(costs, stages, together, lambda left, cost: left + cost * cost, limit)[1]
    return [LayerRange(first, end) for first, end in pairwise(cuts)]


def parse_layers(text: str) -> list[LayerRange]:
    """Return the ranges in "0-3,3-6": FIRST-END, END excluded, separated by commas.

    Raises:
        PartitionError: a range is malformed, or they do not follow one another from 0.
    """
    ranges = [LayerRange.parse(part) for part in text.split(",")]
    return check_layers(ranges, ranges[-1].end)


def check_layers(ranges: Sequence[LayerRange], layers: int) -> list[LayerRange]:
    """Return the ranges if they cut a model of `layers` layers, each layer in just one.

    Raises:
        PartitionError: they leave a gap, overlap, or end elsewhere than the model does.
    """
    if not ranges:
        raise PartitionError("no layer ranges; give one for each stage, such as 0-3,3-6")
    end = 0
    for index, part in enumerate(ranges):
        if part.first != end:
            kind = "leaves a gap after" if part.first > end else "overlaps"
            raise PartitionError(
                f"layer range {part} of stage {index} {kind} the stage before; it must begin "
                f"at layer {end}"
            )
        end = part.end
    if end != layers:
        raise PartitionError(
            f"the layer ranges end at layer {end}, the model has {layers}; the last stage must "
            f"end at {layers}"
        )
    return list(ranges)


def _best_cut(
    costs: ModelCosts,
    stages: int,
    together: int,
    combine: Callable[[float, float], float],
    limit: float,
) -> tuple[float, list[int]]:
    """Minimise a cost combined over stages, none above `limit`; return it and the cuts.

    The first stage has `together` layers at least.
    """
    count = len(costs.layers)
    best = [[math.inf] * (count + 1) for _ in range(stages + 1)]
    cut = [[0] * (count + 1) for _ in range(stages + 1)]
    best[0][0] = 0.0
    for stage in range(1, stages + 1):
        for end in range(together + stage - 1, count - (stages - stage) + 1):
            for first in range(stage - 1, end):
                cost = costs.of(LayerRange(first, end))
                if cost > limit or math.isinf(best[stage - 1][first]):
                    continue
                total = combine(best[stage - 1][first], cost)
                if total < best[stage][end]:
                    best[stage][end], cut[stage][end] = total, first
    cuts = [count]
    for stage in range(stages, 0, -1):
        cuts.append(cut[stage][cuts[-1]])
    return best[stages][count], cuts[::-1]


def _stage_bytes(family: Family, config: Any, layers: LayerRange, dtype: torch.dtype) -> int:
    return parameter_bytes(family.skeleton(config, layers), dtype)
