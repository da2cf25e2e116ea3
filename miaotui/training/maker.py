"""Training windows: a question with a crop of a passage that answers it, or does not."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np

from miaotui.training.features import Encoded, Ints, Special
from miaotui.training.noanswer import WrongPassages


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
class Draw:
    """How a window is drawn: crop size, shares of wrong passages and of masked tokens.

    ``one_answer``: of several annotators' answers the first alone counts. Votes for a short and a
    long one teach to begin where the one does and to end where the other does.
    """

    crop_low: int
    crop_high: int
    unanswerable: float
    mask: float
    one_answer: bool = False


class Maker:
    """Draws training windows. All randomness comes from the generator passed in."""

    def __init__(self, encoded: Encoded, special: Special, rows: Ints, base_size: int) -> None:
        self.encoded = encoded
        self.special = special
        self.rows = rows
        self.base_size = base_size
        self.wrong = WrongPassages(encoded, "train")

    def make(self, question: int, draw: Draw, rng: random.Random) -> Example:
        """A window for the question numbered ``question``, answerable or not."""
        corpus = self.encoded.corpus
        home = corpus.passages[corpus.questions[question].passage]
        spans = self.encoded.spans[question]
        if rng.random() < draw.unanswerable or not spans:
            ids = self._without_answer(question, draw, rng)
            return self._assemble(question, ids, [], draw, rng)
        ids = self.encoded.passages[corpus.questions[question].passage].ids
        if draw.one_answer:
            spans = spans[:1]
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
        pool = self.wrong.articles[home.domain, home.article]
        others = [p for p in rng.sample(pool, min(len(pool), rng.randint(0, 4))) if p != own]
        before = others[: rng.randint(0, len(others))]
        parts = [self.encoded.passages[p].ids for p in before]
        shift = sum(map(len, parts))
        parts += [ids, *(self.encoded.passages[p].ids for p in others[len(before) :])]
        return np.concatenate(parts), [(a + shift, b + shift) for a, b in spans]

    def _without_answer(self, question: int, draw: Draw, rng: random.Random) -> Ints:
        """Tokens that do not answer: the same passage elsewhere, or a wrong passage.

        A third are the longest part of the passage before or after all answers.
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
        wrong = self.wrong.pick(question, rng, anywhere=0.2)
        ids = own[:0] if wrong is None else self.encoded.passages[wrong].ids
        at = rng.randint(0, max(0, len(ids) - size))
        return ids[at : at + size]

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
