"""Gives back by a short training what pruning or factorising took: distillation.

The student learns the spans' distributions of the model that it was made from (Hinton et al.,
2015) and, beside them, the answers. The training may be a private one (`miaotui.training.dpsgd`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import kl_div, log_softmax, mse_loss, softmax

from miaotui.compression.prune import span_loss
from miaotui.compression.questions import Labelled
from miaotui.compression.workspace import Workspace
from miaotui.models.precision import multiplies_bfloat16

if TYPE_CHECKING:  # opacus is an extra
    from miaotui.training.dpsgd import PrivateSteps

log = logging.getLogger(__name__)

_TELL_SECONDS = 20.0
_TEMPERATURE = 2.0
_LABELS = 0.3  # weight of the answers beside the teacher
_HIDDEN = 1.0  # weight of the last layer's activations


def recover(
    student: Workspace,
    teacher: Workspace,
    batches: Sequence[Labelled],
    steps: int,
    *,
    learning_rate: float = 5e-5,
    exactly: bool = False,
    tell: Callable[[int, float], None] = lambda step, loss: None,
) -> list[float]:
    """Train a model's layers and head in place; weights that are 0 stay 0.

    Matrices are multiplied in bfloat16 where the CPU does that faster, unless `exactly`. How far
    it is goes to the log now and then.

    Returns the loss of every step.
    """
    trained = _Trained(student, learning_rate)
    losses = []
    fast = not exactly and multiplies_bfloat16(torch.device("cpu"))
    told = time.monotonic()
    for step in range(steps):
        trained.set_rate(step, steps)
        with torch.autocast("cpu", torch.bfloat16, enabled=fast):
            loss = _loss(student, teacher, batches[step % len(batches)])
        trained.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained.parameters, 1.0)
        trained.optimizer.step()
        trained.keep_zeros()
        losses.append(float(loss.detach()))
        tell(step, losses[-1])
        if time.monotonic() - told > _TELL_SECONDS:
            told = time.monotonic()
            late = losses[-100:]
            log.info("recovery: step %d of %d, loss %.3f", step + 1, steps, sum(late) / len(late))
    trained.freeze()
    return losses


def recover_privately(
    student: Workspace,
    teacher: Workspace,
    passages: Sequence[Sequence[Labelled]],
    steps: int,
    private: PrivateSteps,
    *,
    learning_rate: float = 5e-5,
) -> None:
    """Train as `recover` does, so that what a passage gives away is bounded.

    No loss is told: it comes from the questions without noise.

    Args:
        passages: of each passage its questions, one window a batch.
        private: draws the passages, adds the noise, and counts what is spent.
    """
    trained = _Trained(student, learning_rate)
    optimizer = private.wrap(trained.optimizer)

    def gradients(passage: int) -> None:
        item = private.random.choice(passages[passage])
        loss = _loss(student, teacher, item)
        found = torch.autograd.grad(loss, trained.parameters)
        for parameter, gradient in zip(trained.parameters, found, strict=True):
            mask = trained.zeros.get(parameter)
            # What is not trained does not count for the length that is clipped.
            kept = gradient if mask is None else gradient * mask
            parameter.grad_sample = kept.unsqueeze(0)  # type: ignore[attr-defined]

    for step in range(steps):
        trained.set_rate(step, steps)
        private.take(optimizer, private.draw(), gradients)
        trained.keep_zeros()
    trained.freeze()


class _Trained:
    """The parameters in training, and their optimizer."""

    def __init__(self, student: Workspace, learning_rate: float) -> None:
        head = student.skeleton.head
        assert head is not None
        self.parameters = [*nn.ModuleList(student.layers).parameters(), *head.parameters()]
        # Pruned weights are found by being exactly 0.
        self.zeros = {p: p != 0 for p in self.parameters if bool((p == 0).any())}
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self._rate = learning_rate
        self.optimizer = torch.optim.AdamW(self.parameters, lr=learning_rate, weight_decay=0.0)

    def set_rate(self, step: int, steps: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate * min(1.0, (step + 1) / 10) * (1 - step / steps)

    @torch.no_grad()
    def keep_zeros(self) -> None:
        for parameter, mask in self.zeros.items():
            parameter.mul_(mask)

    def freeze(self) -> None:
        for parameter in self.parameters:
            parameter.requires_grad_(False)
            parameter.grad = None


def _loss(student: Workspace, teacher: Workspace, item: Labelled) -> torch.Tensor:
    with torch.inference_mode():
        wanted_hidden = teacher.hidden(item.batch)
        assert teacher.skeleton.head is not None
        wanted = teacher.skeleton.head(wanted_hidden)
    wanted, wanted_hidden = wanted.clone(), wanted_hidden.clone()
    hidden = student.hidden(item.batch)
    assert student.skeleton.head is not None
    logits = student.skeleton.head(hidden)
    loss = _distance(logits, wanted, item) + _LABELS * span_loss(logits, item)
    return loss + _HIDDEN * mse_loss(hidden, wanted_hidden)


def _distance(logits: torch.Tensor, wanted: torch.Tensor, item: Labelled) -> torch.Tensor:
    """Mean KL divergence of the windows' start and end distributions, softened."""
    losses = []
    begin = 0
    for length in item.batch.lengths:
        part = slice(begin, begin + length)
        losses.append(
            kl_div(
                log_softmax(logits[part] / _TEMPERATURE, 0),
                softmax(wanted[part] / _TEMPERATURE, 0),
                reduction="sum",
            )
        )
        begin += length
    return torch.stack(losses).mean() * (_TEMPERATURE**2 / 2)
