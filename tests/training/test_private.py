"""DP-SGD: each passage's gradient is clipped, noise is added, and what is spent is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForQuestionAnswering
from typer.testing import CliRunner

from miaotui.training.__main__ import app
from miaotui.training.loss import collate
from miaotui.training.model import to_plain
from miaotui.training.private import PrivateConfig, PrivateTrainer, _loss, read_questions
from miaotui.training.vocab import Vocabulary
from tests.training.conftest import tiny_model


@pytest.fixture
def folder(vocabulary: Vocabulary, tmp_path: Path) -> Path:
    """A tiny model as transformers keeps it."""
    found = tmp_path / "model"
    to_plain(tiny_model(vocabulary)).save_pretrained(found)
    vocabulary.tokenizer.save(str(found / "tokenizer.json"))
    return found


def trainer(folder: Path, data: Path, **settings: float) -> PrivateTrainer:
    given = {"batch": 12, "steps": 6, "micro_batch": 5, "seed": 3, **settings}
    return PrivateTrainer(folder, read_questions([data / "wiki.json"]), PrivateConfig(**given))  # type: ignore[arg-type]


def test_gradients_are_clipped_passage_by_passage(folder: Path, data_folder: Path) -> None:
    ours = trainer(folder, data_folder, clip=0.05)
    ours._optimizer.noise_multiplier = 0.0
    examples = ours._draw()
    assert len(examples) > ours.config.micro_batch  # several parts a step
    parameters = [p for p in ours.plain.parameters() if p.requires_grad]
    expected = [torch.zeros_like(p) for p in parameters]
    lengths = []
    reference = AutoModelForQuestionAnswering.from_pretrained(folder, attn_implementation="eager")
    theirs = [p for n, p in reference.eval().named_parameters() if ".embeddings." not in n]
    for example in examples:
        gradients = torch.autograd.grad(_loss(reference, collate([example])), theirs)
        length = float(torch.cat([g.flatten() for g in gradients]).norm())
        lengths.append(length)
        for total, gradient in zip(expected, gradients, strict=True):
            total += gradient * min(1.0, 0.05 / length) / ours.config.batch
    assert max(lengths) > 0.05
    found: list[torch.Tensor] = []

    def step() -> None:
        found.extend(p.grad.clone() for p in parameters if p.grad is not None)

    ours._optimizer.original_optimizer.step = step
    ours._step(examples)
    for total, gradient in zip(expected, found, strict=True):
        torch.testing.assert_close(gradient, total, atol=1e-6, rtol=1e-3)


def test_noise_is_added_even_where_nobody_was_drawn(folder: Path, data_folder: Path) -> None:
    ours = trainer(folder, data_folder)
    before = ours.plain.qa_outputs.weight.clone()
    ours._step([])
    assert not torch.equal(before, ours.plain.qa_outputs.weight)


def test_what_is_spent_is_told_and_written(folder: Path, data_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    settings = json.dumps({"batch": 12, "steps": 6, "micro_batch": 5})
    arguments = ["private", str(data_folder / "wiki.json"), "--out", str(out)]
    arguments += ["--model", str(folder), "--epsilon", "3", "--settings", settings]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    spent = json.loads((out / "config.json").read_text())["miaotui"]["privacy"]
    assert 1.5 < spent["epsilon"] <= 3.0
    assert spent["steps"] == 6
    assert spent["passages"] == 120
    assert "epsilon" in done.output
    before = AutoModelForQuestionAnswering.from_pretrained(folder).state_dict()
    after = AutoModelForQuestionAnswering.from_pretrained(out).state_dict()
    for name, value in before.items():
        assert torch.equal(value, after[name]) == (".embeddings." in name), name


def test_more_privacy_takes_more_noise(folder: Path, data_folder: Path) -> None:
    loose, tight = (trainer(folder, data_folder, epsilon=e) for e in (8.0, 1.0))
    assert tight.private.noise > loose.private.noise
    spent = [state.epsilon for state in tight.run()]
    assert spent == sorted(spent)
    assert spent[-1] <= 1.0


def test_too_few_passages_are_refused(folder: Path, data_folder: Path) -> None:
    with pytest.raises(ValueError, match="120 passages with questions; batches of 100"):
        trainer(folder, data_folder, batch=100)
