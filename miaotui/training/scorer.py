"""Scores of extracted answers.

English: exact match and token F1 with the normalisation of the SQuAD 1.1 evaluation (Rajpurkar et
al., EMNLP 2016). Chinese: those of the CMRC 2018 evaluation (Cui et al., EMNLP 2019), which splits
ideographs one by one, keeps runs of Latin letters and digits whole, and takes the longest common
run of both for the overlap. Also the area under the ROC curve.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

from miaotui.training.data import Language
from miaotui.training.glosses import is_han

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = set(string.punctuation)


def normalize_english(text: str) -> str:
    """Lower case, without punctuation, articles and repeated spaces."""
    kept = "".join(c for c in text.lower() if c not in _PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", kept).split())


def english_f1(prediction: str, truth: str) -> float:
    """Harmonic mean of token precision and recall; 1 if both are empty."""
    found, wanted = normalize_english(prediction).split(), normalize_english(truth).split()
    if not found or not wanted:
        return float(found == wanted)
    common = sum((Counter(found) & Counter(wanted)).values())
    return 2 * common / (len(found) + len(wanted))


def chinese_units(text: str) -> list[str]:
    """Ideographs singly, Latin words and numbers whole, punctuation and spaces left out."""
    units: list[str] = []
    run = ""
    for char in text.lower().strip():
        category = unicodedata.category(char)
        if not is_han(char) and category[0] in "LMN":
            run += char
            continue
        if run:
            units.append(run)
            run = ""
        if category[0] not in "PZSC":
            units.append(char)
    return [*units, run] if run else units


def longest_common_run(left: Sequence[str], right: Sequence[str]) -> int:
    """Length of the longest run of units that both contain."""
    best = 0
    before = [0] * (len(right) + 1)
    for unit in left:
        row = [0] * (len(right) + 1)
        for i, other in enumerate(right):
            if unit == other:
                row[i + 1] = before[i] + 1
                best = max(best, row[i + 1])
        before = row
    return best


def chinese_f1(prediction: str, truth: str) -> float:
    """Character F1 over the longest common run, as CMRC 2018 has it."""
    found, wanted = chinese_units(prediction), chinese_units(truth)
    common = longest_common_run(found, wanted)
    return 2 * common / (len(found) + len(wanted)) if common else 0.0


def exact(prediction: str, truth: str, language: Language) -> bool:
    """Equal after the language's normalisation."""
    if language == "zh":
        return "".join(chinese_units(prediction)) == "".join(chinese_units(truth))
    return normalize_english(prediction) == normalize_english(truth)


def best_scores(prediction: str, truths: Sequence[str], language: Language) -> tuple[float, float]:
    """(exact match, F1), each against the truth that suits it best."""
    f1 = chinese_f1 if language == "zh" else english_f1
    return (
        float(any(exact(prediction, t, language) for t in truths)),
        max((f1(prediction, t) for t in truths), default=0.0),
    )


def auroc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """Probability that a positive scores above a negative, ties counting half.

    Raises ValueError when either is empty.
    """
    if not positive or not negative:
        raise ValueError("both kinds are needed")
    ranked = sorted([(s, 1) for s in positive] + [(s, 0) for s in negative])
    ranks = 0.0
    at = 0
    while at < len(ranked):
        end = at
        while end < len(ranked) and ranked[end][0] == ranked[at][0]:
            end += 1
        ranks += sum(kind for _, kind in ranked[at:end]) * (at + 1 + end) / 2
        at = end
    count = len(positive)
    return (ranks - count * (count + 1) / 2) / (count * len(negative))
