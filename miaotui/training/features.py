"""From questions and passages to token windows with labels.

Passages and questions are tokenised once (``encode``). A training window is
``[CLS] question [SEP] crop [SEP]`` where the crop is a run of the passage's tokens around an
answer (``Maker``); an evaluated passage is covered by overlapping windows (``windows``).
"""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass, field

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


@dataclass
class Example:
    """One training window.

    ids: all tokens; passage_at: where the passage's tokens begin (types are 0 before, 1 after).
    starts, ends: token positions of all annotators' answers, both [0] when there is none.
    masked, targets: positions whose token was replaced by [MASK] and the new-row numbers hidden.
    """

    ids: list[int]
    passage_at: int
    starts: list[int]
    ends: list[int]
    masked: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Special:
    """Ids of the special tokens."""

    cls: int
    sep: int
    mask: int

    @staticmethod
    def of(tokenizer: Tokenizer) -> Special:
        """Looked up by name. Raises ValueError if one is not in the vocabulary."""
        ids = [tokenizer.token_to_id(name) for name in ("[CLS]", "[SEP]", "[MASK]")]
        if None in ids:
            raise ValueError("the tokenizer lacks a special token")
        return Special(*ids)


@dataclass(frozen=True)
class Draw:
    """How a window is drawn: crop size, shares of wrong passages and of masked tokens."""

    crop_low: int
    crop_high: int
    unanswerable: float
    mask: float


class Maker:
    """Draws training windows. All randomness comes from the generator passed in."""

    def __init__(self, encoded: Encoded, special: Special, rows: Ints, base_size: int) -> None:
        self.encoded = encoded
        self.special = special
        self.rows = rows
        self.base_size = base_size
        self.articles: dict[tuple[str, str], list[int]] = defaultdict(list)
        self.domains: dict[str, list[int]] = defaultdict(list)
        for index, passage in enumerate(encoded.corpus.passages):
            if passage.split == "train":
                self.articles[passage.domain, passage.article].append(index)
                self.domains[passage.domain].append(index)

    def make(self, question: int, draw: Draw, rng: random.Random) -> Example:
        """A window for the question numbered ``question``, answerable or not."""
        corpus = self.encoded.corpus
        home = corpus.passages[corpus.questions[question].passage]
        spans = self.encoded.spans[question]
        if rng.random() < draw.unanswerable or not spans:
            ids = self._without_answer(question, draw, rng)
            return self._assemble(question, ids, [], draw, rng)
        ids = self.encoded.passages[corpus.questions[question].passage].ids
        if home.domain == "qamr":
            ids, spans = self._among_others(question, ids, spans, draw, rng)
        size = rng.randint(min(draw.crop_low, draw.crop_high), draw.crop_high)
        first, last = rng.choice(spans)
        low, high = crop_around(len(ids), first, last, size, rng)
        inside = [(a - low, b - low) for a, b in spans if a >= low and b < high]
        return self._assemble(question, ids[low:high], inside, draw, rng)

    def _among_others(
        self, question: int, ids: Ints, spans: list[tuple[int, int]], draw: Draw, rng: random.Random
    ) -> tuple[Ints, list[tuple[int, int]]]:
        """The passage (one sentence) between up to four other sentences of its article."""
        corpus = self.encoded.corpus
        own = corpus.questions[question].passage
        home = corpus.passages[own]
        pool = self.articles[home.domain, home.article]
        others = [p for p in rng.sample(pool, min(len(pool), rng.randint(0, 4))) if p != own]
        before = others[: rng.randint(0, len(others))]
        parts = [self.encoded.passages[p].ids for p in before]
        shift = sum(map(len, parts))
        parts += [ids, *(self.encoded.passages[p].ids for p in others[len(before) :])]
        return np.concatenate(parts), [(a + shift, b + shift) for a, b in spans]

    def _without_answer(self, question: int, draw: Draw, rng: random.Random) -> Ints:
        """Tokens that do not answer: the same passage elsewhere, or a wrong passage.

        A wrong passage is the one of eight of the same article (else of the domain) that shares
        most tokens with the question and does not contain an answer's text.
        """
        corpus = self.encoded.corpus
        item = corpus.questions[question]
        own = self.encoded.passages[item.passage].ids
        size = rng.randint(min(draw.crop_low, draw.crop_high), draw.crop_high)
        spans = self.encoded.spans[question]
        if spans and rng.random() < 0.35:
            before = min(a for a, _ in spans)
            after = max(b for _, b in spans) + 1
            room = [(0, before), (after, len(own))]
            low, high = max(room, key=lambda r: r[1] - r[0])
            if high - low >= 30:
                at = rng.randint(low, max(low, high - size))
                return own[at : min(high, at + size)]
        home = corpus.passages[item.passage]
        pool = self.articles[home.domain, home.article]
        if len(pool) < 3 or home.domain == "amazon" or rng.random() < 0.2:
            pool = self.domains[home.domain]
        wrong = self.hard_passage(question, rng.sample(pool, min(8, len(pool))))
        ids = own[:0] if wrong is None else self.encoded.passages[wrong].ids
        at = rng.randint(0, max(0, len(ids) - size))
        return ids[at : at + size]

    def hard_passage(self, question: int, pool: list[int]) -> int | None:
        """Of ``pool``, the passage most like the question without an answer's text, or None."""
        corpus = self.encoded.corpus
        item = corpus.questions[question]
        home = corpus.passages[item.passage].text
        texts = {home[a.start : a.end].lower() for a in item.answers}
        words = set(self.encoded.questions[question])
        best: tuple[int, int] | None = None
        for candidate in pool:
            text = corpus.passages[candidate].text
            if candidate == item.passage or any(t in text.lower() for t in texts):
                continue
            overlap = len(words.intersection(self.encoded.passages[candidate].ids.tolist()))
            if best is None or overlap > best[0]:
                best = (overlap, candidate)
        return best[1] if best else None

    def _assemble(
        self,
        question: int,
        passage: Ints,
        spans: list[tuple[int, int]],
        draw: Draw,
        rng: random.Random,
    ) -> Example:
        head = [self.special.cls, *self.encoded.questions[question], self.special.sep]
        at = len(head)
        ids = [*head, *passage.tolist(), self.special.sep]
        example = Example(
            ids, at, [a + at for a, _ in spans] or [0], [b + at for _, b in spans] or [0]
        )
        if draw.mask > 0:
            kept = {p for a, b in spans for p in range(a + at, b + at + 1)}
            for position in range(at, len(ids) - 1):
                row = int(self.rows[ids[position]]) - self.base_size
                if row >= 0 and position not in kept and rng.random() < draw.mask:
                    example.masked.append(position)
                    example.targets.append(row)
                    ids[position] = self.special.mask
        return example


def crop_around(
    length: int, first: int, last: int, size: int, rng: random.Random
) -> tuple[int, int]:
    """A random run [low, high) of at most ``size`` of ``length`` tokens, around first..last.

    It is longer than ``size`` only if the answer is.
    """
    size = max(size, last - first + 1)
    low = rng.randint(max(0, last + 1 - size), min(first, max(0, length - size)))
    return low, min(length, low + size)


def windows(tokens: int, room: int, overlap: int) -> list[tuple[int, int]]:
    """Runs [low, high) of at most ``room`` tokens that cover ``tokens`` and overlap."""
    if tokens <= room:
        return [(0, tokens)]
    step = max(1, room - overlap)
    return [
        (low, min(tokens, low + room)) for low in range(0, tokens - overlap, step) if low < tokens
    ]
