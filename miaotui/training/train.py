"""The training loop: batches in, checkpoints and a log out."""

from __future__ import annotations

import json
import logging
import math
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from miaotui.engine.allocator import keep_freed_memory
from miaotui.models.precision import resolve_dtype
from miaotui.training import checkpoint
from miaotui.training.config import TrainConfig
from miaotui.training.loss import collate, losses
from miaotui.training.maker import Example
from miaotui.training.model import TrainingModel
from miaotui.training.sampler import Sampler

log = logging.getLogger(__name__)
Evaluate = Callable[[TrainingModel], dict[str, float]]


def pick_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def step_dtype(name: str, device: torch.device) -> torch.dtype:
    """What matrices are multiplied in: "auto" is bfloat16 where that is the faster."""
    return resolve_dtype("fast" if name == "auto" else name, device)


def parameter_groups(model: TrainingModel, config: TrainConfig) -> list[dict[str, object]]:
    """Parameters by learning rate: lower layers slower, new rows and heads faster.

    Layer-wise decay after Howard & Ruder (ACL 2018). Biases and norms are not decayed.
    """
    layers = model.config.num_hidden_layers

    def rate(name: str) -> float:
        if name == "words.base":
            return config.rate_words
        if name == "words.new":
            return config.rate_new
        if not name.startswith("encoder."):
            return config.rate_heads
        parts = name.split(".")
        depth = int(parts[parts.index("layer") + 1]) if "layer" in parts else -1
        return float(config.rate * config.layer_decay ** (layers - 1 - depth))

    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if name.startswith("encoder.embeddings.word_embeddings"):
            name = name.replace("encoder.embeddings.word_embeddings", "words")
        decay = 0.0 if parameter.ndim < 2 or name.startswith("words") else config.weight_decay
        groups.setdefault((rate(name), decay), []).append(parameter)
    return [
        {"params": parameters, "lr": lr, "base_lr": lr, "weight_decay": decay}
        for (lr, decay), parameters in groups.items()
    ]


def _one_core(device: torch.device) -> None:
    """Keep a worker thread's operations on one core."""
    if device.type == "cpu":
        torch.set_num_threads(1)


class _Part(NamedTuple):
    """What one worker's examples gave: mean losses, and gradients of the mean loss.

    ``dense``: of each parameter but the big table. ``words``: float [n, hidden], of the
    embeddings looked up in the table rows ``rows``, int64 [n].
    """

    span: float
    masked: float
    tokens: int
    dense: tuple[Tensor | None, ...]
    rows: Tensor
    words: Tensor


