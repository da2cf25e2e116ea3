"""Answers of several passages in one order, and whether any of them is one.

The constants were chosen on the development split of the question sets that
`tests/bench/retrieval.py` measures; its report is of the held-out split.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from miaotui.retrieval.fusion import Ranked
from miaotui.retrieval.terms import chinese_share

# What a fused score of 1 is worth in logits of the reader.
RETRIEVAL_WEIGHT = 12.0
# A passage with less of what the question asks about, by language, holds no answer, unless it
# is that near in meaning: of five passages, one will always look like an answer to the reader.
LEAST_COVERAGE: Mapping[str, float] = {"en": 0.3, "zh": 0.15}
NEAR = 0.5
_LEAST_SHARE = 1e-30


@dataclass(frozen=True, slots=True)
class SpanReading:
    """A span found in a passage. Logits are the reader's.

    `share`: the span's probability among all spans of its passage and "no answer", above 0;
    `no_answer_logit`: that of "no answer" in the same passage.
    """

    passage: int
    start: int
    end: int
    logit: float
    share: float
    no_answer_logit: float


@dataclass(frozen=True, slots=True)
class RankedSpan:
    """A span in the order of all; `score`: its probability among all spans of all passages
    and "no answer"."""

    reading: SpanReading
    score: float


def rank_spans(spans: Sequence[SpanReading], found: Sequence[Ranked]) -> list[RankedSpan]:
    """All spans of all passages, best first; `SpanReading.passage` indexes `found`.

    In each passage, "no answer" has weight 1 and the spans what their logits say; retrieval
    lowers the spans of passages that it ranks lower.
    """
    if not spans:
        return []
    top = max(ranked.score for ranked in found)
    priors = [RETRIEVAL_WEIGHT * (ranked.score - top) for ranked in found]
    weights = [span.logit - span.no_answer_logit + priors[span.passage] for span in spans]
    # A passage's spans, listed or not, weigh together what one of them says they do.
    masses = {
        span.passage: weight - math.log(max(span.share, _LEAST_SHARE))
        for span, weight in zip(spans, weights, strict=True)
    }
    most = max(0.0, *masses.values())
    total = math.exp(-most) + sum(math.exp(mass - most) for mass in masses.values())
    order = sorted(range(len(spans)), key=lambda i: (-weights[i], i))
    return [RankedSpan(spans[i], math.exp(weights[i] - most) / total) for i in order]


def language_of(question: str) -> str:
    """ "zh" or "en", which stands for all other languages."""
    return "zh" if chinese_share(question) > 0.3 else "en"


def is_answer(best: SpanReading, ranked: Ranked, threshold: float, language: str) -> bool:
    """Whether the best span answers, and not only looks as if it did.

    `threshold`: most that "no answer" may be above the span, in logits.
    """
    if best.no_answer_logit - best.logit > threshold:
        return False
    near = ranked.dense_score is not None and ranked.dense_score >= NEAR
    return near or ranked.coverage >= LEAST_COVERAGE[language]
