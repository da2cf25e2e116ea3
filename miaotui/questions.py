"""Questions and answers as a gateway's clients have them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Candidate:
    """One candidate answer; offsets in code points, as Python counts: `context[start:end]`."""

    text: str
    start: int
    end: int
    score: float
    logit: float


@dataclass(frozen=True, slots=True)
class Citation:
    """What a written answer rests on; offsets as a candidate's."""

    start: int
    end: int
    text: str


@dataclass(frozen=True, slots=True)
class InputWarning:
    """What is unusual about a question or passage; `score` above 0 and up to 1."""

    kind: str
    message: str
    score: float


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to one question; `timings` in milliseconds by hop.

    `sentence` and `citations` are there in generative mode, `candidates` in extractive mode;
    `explanation`, as the API gives it, where it was asked for.
    """

    answerable: bool
    candidates: tuple[Candidate, ...]
    no_answer_score: float
    model: str
    model_fingerprint: str
    cache: str
    timings: Mapping[str, float]
    trace_id: str
    request_id: str
    sentence: str = ""
    citations: tuple[Citation, ...] = ()
    explanation: Mapping[str, Any] | None = None
    warnings: tuple[InputWarning, ...] = ()

    @property
    def best(self) -> Candidate | None:
        """The best candidate, if the passage holds an answer."""
        return self.candidates[0] if self.answerable and self.candidates else None

    @property
    def text(self) -> str:
        """The best candidate's text, or the sentence; empty where there is no answer."""
        if self.best is not None:
            return self.best.text
        return self.sentence if self.answerable else ""

    @property
    def start(self) -> int | None:
        """First character of the best candidate."""
        return self.best.start if self.best else None

    @property
    def end(self) -> int | None:
        """One past the last character of the best candidate."""
        return self.best.end if self.best else None


@dataclass(frozen=True, slots=True)
class Question:
    """A question over a passage, for `ask_many`; see the API's QaRequest for the fields."""

    question: str
    context: str
    top_k: int = 1
    max_answer_length: int | None = None
    no_answer_threshold: float | None = None
    normalization: str = "nfc"
    strip_markup: bool = False
    no_cache: bool = False
    mode: str = "extractive"
    explain: bool = False

    def body(self) -> dict[str, Any]:
        """The JSON object of this question."""
        fields = ((name, getattr(self, name)) for name in self.__slots__)
        return {name: value for name, value in fields if value is not None}
