"""What each part of a model costs to compute: estimated from its dimensions, or measured."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch

from miaotui.models.decoder_stage import DecoderStageModel
from miaotui.models.errors import UnsupportedModelError
from miaotui.models.layers import LayerRange
from miaotui.models.loading import load_stage
from miaotui.models.seq2seq_stage import Seq2SeqStageModel
from miaotui.models.shape import ModelShape, SourceShape
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

    A layer: 2 FLOPs a weight of its attention and feed-forward matrices for each token, and
    4 * length * heads * head_dim for its scores and their application. The embeddings and
    a span head's two columns are bound by the bytes they move. A decoder writes the sequence
    token by token, so that its language-model head is computed for each token, too. An
    encoder-decoder model's sequence is about one sound or picture.
    """
    if shape.source is not None:
        return _estimate_both(shape, shape.source, length)
    hidden, inner = shape.hidden_size, shape.intermediate_size
    width = shape.heads * shape.head_dim or hidden
    kv_width = shape.kv_heads * shape.head_dim or hidden
    projections = 2 * hidden * width + 2 * hidden * kv_width
    matrices = 2.0 * (projections + (3 if shape.gated else 2) * hidden * inner)
    attention = 4.0 * length * width
    if shape.kind == "generative":
        # One look-up, and at most a scaling or a sum.
        embeddings = 3 * 4 * hidden * _FLOPS_PER_BYTE
        head = 2.0 * hidden * shape.vocab_size
    else:
        # Three look-ups, two sums and a normalisation: eight passes over float32 [1, hidden].
        embeddings = 8 * 4 * hidden * _FLOPS_PER_BYTE
        head = 2.0 * 2 * hidden + 4 * hidden * _FLOPS_PER_BYTE
    layer = length * (matrices + attention)
    return ModelCosts(length * embeddings, (layer,) * shape.layers, length * head, "flop")


def _estimate_both(shape: ModelShape, source: SourceShape, length: int) -> ModelCosts:
    """Estimate an encoder-decoder model's costs; its layers are the encoder's, then the others."""
    length = min(length, shape.max_sequence_length)
    rows, width, inner = source.rows, source.width, source.intermediate_size
    encoder = rows * (2.0 * (4 * width * width + 2 * width * inner) + 4.0 * rows * width)
    hidden = shape.heads * shape.head_dim
    # Of a token: its own attention, its reading of the rows, and the feed-forward layer.
    matrices = 2.0 * (6 * hidden * hidden + 2 * hidden * shape.intermediate_size)
    decoder = length * (matrices + 4.0 * (length + rows) * hidden)
    decoder += rows * 2.0 * 2 * source.memory_width * hidden
    # Each row is made of about so much of the input; sound passes another convolution.
    inputs = 2.0 * math.prod(source.shape) * width
    if source.modality == "audio":
        inputs = 3 * inputs + rows * 2.0 * 3 * width * width
    layers = (encoder,) * source.layers + (decoder,) * (shape.layers - source.layers)
    return ModelCosts(inputs, layers, length * 2.0 * hidden * shape.vocab_size, "flop")


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
        UnsupportedModelError: an encoder-decoder model, or as for `StageModel.load`.
        CheckpointError, ValueError: as for `StageModel.load`.
    """
    first = load_stage(directory, LayerRange(0, 1), dtype=dtype, device=device)
    if isinstance(first, Seq2SeqStageModel):
        raise UnsupportedModelError(
            f"{directory}: the costs of encoder-decoder models are not measured; plan with the "
            "estimated ones"
        )
    info = first.info
    count, width = info.model_layers, info.hidden_size
    length = min(length, info.max_sequence_length)
    ids = torch.arange(length) % info.vocab_size
    hidden = torch.randn(length, width, device=info.device)
    last: StageModel | DecoderStageModel | Seq2SeqStageModel = first
    if count > 1:
        last = load_stage(
            directory,
            LayerRange(count - 1, count),
            dtype=dtype,
            device=device,
            fingerprint=info.fingerprint,
        )
    parts: tuple[Callable[[], object], ...]
    if isinstance(first, DecoderStageModel):
        assert isinstance(last, DecoderStageModel)
        parts = _decoder_parts(first, last, ids, hidden)
    else:
        assert isinstance(last, StageModel)
        parts = _extractive_parts(first, last, ids, hidden)
    embeddings, layer, head = (_seconds(part, repeats, info.device) for part in parts)
    return ModelCosts(embeddings, (layer,) * count, head, "s")


def _extractive_parts(
    first: StageModel, last: StageModel, ids: torch.Tensor, hidden: torch.Tensor
) -> tuple[Callable[[], object], ...]:
    lengths = [len(ids)]
    return (
        lambda: first.embed(ids, None, lengths),
        lambda: first.layers(hidden, lengths),
        lambda: last.head(hidden),
    )


def _decoder_parts(
    first: DecoderStageModel, last: DecoderStageModel, ids: torch.Tensor, hidden: torch.Tensor
) -> tuple[Callable[[], object], ...]:
    ready = hidden.to(getattr(torch, last.info.dtype))
    return (
        lambda: first.embed(ids),
        lambda: first.layers(hidden),
        lambda: last.logits(ready),
    )


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
