"""Calibration, wrong passages, and the score they are told apart by."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from miaotui.training.features import Encoded, Special
from miaotui.training.noanswer import WrongPassages, calibrate
from miaotui.training.predict import Pair, best_span, predict


def test_threshold_lies_between_the_kinds() -> None:
    rng = random.Random(5)
    wrong = [rng.gauss(4, 2) for _ in range(2000)]
    right = [rng.gauss(-2, 2) for _ in range(500)]
    found = calibrate(wrong, right)
    # Two normal curves of one width: the log odds are (4 - -2) / 2**2 * (score - 1).
    assert found.threshold == pytest.approx(1.0, abs=0.2)
    assert found.scale == pytest.approx(4 / 6, abs=0.1)
    assert found.probability(found.threshold) == pytest.approx(0.5)
    assert found.probability(1e9) == pytest.approx(1.0)


def test_calibration_refuses_a_score_that_tells_nothing() -> None:
    with pytest.raises(ValueError, match="both kinds"):
        calibrate([], [1.0])
    with pytest.raises(ValueError, match="does not rise"):
        calibrate([0.0, 1.0], [2.0, 3.0])


def test_wrong_passages_come_from_the_article_and_lack_the_answer(encoded: Encoded) -> None:
    finder = WrongPassages(encoded, "train")
    rng = random.Random(6)
    same = 0
    for number, question in enumerate(encoded.corpus.questions):
        home = encoded.corpus.passages[question.passage]
        if home.split != "train":
            continue
        picked = finder.pick(number, rng)
        if picked is None:
            continue
        other = encoded.corpus.passages[picked]
        assert picked != question.passage
        assert other.split == "train"
        assert other.domain == home.domain
        assert all(home.text[a.start : a.end] not in other.text for a in question.answers)
        same += other.article == home.article
    assert same > 100


def test_best_span_worked_by_hand() -> None:
    start = np.array([0.0, 5.0, 1.0, 4.0], dtype=np.float32)
    end = np.array([9.0, 0.0, 1.0, 3.0], dtype=np.float32)
    assert best_span(start, end, 4) == (0, 0, 9.0)
    assert best_span(start[1:], end[1:], 3) == (0, 2, 8.0)  # 5 + 3
    assert best_span(start[1:], end[1:], 2) == (2, 2, 7.0)  # 4 + 3: the other is too long


def test_windows_meet_in_one_answer(encoded: Encoded, special: Special) -> None:
    number = next(
        n
        for n, q in enumerate(encoded.corpus.questions)
        if encoded.corpus.passages[q.passage].language == "en"
    )
    question = encoded.corpus.questions[number]
    target = int(encoded.passages[question.passage].ids[encoded.spans[number][0][0]])

    def logits(ids: Tensor, mask: Tensor, types: Tensor) -> tuple[Tensor, Tensor]:
        hit = (ids == target) & (types == 1)
        scores = hit.float() * 6
        scores[:, 0] = torch.where(hit.any(1), -1.0, 2.0)  # the null logit, half of it
        return scores, scores

    room = len(encoded.questions[number]) + 3 + 6
    found = predict(
        logits, encoded, special, [Pair(number, question.passage)], max_length=room, stride=2
    )[0]
    answer = question.answers[0]
    assert (found.start, found.end) == (answer.start, answer.end)
    assert found.score == 12
    assert found.no_answer == -2 - 12  # the least null logit of all windows