class Trainer:
    """One run: a model, its optimiser, its running average, its place in the data."""

    def __init__(
        self,
        model: TrainingModel,
        sampler: Sampler,
        config: TrainConfig,
        evaluate: Evaluate | None = None,
    ) -> None:
        self.device = pick_device()
        self.model = model.to(self.device)
        self.sampler = sampler
        self.config = config
        self.evaluate = evaluate
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, config), betas=(0.9, 0.98), eps=1e-6, fused=True
        )
        self.dense = [p for p in model.parameters() if p is not model.words.base]
        self.base_gradient = torch.zeros_like(model.words.base)
        self.touched = torch.zeros(0, dtype=torch.long, device=self.device)
        self.dtype = step_dtype(config.step_dtype, self.device)
        if self.device.type == "cuda":
            model.encoder.config._attn_implementation = "sdpa"
        self.workers = 1 if self.device.type == "cuda" else config.threads
        keep_freed_memory()
        self.pool = ThreadPoolExecutor(self.workers, initializer=_one_core, initargs=(self.device,))
        self.step = 0
        self.seconds = 0.0
        self.average = {n: p.detach().clone() for n, p in self._parameters().items()}
        self.chunk_taken: dict[str, int] = {}
        self.stopping = False

    @property
    def checkpoint_path(self) -> Path:
        """Where the state lies."""
        return self.config.work / "checkpoint.pt"

    def _parameters(self) -> dict[str, Tensor]:
        return {n: p.data for n, p in self.model.named_parameters()}

    def save(self) -> None:
        """Write the state of this moment."""
        state = checkpoint.RunState(
            step=self.step,
            taken=self.chunk_taken if self.step % self.config.chunk else dict(self.sampler.taken),
            model=self._parameters(),
            average=self.average,
            optimizer=self.optimizer.state_dict(),
            rng=torch.get_rng_state(),
            seconds=self.seconds,
        )
        checkpoint.save(state, self.checkpoint_path)

    def resume(self) -> None:
        """Go to where the last checkpoint was written. Raises FileNotFoundError without one."""
        state = checkpoint.load(self.checkpoint_path)
        self.step, self.seconds = state.step, state.seconds
        for name, value in self._parameters().items():
            value.copy_(state.model[name])
            self.average[name].copy_(state.average[name])
        rates = [(g["base_lr"], g["weight_decay"]) for g in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state.optimizer)
        for group, (lr, decay) in zip(self.optimizer.param_groups, rates, strict=True):
            group["base_lr"], group["weight_decay"] = lr, decay
        self.sampler.taken = dict(state.taken)
        if state.rng is not None:
            torch.set_rng_state(state.rng)

    def averaged(self) -> TrainingModel:
        """The model with the running average in place of its weights, until ``restore``."""
        self._held = {n: p.clone() for n, p in self._parameters().items()}
        for name, value in self._parameters().items():
            value.copy_(self.average[name])
        return self.model.eval()

    def restore(self) -> None:
        """Undo ``averaged``."""
        for name, value in self._parameters().items():
            value.copy_(self._held[name])
        del self._held
        self.model.train()

    def run(self, until: int | None = None) -> None:
        """Train until ``config.end`` or, with a checkpoint, only ``until`` a step before.

        SIGTERM or SIGINT writes a checkpoint and returns after the step in hand.
        """
        config = self.config
        end = config.end
        last = end if until is None else min(until, end)
        previous = {s: signal.signal(s, self._stop) for s in (signal.SIGTERM, signal.SIGINT)}
        self.model.train()
        window: list[tuple[float, float, int]] = []
        try:
            while self.step < last and not self.stopping:
                number, skip = divmod(self.step, config.chunk)
                self.chunk_taken = dict(self.sampler.taken)
                for examples in self.sampler.chunk(number)[skip:]:
                    began = time.monotonic()
                    span, masked, tokens = self._step(examples)
                    self.seconds += min(60.0, time.monotonic() - began)
                    window.append((span, masked, tokens))
                    if self.step % 20 == 0:
                        self._report(window)
                        window.clear()
                    if self.step >= last or self.stopping:
                        break
                    if self.step % config.checkpoint_every == 0:
                        self.save()
                    if self.step % config.evaluate_every == 0:
                        self._evaluate()
            self.save()
            if self.step >= end:
                self._evaluate()
        finally:
            for number_, handler in previous.items():
                signal.signal(number_, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        log.info("signal %d: stopping after this step", number)
        self.stopping = True

    def _step(self, examples: list[Example]) -> tuple[float, float, int]:
        config = self.config
        factor = config.factor(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        span, masked, tokens = self._gradients(examples)
        if not math.isfinite(span + masked):
            raise FloatingPointError(f"the losses are {span} and {masked} at step {self.step}")
        nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        keep = min(config.average, self.step / (self.step + 10))
        parameters = self._parameters()
        torch._foreach_lerp_(
            [self.average[n] for n in parameters], list(parameters.values()), 1 - keep
        )
        return span, masked, tokens

    def _gradients(self, examples: list[Example]) -> tuple[float, float, int]:
        """Set the gradients of a batch; its mean losses and its tokens.

        On CPU each thread takes every n-th example and one core: they meet once a step rather
        than once an operation, which is faster, and much faster on a machine others use too.
        """
        parts = [p for i in range(self.workers) if (p := examples[i :: self.workers])]
        results = list(self.pool.map(self._part, parts))
        weights = [len(part) / len(examples) for part in parts]
        for i, parameter in enumerate(self.dense):
            gradients = [
                gradient * weight
                for weight, result in zip(weights, results, strict=True)
                if (gradient := result.dense[i]) is not None
            ]
            parameter.grad = sum(gradients[1:], gradients[0]) if gradients else None
        self._word_gradients([(r.rows, r.words * w) for r, w in zip(results, weights, strict=True)])
        span = sum(r.span * w for r, w in zip(results, weights, strict=True))
        masked = sum(r.masked * w for r, w in zip(results, weights, strict=True))
        return span, masked, sum(r.tokens for r in results)

    def _word_gradients(self, found: list[tuple[Tensor, Tensor]]) -> None:
        """Add what the words looked up (rows int64 [n], float [n, hidden]) give to the tables.

        A batch looks up a few hundred rows of tens of thousands: the big table's gradient is a
        buffer that only those rows are written to, and cleared of.
        """
        words = self.model.words
        count = len(words.base)
        self.base_gradient.index_fill_(0, self.touched, 0.0)
        for rows, gradient in found:
            old = rows < count
            self.base_gradient.index_add_(0, rows[old], gradient[old])
            if words.new.grad is None:
                words.new.grad = torch.zeros_like(words.new)
            words.new.grad.index_add_(0, rows[~old] - count, gradient[~old])
        self.touched = torch.cat([rows[rows < count] for rows, _ in found]).unique()
        words.base.grad = self.base_gradient

    def _part(self, examples: list[Example]) -> _Part:
        batch = collate(examples).to(self.device)
        rows = self.model.words.rows[batch.ids]
        words = self.model.words.looked_up(rows).requires_grad_()
        with torch.autocast(
            self.device.type,
            dtype=torch.bfloat16,
            enabled=self.dtype is torch.bfloat16,
        ):
            span, masked = losses(self.model, batch, words)
        loss = span + self.config.mask_weight * masked
        dense = torch.autograd.grad(loss, [*self.dense, words], allow_unused=True)
        gradient = dense[-1]
        assert gradient is not None
        real = batch.mask.bool()
        return _Part(
            float(span.detach()),
            float(masked.detach()),
            int(batch.mask.sum()),
            dense[:-1],
            rows[real],
            gradient[real],
        )

    def _report(self, window: list[tuple[float, float, int]]) -> None:
        count = len(window)
        left = (self.config.end - self.step) * self.seconds / self.step
        self._log(
            {
                "step": self.step,
                "loss": sum(w[0] for w in window) / count,
                "masked_loss": sum(w[1] for w in window) / count,
                "tokens": sum(w[2] for w in window),
                "seconds": round(self.seconds, 1),
                "left": f"{left / 60:.0f} min",
            }
        )

    def _evaluate(self) -> None:
        if self.evaluate is None:
            return
        scores = self.evaluate(self.averaged())
        self.restore()
        self._log({"step": self.step, "dev": scores, "taken": self.sampler.taken})

    def _log(self, record: dict[str, object]) -> None:
        log.info("%s", record)
        self.config.work.mkdir(parents=True, exist_ok=True)
        with (self.config.work / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
