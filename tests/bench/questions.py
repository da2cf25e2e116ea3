"""Questions to measure with: English passages of mixed lengths, none like another."""

from __future__ import annotations

import random
from dataclasses import dataclass

_WORDS = (  # noqa: SIM905 - a list of words reads better as a text
    "the river old city bridge stone built year king water north valley people market trade "
    "first large small green mountain winter summer road house church tower school museum "
    "engine light music paper glass river island harbour ship captain letter war peace treaty "
    "science theory number planet star energy field method result paper author century history"
).split()


@dataclass(frozen=True)
class Question:
    """A question over a passage."""

    question: str
    context: str

    @property
    def body(self) -> dict[str, str]:
        """The HTTP request."""
        return {"question": self.question, "context": self.context}


def questions(count: int, *, seed: int, words: tuple[int, int] = (60, 240)) -> list[Question]:
    """`count` questions over passages of `words` (fewest, most) words; equal for equal seeds."""
    rng = random.Random(seed)
    return [_question(rng, number, rng.randint(*words)) for number in range(count)]


def _question(rng: random.Random, number: int, length: int) -> Question:
    words: list[str] = []
    while len(words) < length:
        sentence = rng.choices(_WORDS, k=rng.randint(6, 18))
        sentence[0] = sentence[0].capitalize()
        sentence[-1] += "."
        words += sentence
    year = rng.randint(1000, 2000)
    context = f"{' '.join(words)} The {rng.choice(_WORDS)} number {number} was built in {year}."
    return Question(f"When was the number {number} built near the {rng.choice(_WORDS)}?", context)
