"""Questions and passages as tokens, answers as token spans.

Passages and questions are tokenised once (``encode``). An evaluated passage is covered by
overlapping windows (``windows``); ``maker`` draws those of training.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from miaotui.training.data import Answer, Corpus

Ints = NDArray[np.int32]


@dataclass
class EncodedPassage:
    """Token ids of a passage and their character offsets, int32 [tokens] each."""

    ids: Ints
    starts: Ints
    ends: Ints


@dataclass
class Encoded:
    """A corpus in tokens. ``spans`` holds each question's answers as inclusive token ranges."""

    corpus: Corpus
    passages: list[EncodedPassage]
    questions: list[list[int]]
    spans: list[list[tuple[int, int]]]


def token_span(passage: EncodedPassage, answer: Answer) -> tuple[int, int] | None:
    """First and last token that overlap the answer's characters; None if none does."""
    first = int(np.searchsorted(passage.ends, answer.start, side="right"))
    last = int(np.searchsorted(passage.starts, answer.end, side="left")) - 1
    return (first, last) if first <= last else None


def encode(corpus: Corpus, tokenizer: Tokenizer, max_question: int) -> Encoded:
    """Tokenise all passages and questions and align the answers by offsets."""
    passages = []
    for item in tokenizer.encode_batch([p.text for p in corpus.passages], add_special_tokens=False):
        offsets = np.asarray(item.offsets, dtype=np.int32).reshape(-1, 2)
        passages.append(
            EncodedPassage(np.asarray(item.ids, dtype=np.int32), offsets[:, 0], offsets[:, 1])
        )
    questions = [
        item.ids[:max_question]
        for item in tokenizer.encode_batch(
            [q.text for q in corpus.questions], add_special_tokens=False
        )
    ]
    spans = [
        [s for a in q.answers if (s := token_span(passages[q.passage], a))]
        for q in corpus.questions
    ]
    return Encoded(corpus, passages, questions, spans)


@dataclass(frozen=True)
class Special:
    """Ids of the special tokens."""

    cls: int
    sep: int
    mask: int

    @staticmethod
    def of(tokenizer: Tokenizer) -> Special:
        """Looked up by name. Raises ValueError if one is not in the vocabulary."""
        names = ("[CLS]", "[SEP]", "[MASK]")
        ids = [i for name in names if (i := tokenizer.token_to_id(name)) is not None]
        if len(ids) < len(names):
            raise ValueError("the tokenizer lacks a special token")
        return Special(*ids)


def windows(tokens: int, room: int, overlap: int) -> list[tuple[int, int]]:
    """Runs [low, high) of at most ``room`` tokens that cover ``tokens`` and overlap."""
    if tokens <= room:
        return [(0, tokens)]
    step = max(1, room - overlap)
    return [
        (low, min(tokens, low + room)) for low in range(0, tokens - overlap, step) if low < tokens
    ]
