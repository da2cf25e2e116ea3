"""A run that is stopped and resumed ends with the same weights; a run learns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from miaotui.training.config import TrainConfig
from miaotui.training.features import Encoded, Special
from miaotui.training.loss import collate
from miaotui.training.maker import Example, Maker
from miaotui.training.noanswer import Calibration
from miaotui.training.predict import model_logits
from miaotui.training.report import em_f1, measure, question_numbers, results
from miaotui.training.sampler import Sampler
from miaotui.training.vocab import Vocabulary
from tests.training.conftest import tiny_trainer


@pytest.fixture
def numbers(encoded: Encoded) -> dict[str, list[int]]:
    return question_numbers(encoded, "train")


def test_resumed_equals_uninterrupted(
    maker: Maker,
    vocabulary: Vocabulary,
    numbers: dict[str, list[int]],
    config: TrainConfig,
    tmp_path: Path,
) -> None:
    whole = tiny_trainer(maker, vocabulary, numbers, config)
    whole.run()

    # Stop in the middle of a chunk (step 6 of 4 + 4 + 4), then at a chunk's end, then finish.
    broken = config.model_copy(update={"work": tmp_path / "broken"})
    for stop in (6, 8, config.end):
        part = tiny_trainer(maker, vocabulary, numbers, broken)
        if part.checkpoint_path.exists():
            part.resume()
        part.run(until=stop)
    for (name, a), (_, b) in zip(
        whole.model.named_parameters(), part.model.named_parameters(), strict=True
    ):
        assert torch.equal(a, b), name
    for name, value in whole.average.items():
        assert torch.equal(value, part.average[name]), name


def test_loss_falls_and_answers_come_out(
    maker: Maker,
    vocabulary: Vocabulary,
    numbers: dict[str, list[int]],
    config: TrainConfig,
    encoded: Encoded,
    special: Special,
) -> None:
    config = config.model_copy(
        update={
            "steps": 240,
            "finish": 0,
            "warmup": 10,
            "decay_from": 160,
            "average": 0.9,
            "batch": 12,
        }
    )
    trainer = tiny_trainer(maker, vocabulary, numbers, config)
    trainer.run()
    lines = (config.work / "log.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.6 * losses[0]

    measured = measure(model_logits(trainer.averaged()), encoded, special, "train", 40, config)
    fixed = {language: Calibration(0.0, 1.0) for language in ("en", "zh")}
    found = results(encoded, measured, fixed, "train")
    assert found.domains["wiki"].f1 == em_f1(encoded, measured.own["wiki"])[1]
    assert found.domains["wiki"].f1 > 20
    trainer.restore()


def test_all_annotators_vote() -> None:
    batch = collate([Example([2, 5, 3, 6, 7, 3], 3, [3, 4], [4, 4]), Example([2, 3], 2, [0], [0])])
    assert batch.starts[0].tolist() == [0, 0, 0, 0.5, 0.5, 0]
    assert batch.ends[0].tolist() == [0, 0, 0, 0, 1, 0]
    assert batch.starts[1].tolist() == [1, 0, 0, 0, 0, 0]
    assert batch.mask.tolist() == [[1] * 6, [1, 1, 0, 0, 0, 0]]
    assert batch.types.tolist() == [[0, 0, 0, 1, 1, 1], [0] * 6]


def test_the_last_steps_take_the_first_annotators_answer(
    maker: Maker,
    numbers: dict[str, list[int]],
    config: TrainConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before, all of them vote; and characters are masked, which they no longer are."""
    spans = [[*found, *((a, a) for a, b in found[:1] if b > a)] for found in maker.encoded.spans]
    monkeypatch.setattr(maker.encoded, "spans", spans)
    sampler = Sampler(maker, numbers, config.model_copy(update={"chunk": 1, "batch": 200}))
    voted, finishing = sampler.chunk(0)[0], sampler.chunk(config.steps)[0]
    assert any(len(set(example.ends)) > 1 for example in voted)
    assert any(example.masked for example in voted)
    assert all(len(example.ends) == 1 for example in finishing)
    assert not any(example.masked for example in finishing)
    assert any(example.starts != [0] for example in finishing)


def test_rates_warm_up_stay_fall_and_finish(config: TrainConfig) -> None:
    assert (config.steps, config.end) == (8, 12)
    assert config.factor(0) == 0.5
    assert config.factor(5) == 1.0
    assert config.factor(7) == pytest.approx(0.5)
    assert config.factor(8) == pytest.approx(config.finish_factor)
    assert config.factor(10) == pytest.approx(config.finish_factor / 2)
    assert config.factor(12) == 0.0
    assert config.model_copy(update={"stop": 10}).end == 10
    assert config.crop(0) == config.crop_first
    assert config.crop(100) == config.crop_late
