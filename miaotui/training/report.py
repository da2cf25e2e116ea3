"""Measuring a model: scores per domain, and how well it tells when there is no answer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict
from torch import Tensor
from transformers import BertForQuestionAnswering

from miaotui.training.config import TrainConfig
from miaotui.training.data import Split
from miaotui.training.features import Encoded, Special
from miaotui.training.noanswer import Calibration, WrongPassages, calibrate
from miaotui.training.predict import Logits, Pair, Prediction, predict
from miaotui.training.scorer import auroc, best_scores


class DomainScores(BaseModel):
    """Scores of one domain in per cent, and of how many questions.

    f1 is of tokens in English and of characters in Chinese. auroc is over as many questions with
    their own passage as with a wrong one; refused_wrong and kept_right are the shares of each that
    fall on the right side of the threshold.
    """

    model_config = ConfigDict(frozen=True)

    questions: int
    em: float
    f1: float
    auroc: float | None = None
    refused_wrong: float | None = None
    kept_right: float | None = None


class Results(BaseModel):
    """All that the model card is made from."""

    model_config = ConfigDict(frozen=True)

    steps: int
    split: Split
    domains: dict[str, DomainScores]
    auroc: dict[str, float]
    threshold: dict[str, float]
    scale: dict[str, float]


@dataclass
class Measured:
    """Predictions on a split: each question with its own passage, and with a wrong one."""

    own: dict[str, list[tuple[Pair, Prediction]]]
    wrong: dict[str, list[Prediction]]


def question_numbers(encoded: Encoded, split: Split) -> dict[str, list[int]]:
    """Domain to the numbers of its questions in a split."""
    numbers: dict[str, list[int]] = {}
    for number, question in enumerate(encoded.corpus.questions):
        passage = encoded.corpus.passages[question.passage]
        if passage.split == split:
            numbers.setdefault(passage.domain, []).append(number)
    return numbers


def plain_logits(model: BertForQuestionAnswering) -> Logits:
    """A model of transformers as a function from ids, mask and types to start and end logits."""

    def run(ids: Tensor, mask: Tensor, types: Tensor) -> tuple[Tensor, Tensor]:
        out = model(input_ids=ids, attention_mask=mask, token_type_ids=types)
        hide = mask == 0
        return (
            out.start_logits.masked_fill(hide, -1e4),
            out.end_logits.masked_fill(hide, -1e4),
        )

    return run


def measure(
    logits: Logits,
    encoded: Encoded,
    special: Special,
    split: Split,
    limit: int,
    config: TrainConfig,
    wrong: bool = True,
) -> Measured:
    """Ask at most ``limit`` questions of each domain, drawn alike each time."""
    measured = Measured({}, {})
    finder = WrongPassages(encoded, split)
    for domain, numbers in question_numbers(encoded, split).items():
        rng = random.Random(f"measure/{domain}")
        chosen = rng.sample(numbers, min(limit, len(numbers)))
        pairs = [Pair(n, encoded.corpus.questions[n].passage) for n in chosen]
        others = [
            Pair(n, passage)
            for n in (chosen if wrong else [])
            if (passage := finder.pick(n, rng)) is not None
        ]
        found = predict(
            logits,
            encoded,
            special,
            pairs + others,
            max_length=config.max_length,
            stride=config.stride,
            threads=config.threads,
        )
        measured.own[domain] = list(zip(pairs, found[: len(pairs)], strict=True))
        measured.wrong[domain] = found[len(pairs) :]
    return measured


def truths(encoded: Encoded, question: int) -> list[str]:
    """All annotators' answers as text."""
    item = encoded.corpus.questions[question]
    text = encoded.corpus.passages[item.passage].text
    return [text[a.start : a.end] for a in item.answers]


def em_f1(encoded: Encoded, answered: Sequence[tuple[Pair, Prediction]]) -> tuple[float, float]:
    """Mean exact match and F1 in per cent."""
    marks = [
        best_scores(
            prediction.text,
            truths(encoded, pair.question),
            encoded.corpus.passages[pair.passage].language,
        )
        for pair, prediction in answered
    ]
    return (
        round(100 * sum(m[0] for m in marks) / len(marks), 2),
        round(100 * sum(m[1] for m in marks) / len(marks), 2),
    )


def calibrations_of(encoded: Encoded, measured: Measured) -> dict[str, Calibration]:
    """One fit for each language, over its domains but QAMR, whose lone sentences are no passages.

    The score of a language the model knows less is lower for right and wrong passages alike, so
    one threshold for all would suit neither.
    """
    kinds: dict[str, tuple[list[float], list[float]]] = {}
    for domain, answered in measured.own.items():
        if domain == "qamr" and len(measured.own) > 1:
            continue
        language = encoded.corpus.passages[answered[0][0].passage].language
        wrong, right = kinds.setdefault(language, ([], []))
        wrong.extend(p.no_answer for p in measured.wrong[domain])
        right.extend(p.no_answer for _, p in answered)
    return {language: calibrate(*both) for language, both in kinds.items()}


def results(
    encoded: Encoded,
    measured: Measured,
    calibrations: dict[str, Calibration],
    split: Split,
    steps: int = 0,
) -> Results:
    """The scores of ``measured`` with thresholds found elsewhere, after ``steps``.

    The AUROC of all languages together is of the calibrated probability.
    """
    domains = {}
    pooled: dict[str, tuple[list[float], list[float]]] = {}
    for domain, answered in measured.own.items():
        em, f1 = em_f1(encoded, answered)
        right = [p.no_answer for _, p in answered]
        wrong = [p.no_answer for p in measured.wrong[domain]]
        language = encoded.corpus.passages[answered[0][0].passage].language
        limit = calibrations[language].threshold
        if domain != "qamr":
            chance = calibrations[language].log_odds
            for name in (language, "all"):
                both = pooled.setdefault(name, ([], []))
                both[0].extend(map(chance, wrong))
                both[1].extend(map(chance, right))
        domains[domain] = DomainScores(
            questions=len(answered),
            em=em,
            f1=f1,
            auroc=round(auroc(wrong, right), 4) if wrong else None,
            refused_wrong=round(100 * sum(s > limit for s in wrong) / len(wrong), 1)
            if wrong
            else None,
            kept_right=round(100 * sum(s <= limit for s in right) / len(right), 1),
        )
    return Results(
        steps=steps,
        split=split,
        domains=domains,
        auroc={n: round(auroc(w, r), 4) for n, (w, r) in pooled.items() if w},
        threshold={n: round(c.threshold, 4) for n, c in calibrations.items()},
        scale={n: round(c.scale, 4) for n, c in calibrations.items()},
    )
