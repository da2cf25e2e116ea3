"""Reads answers from span logits.

The recipe of SQuAD 2.0 readers (Devlin et al. 2019, section 4.3; Rajpurkar et al. 2018): a
span's logit is its start logit plus its end logit; "no answer" is the classification
token's start plus end logit, the least of all windows.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]

DEFAULT_MAX_ANSWER_LENGTH = 30
# Spans looked at together; bounds the memory, 4 bytes a span, for long passages.
_BLOCK_SPANS = 2_000_000


class SpanError(ValueError):
    """Logits or parameters that no answer can be read from."""


@dataclass(frozen=True, slots=True, eq=False)
class WindowLogits:
    """Logits of one window, float32 `[tokens]` each, and where the passage lies in it.

    The classification token is at 0; the passage's tokens `passage_first` and following are
    at `passage_position` and following, `passage_tokens` of them.
    """

    start: FloatArray
    end: FloatArray
    passage_position: int
    passage_first: int
    passage_tokens: int


@dataclass(frozen=True, slots=True)
class Span:
    """A candidate answer: passage tokens `first` to `last`, inclusive.

    `logit` is start plus end logit, `score` the probability among all allowed spans and
    "no answer".
    """

    first: int
    last: int
    logit: float
    score: float


@dataclass(frozen=True, slots=True)
class Reading:
    """What the logits say.

    `spans`: best first. `no_answer_score`: logit of "no answer" minus the best span's.
    `no_answer_probability`: its share of the softmax. `answerable`: whether
    `no_answer_score` stays at or below the threshold.
    """

    spans: tuple[Span, ...]
    no_answer_score: float
    no_answer_probability: float
    answerable: bool


def read_spans(
    windows: Sequence[WindowLogits],
    *,
    top_k: int = 1,
    max_answer_length: int = DEFAULT_MAX_ANSWER_LENGTH,
    no_answer_threshold: float | None = None,
) -> Reading:
    """The `top_k` best spans of up to `max_answer_length` passage tokens.

    A span lies in one window. Where overlapping windows hold the same passage tokens, that
    is one span, and its best logit counts. The list is plain n-best: spans may overlap each
    other, as in SQuAD's n-best files, and there may be fewer than `top_k`. Equal logits are
    ordered by first, then by last token. Without a threshold everything is answerable.

    O(tokens x max_answer_length) time; memory is bounded. Raises `SpanError`.
    """
    if top_k < 1 or max_answer_length < 1:
        raise SpanError(
            f"top_k is {top_k} and max_answer_length {max_answer_length}; both must be at least 1"
        )
    null = _check(windows)
    spans = _Best(top_k)
    for first, band in _bands(windows, max_answer_length):
        spans.add(first, band)
    best = float(spans.logits[0])
    top = max(best, null)
    mass = spans.mass(top) + math.exp(null - top)
    no_answer_score = null - best
    return Reading(
        spans=tuple(
            Span(int(first), int(first + extra), float(logit), math.exp(logit - top) / mass)
            for logit, first, extra in zip(spans.logits, spans.firsts, spans.extras, strict=True)
        ),
        no_answer_score=no_answer_score,
        no_answer_probability=math.exp(null - top) / mass,
        answerable=no_answer_threshold is None or no_answer_score <= no_answer_threshold,
    )


def _check(windows: Sequence[WindowLogits]) -> float:
    """Refuses what cannot be read; returns the logit of "no answer"."""
    if not windows:
        raise SpanError("no windows: there is nothing to read an answer from")
    null = np.inf
    for index, window in enumerate(windows):
        past = window.passage_position + window.passage_tokens
        tokens = len(window.start)
        if len(window.end) != tokens:
            raise SpanError(f"window {index}: {tokens} start logits, {len(window.end)} end logits")
        if window.passage_tokens < 1 or window.passage_position < 1 or past > tokens:
            raise SpanError(
                f"window {index}: passage tokens at [{window.passage_position}, {past}) of a "
                f"window of {tokens}; there must be one at least, after the first token"
            )
        # One sum is cheaper than two tests, and not finite if any logit is not.
        with np.errstate(invalid="ignore", over="ignore"):
            total = window.start.sum(dtype=np.float64) + window.end.sum(dtype=np.float64)
        if not np.isfinite(total):
            raise SpanError(
                f"window {index}: logits are not finite; the model's weights are damaged, or its "
                "compute dtype overflows: try float32"
            )
        null = min(null, float(window.start[0]) + float(window.end[0]))
    return null


def _bands(windows: Sequence[WindowLogits], length: int) -> Iterator[tuple[int, FloatArray]]:
    """Logits of all spans, by blocks of passage tokens: (first token, `[firsts, extras]`).

    Entry [i, j] of a block is of the span from token first + i to token first + i + j; -inf
    where no window holds it.
    """
    ordered = sorted(windows, key=lambda window: window.passage_first)
    firsts = [window.passage_first for window in ordered]
    longest = max(window.passage_tokens for window in ordered)
    length = min(length, longest)
    past = max(window.passage_first + window.passage_tokens for window in ordered)
    rows = max(_BLOCK_SPANS // length, 1)
    for block in range(firsts[0], past, rows):
        block_past = min(block + rows, past)
        band = np.full((block_past - block, length), -np.inf, np.float32)
        nearby = slice(bisect_left(firsts, block - longest), bisect_left(firsts, block_past))
        for window in ordered[nearby]:
            low = max(block, window.passage_first)
            high = min(block_past, window.passage_first + window.passage_tokens)
            if low < high:
                part = band[low - block : high - block]
                np.maximum(part, _window_band(window, low, high, length), out=part)
        yield block, band


def _window_band(window: WindowLogits, low: int, high: int, length: int) -> FloatArray:
    """Span logits of one window for first tokens `[low, high)`: float32 `[firsts, length]`."""
    position = window.passage_position
    begin = position + low - window.passage_first
    rows = high - low
    ends = np.full(rows + length - 1, -np.inf, np.float32)
    tail = window.end[begin : position + window.passage_tokens][: len(ends)]
    ends[: len(tail)] = tail
    # Row i is ends[i : i + length], without a copy.
    shifted = np.lib.stride_tricks.as_strided(ends, (rows, length), ends.strides * 2)
    starts = window.start[begin : begin + rows]
    result: FloatArray = starts[:, None] + shifted
    return result


class _Best:
    """The best spans seen so far, and the sum of exp(logit) over all of them."""

    def __init__(self, top_k: int) -> None:
        self._top_k = top_k
        self._top = -np.inf
        self._sum = 0.0  # of exp(logit - self._top)
        self.logits = np.zeros(0, np.float32)
        self.firsts = np.zeros(0, np.int64)
        self.extras = np.zeros(0, np.int64)

    def add(self, first: int, band: FloatArray) -> None:
        """Takes in a block; blocks come in passage order."""
        flat = band.ravel()
        if self._top_k == 1:
            chosen = np.array([flat.argmax()])
        else:
            least = -np.inf
            if flat.size > self._top_k:
                least = np.partition(flat, flat.size - self._top_k)[flat.size - self._top_k]
            chosen = np.flatnonzero((flat >= least) & (flat > -np.inf))
        logits = flat[chosen]
        firsts, extras = np.divmod(chosen, band.shape[1])
        self._accumulate(flat, float(logits.max(initial=-np.inf)))
        logits = np.concatenate((self.logits, logits))
        # Stable: among equals the earlier token and the shorter span stay ahead.
        order = np.argsort(-logits, kind="stable")[: self._top_k]
        self.logits = logits[order]
        self.firsts = np.concatenate((self.firsts, firsts + first))[order]
        self.extras = np.concatenate((self.extras, extras))[order]

    def _accumulate(self, flat: FloatArray, top: float) -> None:
        if top > self._top:
            self._sum *= math.exp(self._top - top)
            self._top = top
        if self._top > -np.inf:
            self._sum += float(np.exp(flat - np.float32(self._top)).sum(dtype=np.float64))

    def mass(self, top: float) -> float:
        """Sum of exp(logit - top) over all spans."""
        return float(self._sum * math.exp(self._top - top))
