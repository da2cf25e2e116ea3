"""Recovery with differential privacy: clipped passage by passage, and what is spent is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from miaotui.cli.app import app
from miaotui.compression import CompressionError, compress_model
from miaotui.compression.budget import compress_within
from miaotui.compression.prune import prune_two_of_four, sensitivity
from miaotui.compression.questions import labelled_batches, labelled_passages, read_examples
from miaotui.compression.recover import _loss, recover_privately
from miaotui.compression.workspace import Workspace
from miaotui.text.tokenizer import load_tokenizer
from miaotui.training.dpsgd import PrivacyConfig, PrivateSteps
from tests.checkpoints import EXAMPLES
from tests.compression.conftest import ANSWERS, write_squad

PASSAGES = 21


@pytest.fixture(scope="session")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other passages than those of `questions`, and one of them with two questions."""
    items = [
        (question, f"{'the ' * turn}{text}", answer)
        for turn in range(1, PASSAGES // len(EXAMPLES) + 1)
        for (question, text), answer in zip(EXAMPLES, ANSWERS, strict=True)
    ]
    again = (items[1][0], *items[0][1:])
    return write_squad(tmp_path_factory.mktemp("own") / "own.json", [*items, again])


def test_gradients_are_clipped_passage_by_passage(model: Path, questions: Path, own: Path) -> None:
    tokenizer = load_tokenizer(model)
    passages = labelled_passages(read_examples([own], tokenizer, limit=None))
    assert [len(one) for one in passages] == [2] + [1] * (PASSAGES - 1)
    teacher, student = Workspace.open(model), Workspace.open(model)
    batches = list(labelled_batches(read_examples([questions], tokenizer, limit=7)))
    prune_two_of_four(student, sensitivity(student, batches))
    clip = 0.5
    private = PrivateSteps(
        PrivacyConfig(noise_multiplier=1.0, batch=5, clip=clip, seed=1),
        passages=len(passages),
        steps=1,
    )
    drawn: list[int] = []
    items: list[Any] = []
    found: list[torch.Tensor] = []
    wrap, draw, choice = private.wrap, private.draw, private.random.choice

    def quiet(optimizer: torch.optim.Optimizer) -> Any:
        made = wrap(optimizer)
        made.noise_multiplier = 0.0
        parameters = optimizer.param_groups[0]["params"]
        optimizer.step = lambda: found.extend(p.grad.clone() for p in parameters)  # type: ignore[method-assign, assignment]
        return made

    private.wrap = quiet  # type: ignore[method-assign]
    private.draw = lambda: drawn.extend(draw()) or drawn  # type: ignore[method-assign, func-returns-value]
    private.random.choice = lambda of: items.append(choice(of)) or items[-1]  # type: ignore[method-assign, assignment, func-returns-value]
    recover_privately(student, teacher, passages, 1, private)

    assert len(drawn) > 1
    assert all(item in passages[number] for number, item in zip(drawn, items, strict=True))
    head = student.skeleton.head
    assert head is not None
    parameters = [*torch.nn.ModuleList(student.layers).parameters(), *head.parameters()]
    expected = [torch.zeros_like(p) for p in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    lengths = []
    for item in items:
        gradients = torch.autograd.grad(_loss(student, teacher, item), parameters)
        gradients = tuple(g * (p != 0) for g, p in zip(gradients, parameters, strict=True))
        lengths.append(float(torch.cat([g.flatten() for g in gradients]).norm()))
        for total, gradient in zip(expected, gradients, strict=True):
            total += gradient * min(1.0, clip / lengths[-1]) / 5
    assert max(lengths) > clip
    for total, gradient in zip(expected, found, strict=True):
        torch.testing.assert_close(gradient, total, atol=1e-6, rtol=1e-3)


def test_what_is_spent_is_printed_and_saved(
    model: Path, questions: Path, own: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ["compress", str(model), str(out), "--method", "prune-2:4,svd=0.9"]
    arguments += ["--calibrate", str(questions), "--recover-steps", "3", "--private", str(own)]
    done = CliRunner().invoke(app, [*arguments, "--epsilon", "4", "--private-batch", "5"])
    assert done.exit_code == 0, done.output
    report = json.loads((out / "compression.json").read_text(encoding="utf-8"))
    spent = report["settings"]["privacy"]
    # One account for the recoveries after both steps.
    assert (spent["steps"], spent["passages"]) == (6, PASSAGES)
    assert 2.0 < spent["epsilon"] <= 4.0
    assert f"epsilon {spent['epsilon']:g} at delta" in done.output
    assert "not protected" in done.output
    assert "recovery_loss" not in str(report)  # told without noise, it would give away more


def test_only_layers_and_head_learn_and_zeros_stay(
    model: Path, questions: Path, own: Path, tmp_path: Path
) -> None:
    def weights(name: str, **options: Any) -> dict[str, torch.Tensor]:
        compress_model(model, tmp_path / name, method="prune-2:4", calibrate=[questions], **options)
        loaded: dict[str, torch.Tensor] = load_file(tmp_path / name / "model.safetensors")
        return loaded

    before = weights("before")
    privacy = PrivacyConfig(noise_multiplier=1.0, batch=5)
    after = weights("after", recover_steps=2, private=[own], privacy=privacy)
    for name, value in before.items():
        assert torch.equal(value, after[name]) == (".embeddings." in name), name
        if value.ndim == 2 and ".layer." in name:
            assert torch.equal(value == 0, after[name] == 0), name


def test_refused(model: Path, questions: Path, own: Path, tmp_path: Path) -> None:
    def refused(said: str, **options: Any) -> None:
        given = {"method": "svd=0.9", "recover_steps": 2, "private": [own], **options}
        with pytest.raises(CompressionError, match=said):
            compress_model(model, tmp_path / "out", **given)
        assert not (tmp_path / "out").exists()

    refused("21 private passages are also in", evaluate=[own])
    refused("21 passages with questions; batches of 64 need at least 128")
    refused("for recovery only", recover_steps=0)
    refused("for recovery only", method="int8")
    refused("--calibrate", method="prune-heads=0.5")
    with pytest.raises(CompressionError, match="each method tried would spend"):
        compress_within(model, tmp_path / "out", max_loss=1.0, evaluate=[questions], private=[own])
