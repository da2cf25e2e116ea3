"""Fine-tuning on one's own questions with differential privacy (DP-SGD; Abadi et al., CCS 2016).

Each step takes one question of every passage that is drawn, and a window of the passage's own
text only; `dpsgd` says what is guaranteed. The embeddings stay as they are: their gradients name
the words of the text.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from opacus import GradSampleModule
from pydantic import Field
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoModelForQuestionAnswering

from miaotui.training.data import Corpus, DomainSource, read_domain
from miaotui.training.dpsgd import PrivacyConfig, PrivacySpent, PrivateSteps
from miaotui.training.features import Encoded, Special, encode
from miaotui.training.loss import Batch, collate
from miaotui.training.maker import Draw, Example, Maker
from miaotui.training.train import pick_device

log = logging.getLogger(__name__)

_FOREIGN = ("results.json", "README.md")
"""Files of the model that was started from which say nothing true of the new one."""


class PrivateConfig(PrivacyConfig):
    """What a private run is made of."""

    steps: int = Field(default=300, ge=1)
    rate: float = Field(default=3e-4, gt=0)
    crop: int = Field(default=224, ge=16, description="most passage tokens in a window")
    max_question: int = Field(default=64, ge=1)
    micro_batch: int = Field(default=8, ge=1, description="passages computed at once")


def read_questions(files: Sequence[Path]) -> Corpus:
    """The passages and questions of SQuAD-format files.

    Raises FileNotFoundError for a missing file, KeyError or ValueError for one of another form.
    """
    corpus = Corpus([], [])
    for file in files:
        source = DomainSource("own", (file.name,), "en", "passage", "", "")
        read_domain(file.parent, source, corpus)
    return corpus


class PrivateTrainer:
    """One private run. ``spent`` may be asked at any time, after an interrupt too."""

    def __init__(self, folder: Path, corpus: Corpus, config: PrivateConfig) -> None:
        """``folder`` holds the model to start from, as transformers loads it.

        Raises ValueError where the data are too few for any privacy.
        """
        self.config = config
        self.device = pick_device()
        self._folder = folder
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        encoded = encode(corpus, tokenizer, config.max_question)
        self._records = _records(encoded)
        self.private = PrivateSteps(
            config, passages=len(self._records), steps=config.steps, device=self.device
        )
        self._maker = Maker(encoded, Special.of(tokenizer), np.zeros(0, np.int32), 0)
        self.plain = AutoModelForQuestionAnswering.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).to(self.device)
        _without_dropout(self.plain)
        for name, parameter in self.plain.named_parameters():
            parameter.requires_grad = ".embeddings." not in name
        self.plain.train()  # opacus computes gradients in this mode only
        self._module: Any = GradSampleModule(self.plain, loss_reduction="sum")
        self._optimizer = self.private.wrap(
            torch.optim.Adam([p for p in self.plain.parameters() if p.requires_grad], config.rate)
        )

    @property
    def spent(self) -> PrivacySpent:
        """The privacy spent by the steps so far."""
        return self.private.spent

    def run(self) -> Iterator[PrivacySpent]:
        """Takes the steps that are left, and yields after each what is spent.

        The loss is not told: it comes from the data without noise.
        """
        while self.private.step < self.config.steps:
            self._step(self._draw())
            yield self.spent

    def _draw(self) -> list[Example]:
        draw, chance = Draw(self.config.crop, self.config.crop, 0.0, mask=0.0), self.private.random
        return [
            self._maker.make(chance.choice(self._records[passage]), draw, chance)
            for passage in self.private.draw()
        ]

    def _step(self, examples: list[Example]) -> None:
        def gradients(part: list[Example]) -> None:
            _loss(self._module, collate(part).to(self.device)).backward()

        size = self.config.micro_batch
        parts = [examples[at : at + size] for at in range(0, len(examples), size)]
        self.private.take(self._optimizer, parts, gradients)

    def save(self, out: Path) -> None:
        """Writes the model, with what was spent in ``config.json``, and a short card."""
        if out.resolve() != self._folder.resolve():
            shutil.copytree(
                self._folder, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*_FOREIGN)
            )
        dtype = json.loads((self._folder / "config.json").read_text("utf-8")).get("dtype")
        element = torch.float16 if dtype == "float16" else torch.float32
        state = self.plain.state_dict()
        tensors = {name: value.to("cpu", element).contiguous() for name, value in state.items()}
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        path, spent = out / "config.json", self.spent
        config = json.loads(path.read_text(encoding="utf-8"))
        config.setdefault("miaotui", {})["privacy"] = spent.model_dump()
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        (out / "README.md").write_text(_card(spent), encoding="utf-8")


def _card(spent: PrivacySpent) -> str:
    return (
        "# A model fine-tuned with differential privacy\n\n"
        f"DP-SGD: epsilon {spent.epsilon:g} at delta {spent.delta:.3g}, for {spent.unit}.\n"
        f"{spent.passages} passages, {spent.steps} steps, sampling rate {spent.sample_rate:.4g}, "
        f"gradients clipped at {spent.clip:g}, noise multiplier {spent.noise_multiplier:g}.\n"
        f"Accountant: {spent.accountant}.\n\n"
        'Each further run on the same passages adds to what is spent. The threshold for "no '
        'answer" is that of the model before.\n'
    )


def _records(encoded: Encoded) -> list[list[int]]:
    """The answerable questions of each passage that has any, as numbers."""
    found: dict[int, list[int]] = {}
    for number, question in enumerate(encoded.corpus.questions):
        if encoded.spans[number]:
            found.setdefault(question.passage, []).append(number)
    return list(found.values())


def _without_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def _loss(module: Any, batch: Batch) -> torch.Tensor:
    """The sum over the batch of start's and end's cross entropy, halved."""
    output = module(input_ids=batch.ids, attention_mask=batch.mask, token_type_ids=batch.types)
    total = batch.starts.new_zeros(())
    for logits, votes in ((output.start_logits, batch.starts), (output.end_logits, batch.ends)):
        masked = logits.float().masked_fill(batch.mask == 0, -1e4)
        total = total - (votes * masked.log_softmax(1)).sum() / 2
    return total
