"""Scores worked by hand."""

from __future__ import annotations

import pytest

from miaotui.training.scorer import (
    auroc,
    best_scores,
    chinese_f1,
    chinese_units,
    english_f1,
    exact,
    longest_common_run,
    normalize_english,
)


def test_english_normalisation_drops_case_punctuation_and_articles() -> None:
    assert normalize_english("  The U.S.  Army, a force ") == "us army force"


@pytest.mark.parametrize(
    ("prediction", "truth", "f1"),
    [
        ("the cat", "a cat", 1.0),
        ("black cat", "cat", 2 * (1 / 2) * 1 / (1 / 2 + 1)),  # precision 1/2, recall 1
        ("in New York City", "New York", 2 * (2 / 4) * 1 / (2 / 4 + 1)),
        ("to be or not to be", "to be", 2 * (2 / 6) * 1 / (2 / 6 + 1)),
        ("dog", "cat", 0.0),
        ("the", "a", 1.0),  # both empty once normalised
        ("the", "cat", 0.0),
    ],
)
def test_english_f1(prediction: str, truth: str, f1: float) -> None:
    assert english_f1(prediction, truth) == pytest.approx(f1)


def test_english_exact_match() -> None:
    assert exact("The Eiffel Tower.", "eiffel tower", "en")
    assert not exact("Eiffel", "Eiffel Tower", "en")


def test_chinese_units_keep_latin_words_and_drop_punctuation() -> None:
    assert chinese_units("《BERT》是2018年，模型。") == ["bert", "是", "2018", "年", "模", "型"]


def test_longest_common_run_is_contiguous() -> None:
    assert longest_common_run("北京大学", "北大") == 1
    assert longest_common_run("abcd", "xbcy") == 2
    assert longest_common_run("", "a") == 0


@pytest.mark.parametrize(
    ("prediction", "truth", "f1"),
    [
        ("北京", "北京。", 1.0),
        ("在北京", "北京", 2 * (2 / 3) * 1 / (2 / 3 + 1)),
        ("北京大学", "北大", 2 * 1 / (4 + 2)),  # the longest common run is one character
        ("上海", "北京", 0.0),
        ("", "北京", 0.0),
    ],
)
def test_chinese_f1(prediction: str, truth: str, f1: float) -> None:
    assert chinese_f1(prediction, truth) == pytest.approx(f1)


def test_chinese_exact_match_ignores_punctuation_only() -> None:
    assert exact("《三国》", "三国", "zh")
    assert not exact("三国", "三國", "zh")


def test_the_best_truth_counts() -> None:
    assert best_scores("the cat", ["a dog", "cat"], "en") == (1.0, 1.0)
    assert best_scores("cat", [], "en") == (0.0, 0.0)


def test_auroc() -> None:
    assert auroc([2.0, 3.0], [0.0, 1.0]) == 1.0
    assert auroc([0.0], [1.0]) == 0.0
    assert auroc([1.0, 1.0], [1.0]) == 0.5
    assert auroc([3.0, 1.0], [2.0, 0.0]) == 0.75  # three of four pairs are in order
    with pytest.raises(ValueError, match="both kinds"):
        auroc([], [1.0])
