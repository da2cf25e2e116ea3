"""Answers of a model to questions on whole passages, window by window."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
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


@dataclass(frozen=True)
class Window:
    """One window of a pair: its number, first passage token, where the passage begins, ids."""

    pair: int
    low: int
    at: int
    ids: list[int]


def _inputs(
    encoded: Encoded, special: Special, pairs: list[Pair], max_length: int, stride: int
) -> Iterator[Window]:
    for number, pair in enumerate(pairs):
        head = [special.cls, *encoded.questions[pair.question], special.sep]
        ids = encoded.passages[pair.passage].ids.tolist()
        for low, high in windows(len(ids), max_length - len(head) - 1, stride):
            yield Window(number, low, len(head), [*head, *ids[low:high], special.sep])


def predict(
    logits: Logits,
    encoded: Encoded,
    special: Special,
    pairs: list[Pair],
    *,
    max_length: int = 384,
    stride: int = 128,
    tokens: int = 4096,
    threads: int = 1,
) -> list[Prediction]:
    """The best answer to each pair. ``tokens`` bounds a batch; each thread takes one core."""
    todo = sorted(_inputs(encoded, special, pairs, max_length, stride), key=lambda w: len(w.ids))
    batches = []
    while todo:
        size = max(1, tokens // len(todo[-1].ids))
        batches.append(todo[-size:])
        todo = todo[:-size]
    best: list[tuple[float, int, int] | None] = [None] * len(pairs)
    null = [float("inf")] * len(pairs)
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for found in pool.map(lambda batch: _batch(logits, encoded, pairs, batch), batches):
            for number, nothing, span in found:
                null[number] = min(null[number], nothing)
                held = best[number]
                if span is not None and (held is None or span[0] > held[0]):
                    best[number] = span
    return [
        _prediction(encoded, pair, span, null[number])
        for number, (pair, span) in enumerate(zip(pairs, best, strict=True))
    ]


@torch.inference_mode()
def _batch(
    logits: Logits, encoded: Encoded, pairs: list[Pair], batch: list[Window]
) -> list[tuple[int, float, tuple[float, int, int] | None]]:
    """Of each window: its pair, the null logit, and the best span's score and passage tokens."""
    shape = (len(batch), max(len(w.ids) for w in batch))
    ids, mask, types = (torch.zeros(shape, dtype=torch.long) for _ in range(3))
    for row, window in enumerate(batch):
        length = len(window.ids)
        ids[row, :length] = torch.tensor(window.ids)
        mask[row, :length] = 1
        types[row, window.at : length] = 1
    start, end = (x.float().cpu().numpy() for x in logits(ids, mask, types))
    found: list[tuple[int, float, tuple[float, int, int] | None]] = []
    for row, window in enumerate(batch):
        at, stop = window.at, len(window.ids) - 1
        span = None
        if stop > at:
            passage = encoded.corpus.passages[pairs[window.pair].passage]
            longest = LONGEST_ANSWER[passage.language]
            first, last, score = best_span(start[row, at:stop], end[row, at:stop], longest)
            span = (score, window.low + first, window.low + last)
        found.append((window.pair, float(start[row, 0] + end[row, 0]), span))
    return found


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
