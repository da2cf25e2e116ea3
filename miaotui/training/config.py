"""What a training run is made of, in one object. Its defaults made the bundled model."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Mixture(BaseModel):
    """Shares of the domains among the questions drawn; they need not sum to 1."""

    model_config = ConfigDict(frozen=True)

    wiki: float
    amazon: float
    reddit: float
    qamr: float
    cmrc: float
    drcd: float

    def shares(self) -> dict[str, float]:
        """Domain to share, summing to 1."""
        raw: dict[str, float] = self.model_dump()
        total = sum(raw.values())
        return {name: value / total for name, value in raw.items()}


class TrainConfig(BaseModel):
    """Everything that decides the trained weights, and where files lie."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: Path = Path("../shared/qa")
    work: Path = Path(".train/qa")
    seed: int = 20261124
    fraction: float = Field(default=1.0, gt=0, le=1, description="part of the questions used")
    threads: int = 2
    step_dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    vocabulary: int = Field(default=5900, description="Chinese characters and signs")
    align_epochs: int = 3

    steps: int = Field(default=9000, description="the rate comes to zero here")
    finish: int = Field(default=600, description="steps after that, of one annotator's answers")
    stop: int | None = Field(default=None, description="the run ends here, at the latest")
    warmup: int = 200
    decay_from: int = Field(default=7200, description="the rate falls to 0 from here")
    late_from: int = Field(default=7200, description="the late mixture is drawn from here")
    batch: int = 16
    chunk: int = Field(default=12, description="batches drawn and sorted together")
    early: Mixture = Mixture(wiki=0.21, amazon=0.14, reddit=0.14, qamr=0.22, cmrc=0.15, drcd=0.14)
    late: Mixture = Mixture(wiki=0.34, amazon=0.11, reddit=0.10, qamr=0.07, cmrc=0.21, drcd=0.17)

    crop_low: int = Field(default=40, description="fewest passage tokens in a training window")
    crop_first: int = Field(default=80, description="most passage tokens at step 0")
    crop_last: int = Field(default=256, description="most of them at crop_steps")
    crop_steps: int = 5000
    crop_late: int = Field(default=320, description="most of them from late_from on")
    unanswerable: float = Field(default=0.12, description="share of wrong passages")
    unanswerable_late: float = Field(default=0.2, description="the same from late_from on")
    unanswerable_finish: float = Field(default=0.12, description="the same in the last steps")
    mask: float = Field(default=0.12, description="share of Chinese tokens masked before those")
    mask_weight: float = 0.3

    rate: float = 2e-4
    layer_decay: float = 0.9
    rate_words: float = 5e-5
    rate_new: float = 5e-4
    rate_heads: float = 6e-4
    finish_factor: float = Field(default=0.12, description="of all rates, in the last steps")
    weight_decay: float = 0.01
    clip: float = 1.0
    dropout: float = 0.1
    average: float = Field(default=0.997, description="decay of the running average of the weights")

    max_length: int = 384
    stride: int = Field(default=128, description="tokens by which two windows of a passage overlap")
    max_question: int = 64
    evaluate_every: int = 1000
    evaluate_questions: int = 50
    checkpoint_every: int = 300

    @property
    def end(self) -> int:
        """The step after which the run is over."""
        whole = self.steps + self.finish
        return whole if self.stop is None else min(self.stop, whole)

    def crop(self, step: int) -> int:
        """Most passage tokens in a window drawn at ``step``."""
        if step >= self.late_from:
            return self.crop_late
        part = min(1.0, step / max(1, self.crop_steps))
        return round(self.crop_first + part * (self.crop_last - self.crop_first))

    def factor(self, step: int) -> float:
        """What the learning rates are multiplied by at ``step``: warm up, stay, fall, finish."""
        if step >= self.steps:
            return self.finish_factor * (self.steps + self.finish - step) / max(1, self.finish)
        if step < self.warmup:
            return (step + 1) / self.warmup
        if step < self.decay_from:
            return 1.0
        return max(0.0, (self.steps - step) / max(1, self.steps - self.decay_from))
