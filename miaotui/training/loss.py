"""Batches as tensors, and the two losses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from miaotui.training.maker import Example
from miaotui.training.model import TrainingModel


@dataclass
class Batch:
    """Examples padded to the longest.

    ids, mask, types: int64 [batch, tokens].
    starts, ends: float32 [batch, tokens], the annotators' votes, each row summing to 1.
    masked: int64 [n, 2], (row, token) of each masked token; targets: int64 [n].
    """

    ids: Tensor
    mask: Tensor
    types: Tensor
    starts: Tensor
    ends: Tensor
    masked: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        return Batch(**{name: value.to(device) for name, value in vars(self).items()})


def collate(examples: list[Example]) -> Batch:
    """Pad with id 0 and type 0, as BERT does."""
    shape = (len(examples), max(len(e.ids) for e in examples))
    ids = torch.zeros(shape, dtype=torch.long)
    mask, types = torch.zeros_like(ids), torch.zeros_like(ids)
    starts, ends = torch.zeros(shape), torch.zeros(shape)
    masked, targets = [], []
    for row, example in enumerate(examples):
        length = len(example.ids)
        ids[row, :length] = torch.tensor(example.ids)
        mask[row, :length] = 1
        types[row, example.passage_at : length] = 1
        for first, last in zip(example.starts, example.ends, strict=True):
            starts[row, first] += 1 / len(example.starts)
            ends[row, last] += 1 / len(example.ends)
        masked += [(row, position) for position in example.masked]
        targets += example.targets
    return Batch(
        ids,
        mask,
        types,
        starts,
        ends,
        torch.tensor(masked, dtype=torch.long).reshape(-1, 2),
        torch.tensor(targets, dtype=torch.long),
    )


def losses(
    model: TrainingModel, batch: Batch, words: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Span loss and masked-character loss, float32 scalars.

    The span loss is the cross entropy of start and end against the votes of all annotators, the
    mean of the two. The second is 0 without masked tokens. ``words``: see ``TrainingModel.hidden``.
    """
    hidden = model.hidden(batch.ids, batch.mask, batch.types, words)
    start, end = model.spans(hidden, batch.mask)
    span = -(batch.starts * F.log_softmax(start, 1) + batch.ends * F.log_softmax(end, 1))
    span_loss = span.sum(1).mean() / 2
    if not len(batch.targets):
        return span_loss, span_loss.new_zeros(())
    logits = model.characters(hidden[batch.masked[:, 0], batch.masked[:, 1]])
    return span_loss, F.cross_entropy(logits, batch.targets)
