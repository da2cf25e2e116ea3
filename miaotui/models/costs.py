"""What each part of a model costs to compute: estimated from its dimensions, or measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch

from miaotui.models.families import ModelShape
from miaotui.models.layers import LayerRange
from miaotui.models.stage import StageModel

# Tokens of the sequence that costs are stated for: a question and a paragraph.
TYPICAL_LENGTH = 256

# How many FLOPs a core does in the time in which it moves one byte of a tensor too large
# for its cache. Of the right order for CPUs and GPUs; it only weighs the embeddings' look-ups
# and normalisation, which move bytes, against matrix products.
_FLOPS_PER_BYTE = 10.0


@dataclass(frozen=True)
class ModelCosts:
    """Cost of a model's parts, all in the same `unit` ("flop" or "s"), for one sequence."""

    embeddings: float
    layers: tuple[float, ...]
    head: float
    unit: str

    def __post_init__(self) -> None:
        """Refuse costs that cannot be; raises `ValueError`."""
        parts = (self.embeddings, *self.layers, self.head)
        if not self.layers or any(not part >= 0 for part in parts) or sum(self.layers) <= 0:
            raise ValueError(f"costs must be numbers of at least 0, and layers cost more: {self}")
        object.__setattr__(self, "_sums", tuple(accumulate(self.layers, initial=0.0)))

    @property
    def total(self) -> float:
        """Cost of the whole model."""
        return self.of(LayerRange(0, len(self.layers)))

    def of(self, layers: LayerRange) -> float:
        """Return the cost of the stage that holds `layers`, with embeddings or head if any."""
        sums: tuple[float, ...] = self._sums  # type: ignore[attr-defined]
        cost = sums[layers.end] - sums[layers.first]
        cost += self.embeddings if layers.first == 0 else 0.0
        cost += self.head if layers.end == len(self.layers) else 0.0
        return cost


def estimate_costs(shape: ModelShape, length: int = TYPICAL_LENGTH) -> ModelCosts:
    """Estimate costs for one sequence of `length` tokens in FLOPs, from dimensions alone.

    A layer: 2 FLOPs a weight of its four attention and two feed-forward matrices for each
    token, and 4 * length * hidden for its scores and their application. The embeddings and
    the head's two columns are bound by the bytes they move.
    """
    hidden, inner = shape.hidden_size, shape.intermediate_size
    matrices = 2.0 * (4 * hidden * hidden + 2 * hidden * inner)
    attention = 4.0 * length * hidden
    # Three look-ups, two sums and a normalisation: about eight passes over float32 [1, hidden].
    embeddings = 8 * 4 * hidden * _FLOPS_PER_BYTE
    head = 2.0 * 2 * hidden + 4 * hidden * _FLOPS_PER_BYTE
    layer = length * (matrices + attention)
    return ModelCosts(length * embeddings, (layer,) * shape.layers, length * head, "flop")


def measure_costs(
    directory: Path | str,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    length: int = TYPICAL_LENGTH,
    repeats: int = 5,
) -> ModelCosts:
    """Measure costs for one sequence of `length` tokens in seconds, on this machine.

    Loads one layer at a time, never the whole model. Layers of the same dimensions cost the
    same, so the first layer stands for all of them, and the last is only read for its head.

    Raises:
        UnsupportedModelError, CheckpointError, ValueError: as for `StageModel.load`.
    """
    first = StageModel.load(directory, LayerRange(0, 1), dtype=dtype, device=device)
    count, width = first.info.model_layers, first.info.hidden_size
    length = min(length, first.info.max_sequence_length)
    ids = torch.arange(length) % first.info.vocab_size
    hidden = torch.randn(length, width, device=first.info.device)
    embeddings = _seconds(lambda: first.embed(ids, None, [length]), repeats, first.info.device)
    layer = _seconds(lambda: first.layers(hidden, [length]), repeats, first.info.device)
    last = first
    if count > 1:
        last = StageModel.load(
            directory,
            LayerRange(count - 1, count),
            dtype=dtype,
            device=device,
            fingerprint=first.info.fingerprint,
        )
    head = _seconds(lambda: last.head(hidden), repeats, first.info.device)
    return ModelCosts(embeddings, (layer,) * count, head, "s")


def _seconds(call: Callable[[], object], repeats: int, device: str) -> float:
    """Return the median time of a call, its first and slower run left out."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        call()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])
