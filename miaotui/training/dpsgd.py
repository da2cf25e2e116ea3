"""DP-SGD (Abadi et al., CCS 2016) for any optimizer: sampling, clipping, noise, and accounting.

The guarantee is for a passage with all its questions: whoever sees the trained weights can
hardly tell whether any one passage was among the data, in the sense of (epsilon, delta). To keep
it, each step takes every passage with the same small probability (Poisson sampling); opacus
clips each passage's gradient and adds noise.

The noise comes from torch's generator, seeded by the operating system. That is good for
statistics; an adversary who could predict the generator is outside of the guarantee.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from opacus.accountants import RDPAccountant
from opacus.accountants.utils import get_noise_multiplier
from opacus.optimizers import DPOptimizer
from pydantic import BaseModel, ConfigDict, Field

Part = TypeVar("Part")


class PrivacyConfig(BaseModel):
    """How much privacy may be spent, and on what terms."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epsilon: float = Field(default=8.0, gt=0, description="to be spent at most")
    noise_multiplier: float | None = Field(
        default=None, gt=0, description="instead of epsilon: noise, as a multiple of the clip"
    )
    delta: float | None = Field(default=None, gt=0, lt=1, description="default: 1 / (10 passages)")
    batch: int = Field(default=64, ge=1, description="passages a step, on average")
    clip: float = Field(default=1.0, gt=0, description="longest gradient of a passage")
    seed: int | None = Field(
        default=None, description="for tests only: noise that can be predicted protects nobody"
    )


class PrivacySpent(BaseModel):
    """What a run has given away, as it is written to the model's ``config.json``."""

    epsilon: float
    delta: float
    noise_multiplier: float
    clip: float
    sample_rate: float
    steps: int
    passages: int
    unit: str = "a passage with all its questions"
    accountant: str = "Renyi differential privacy (Mironov, 2017), Poisson sampling"


class PrivateSteps:
    """Takes private steps of one or more optimizers, one after another, and counts all of them."""

    def __init__(
        self,
        config: PrivacyConfig,
        *,
        passages: int,
        steps: int,
        device: torch.device | str = "cpu",
    ) -> None:
        """``steps``: of all optimizers together, which epsilon is to last for.

        Raises ValueError where the data are too few for any privacy.
        """
        if passages < 2 * config.batch:
            raise ValueError(
                f"{passages} passages with questions; batches of {config.batch} need "
                f"at least {2 * config.batch}, and privacy gets the better the more there are"
            )
        self.config, self.passages = config, passages
        self.step = 0
        self.delta = config.delta or 1 / (10 * passages)
        self._sample_rate = config.batch / passages
        self.noise: float = config.noise_multiplier or get_noise_multiplier(
            target_epsilon=config.epsilon,
            target_delta=self.delta,
            sample_rate=self._sample_rate,
            steps=steps,
            accountant="rdp",
        )
        seed = int.from_bytes(os.urandom(8)) % 2**63 if config.seed is None else config.seed
        self.random = random.Random(seed)
        self._generator = torch.Generator(device).manual_seed(seed)
        self._accountant: Any = RDPAccountant()

    def wrap(self, optimizer: torch.optim.Optimizer) -> Any:
        """A DPOptimizer of opacus over another, for `take`."""
        made: Any = DPOptimizer(
            optimizer,
            noise_multiplier=self.noise,
            max_grad_norm=self.config.clip,
            expected_batch_size=self.config.batch,
            generator=self._generator,
        )
        made.attach_step_hook(self._accountant.get_optimizer_hook_fn(sample_rate=self._sample_rate))
        return made

    def draw(self) -> list[int]:
        """Numbers of the passages of the next step (Poisson sampling); there may be none."""
        return [
            number for number in range(self.passages) if self.random.random() < self._sample_rate
        ]

    def take(
        self, optimizer: Any, parts: Sequence[Part], gradients: Callable[[Part], None]
    ) -> None:
        """Take one step.

        Args:
            optimizer: of `wrap`.
            parts: what was drawn, in pieces that are computed at once.
            gradients: sets ``grad_sample`` [passages of the part, …] of all parameters.
        """
        if not parts:
            # Nobody was drawn, and nobody may know: noise alone.
            for parameter in optimizer.params:
                parameter.grad_sample = parameter.new_zeros((0, *parameter.shape))
            optimizer.step()
        for index, part in enumerate(parts):
            optimizer.signal_skip_step(do_skip=index + 1 < len(parts))
            gradients(part)
            optimizer.step()
            optimizer.zero_grad()
        optimizer.zero_grad()
        self.step += 1

    @property
    def spent(self) -> PrivacySpent:
        """The privacy spent by the steps so far."""
        epsilon = float(self._accountant.get_epsilon(self.delta)) if self.step else 0.0
        return PrivacySpent(
            epsilon=round(epsilon, 4),
            delta=self.delta,
            noise_multiplier=round(self.noise, 4),
            clip=self.config.clip,
            sample_rate=self._sample_rate,
            steps=self.step,
            passages=self.passages,
        )
