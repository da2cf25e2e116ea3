"""Questions asked of passages that do not answer them, and a score that tells.

The no-answer score of a question and a passage is null logit minus best span logit (see
``predict.Prediction``). A logistic fit turns it into a probability; the threshold is where that
is one half when both kinds are equally frequent (Platt, 1999).
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from miaotui.training.data import Split
from miaotui.training.features import Encoded


class WrongPassages:
    """Finds hard passages that do not answer a question, within one split."""

    def __init__(self, encoded: Encoded, split: Split) -> None:
        self.encoded = encoded
        self.articles: dict[tuple[str, str], list[int]] = defaultdict(list)
        self.domains: dict[str, list[int]] = defaultdict(list)
        for index, passage in enumerate(encoded.corpus.passages):
            if passage.split == split:
                self.articles[passage.domain, passage.article].append(index)
                self.domains[passage.domain].append(index)

    def pick(self, question: int, rng: random.Random, anywhere: float = 0.0) -> int | None:
        """Of eight passages the one most like the question; None if all hold an answer's text.

        The eight are of the same article if it has three or more, else of the domain, and also
        with probability ``anywhere``. Reviews of one product answer the same questions, so for
        them it is always the domain.
        """
        corpus = self.encoded.corpus
        home = corpus.passages[corpus.questions[question].passage]
        pool = self.articles[home.domain, home.article]
        if len(pool) < 3 or home.domain == "amazon" or rng.random() < anywhere:
            pool = self.domains[home.domain]
        return self.hardest(question, rng.sample(pool, min(8, len(pool))))

    def hardest(self, question: int, pool: list[int]) -> int | None:
        """Of ``pool``, the passage that shares most tokens with the question."""
        corpus = self.encoded.corpus
        item = corpus.questions[question]
        home = corpus.passages[item.passage].text
        texts = {home[a.start : a.end].lower() for a in item.answers}
        words = set(self.encoded.questions[question])
        best: tuple[int, int] | None = None
        for candidate in pool:
            text = corpus.passages[candidate].text.lower()
            if candidate == item.passage or any(t in text for t in texts):
                continue
            overlap = len(words.intersection(self.encoded.passages[candidate].ids.tolist()))
            if best is None or overlap > best[0]:
                best = (overlap, candidate)
        return best[1] if best else None


@dataclass(frozen=True)
class Calibration:
    """Probability of no answer = 1 / (1 + exp(-(score - threshold) / scale))."""

    threshold: float
    scale: float

    def log_odds(self, score: float) -> float:
        """Of there being no answer, for a no-answer score."""
        return (score - self.threshold) / self.scale

    def probability(self, score: float) -> float:
        """Of there being no answer, for a no-answer score."""
        return float(1 / (1 + np.exp(-np.clip(self.log_odds(score), -60, 60))))


def calibrate(unanswerable: Sequence[float], answerable: Sequence[float]) -> Calibration:
    """Logistic fit by Newton's method, both kinds weighted alike.

    Raises ValueError when either kind is missing or the score does not tell them apart at all.
    """
    if not unanswerable or not answerable:
        raise ValueError("both kinds are needed")
    scores = np.concatenate((np.asarray(unanswerable), np.asarray(answerable))).astype(np.float64)
    labels = np.concatenate((np.ones(len(unanswerable)), np.zeros(len(answerable))))
    weights = np.where(labels == 1, 0.5 / len(unanswerable), 0.5 / len(answerable))
    center, spread = scores.mean(), scores.std() or 1.0
    inputs = np.stack(((scores - center) / spread, np.ones_like(scores)), axis=1)
    fit = np.zeros(2)
    ridge = 1e-4 * np.eye(2)
    for _ in range(50):
        chance = 1 / (1 + np.exp(-inputs @ fit))
        slope = inputs.T @ (weights * (chance - labels)) + ridge @ fit
        curve = (inputs * (weights * chance * (1 - chance))[:, None]).T @ inputs + ridge
        step = np.linalg.solve(curve, slope)
        fit -= np.clip(step, -2, 2)
        if np.abs(step).max() < 1e-8:
            break
    if fit[0] <= 0:
        raise ValueError("the score does not rise with missing answers")
    return Calibration(float(center - spread * fit[1] / fit[0]), float(spread / fit[0]))
