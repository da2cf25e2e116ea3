"""Answers of a model to questions on whole passages, window by window."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from miaotui.training.data import Language
from miaotui.training.features import Encoded, Special, windows
from miaotui.training.model import TrainingModel

Floats = NDArray[np.float32]
Logits = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
LONGEST_ANSWER: dict[Language, int] = {"en": 30, "zh": 40}


@dataclass(frozen=True)
class Prediction:
    """The best span of a passage, as character offsets and text.

    no_answer: null logit minus best span logit; the null logit is start[CLS] + end[CLS], the least
    of all windows (the SQuAD 2.0 recipe of Devlin et al., NAACL 2019).
    """

    text: str
    start: int
    end: int
    score: float
    no_answer: float


@dataclass(frozen=True)
class Pair:
    """A question and the passage to ask, by their numbers in the corpus."""

    question: int
    passage: int


def model_logits(model: TrainingModel) -> Logits:
    """A model in training as a function from ids, mask and types to start and end logits."""

    def run(ids: Tensor, mask: Tensor, types: Tensor) -> tuple[Tensor, Tensor]:
        device = model.span.weight.device
        mask = mask.to(device)
        return model.spans(model.hidden(ids.to(device), mask, types.to(device)), mask)

    return run


def best_span(start: Floats, end: Floats, longest: int) -> tuple[int, int, float]:
    """First token, last token and summed logit of the best span of at most ``longest`` tokens."""
    scores = start[:, None] + end[None, :]
    reach = np.arange(len(start))
    ahead = reach[None, :] - reach[:, None]
    scores = np.where((ahead >= 0) & (ahead < longest), scores, -np.inf)
    first, last = divmod(int(scores.argmax()), len(start))
    return first, last, float(scores[first, last])


def _inputs(
    encoded: Encoded, special: Special, pairs: list[Pair], max_length: int, stride: int
) -> Iterator[tuple[int, int, int, list[int]]]:
    """(pair, window's first passage token, where the passage begins, ids) of every window."""
    for number, pair in enumerate(pairs):
        head = [special.cls, *encoded.questions[pair.question], special.sep]
        ids = encoded.passages[pair.passage].ids.tolist()
        for low, high in windows(len(ids), max_length - len(head) - 1, stride):
            yield number, low, len(head), [*head, *ids[low:high], special.sep]


@torch.inference_mode()
def predict(
    logits: Logits,
    encoded: Encoded,
    special: Special,
    pairs: list[Pair],
    *,
    max_length: int = 384,
    stride: int = 128,
    tokens: int = 6144,
) -> list[Prediction]:
    """The best answer to each pair. ``tokens`` bounds a batch."""
    todo = sorted(_inputs(encoded, special, pairs, max_length, stride), key=lambda w: len(w[3]))
    best: list[tuple[float, int, int] | None] = [None] * len(pairs)
    null = [float("inf")] * len(pairs)
    while todo:
        size = max(1, tokens // len(todo[-1][3]))
        part, todo = todo[-size:], todo[:-size]
        shape = (len(part), len(part[-1][3]))
        ids, mask, types = (torch.zeros(shape, dtype=torch.long) for _ in range(3))
        for row, (_, _, at, window) in enumerate(part):
            ids[row, : len(window)] = torch.tensor(window)
            mask[row, : len(window)] = 1
            types[row, at : len(window)] = 1
        start, end = (x.float().cpu().numpy() for x in logits(ids, mask, types))
        for row, (number, low, at, window) in enumerate(part):
            stop = len(window) - 1
            null[number] = min(null[number], float(start[row, 0] + end[row, 0]))
            if stop <= at:
                continue
            language = encoded.corpus.passages[pairs[number].passage].language
            first, last, score = best_span(
                start[row, at:stop], end[row, at:stop], LONGEST_ANSWER[language]
            )
            held = best[number]
            if held is None or score > held[0]:
                best[number] = (score, low + first, low + last)
    return [
        _prediction(encoded, pair, found, null[number])
        for number, (pair, found) in enumerate(zip(pairs, best, strict=True))
    ]


def _prediction(
    encoded: Encoded, pair: Pair, found: tuple[float, int, int] | None, null: float
) -> Prediction:
    if found is None:
        return Prediction("", 0, 0, float("-inf"), float("inf"))
    score, first, last = found
    passage = encoded.passages[pair.passage]
    start, end = int(passage.starts[first]), int(passage.ends[last])
    text = encoded.corpus.passages[pair.passage].text[start:end]
    return Prediction(text, start, end, score, null - score)
