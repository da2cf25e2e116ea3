"""What an explanation looks like, over HTTP and gRPC."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import Field
from typing_extensions import TypedDict

from miaotui.robustness.warnings import Kind
from miaotui.v1 import explain_pb2 as pb

Part = Literal["question", "context", "special"]


@dataclass(frozen=True, slots=True)
class WarningView:
    """Something about the input that makes answers less certain."""

    kind: Kind
    message: str
    score: Annotated[float, Field(description="How much of it there is, above 0 and up to 1.")]


@dataclass(frozen=True, slots=True)
class ExplainedAnswer:
    """The span that is explained."""

    text: str
    start: Annotated[int, Field(description="First character, in code points of the passage.")]
    end: int
    logit: Annotated[float, Field(description="Start logit plus end logit.")]


@dataclass(frozen=True, slots=True)
class ExplainedWord:
    """A word, and what it did for the answer's logit: for it above 0, against it below."""

    text: str
    start: Annotated[int, Field(description="First character, of question or passage as sent.")]
    end: int
    part: Literal["question", "context"]
    attribution: Annotated[float, Field(description="Sum over its tokens.")]


@dataclass(frozen=True, slots=True)
class ExplainedToken:
    """A token of the window that holds the answer."""

    text: str
    part: Part
    start: Annotated[int | None, Field(description="As of a word; null for special tokens.")]
    end: int | None
    attribution: float
    rollout: Annotated[float, Field(description="Share of the rolled out attention.")]


@dataclass(frozen=True, slots=True)
class Completeness:
    """`sum` of the attributions ought to be `logit` minus `baseline_logit`; it is off by `gap`."""

    logit: float
    baseline_logit: float
    sum: float
    gap: float


AttentionView = TypedDict(
    "AttentionView",
    {
        "layers": int,
        "heads": int,
        "from": Annotated[
            list[int], Field(description="Indexes in `tokens` of the answer's first and last.")
        ],
        "rows": Annotated[
            list[list[list[float]]],
            Field(description="By layer, head and token: mean over `from`; sums up to 1."),
        ],
    },
)


@dataclass(frozen=True, slots=True)
class RunnerUp:
    """A span that might have been the answer; `margin`: how far its logit is below."""

    text: str
    start: int
    end: int
    logit: float
    margin: float


@dataclass(frozen=True, slots=True)
class Step:
    """What a hop did on the way to the answer, or to its explanation ("explain: …")."""

    hop: str
    did: str
    milliseconds: float
    cache: Annotated[Literal["hit", "miss"] | None, Field(description="Where one was asked.")]
    shape: Annotated[str | None, Field(description="What it worked on.")]


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why an answer is the answer. Offsets count code points of question and passage as sent."""

    answer: ExplainedAnswer
    words: list[ExplainedWord]
    tokens: Annotated[list[ExplainedToken], Field(description="Of the answer's window.")]
    method: Literal["integrated_gradients"]
    steps: Annotated[int, Field(description="Points at which gradients were taken.")]
    completeness: Completeness
    attention: AttentionView
    runners_up: Annotated[list[RunnerUp], Field(description="Best first.")]
    margin: Annotated[float, Field(description="The first runner-up's; 0 where there is none.")]
    path: Annotated[list[Step], Field(description="How it came about, hop by hop.")]
    notes: Annotated[list[str], Field(description="What to keep in mind when reading this.")]


NOTES = (
    "Attributions say how the answer's logit changes along the straight path from a baseline, in "
    "which every word is the padding token, to the words that were sent; another baseline gives "
    "other numbers (Sundararajan et al. 2017).",
    "Attention does not prove what an answer rests on: quite different attention can give the same "
    "answer (Jain and Wallace 2019), though it is not without meaning either (Wiegreffe and Pinter "
    "2019). Rollout assumes that heads count alike and that layers only mix.",
    "Runners-up may overlap the answer: then their margin tells how sure its ends are.",
)
NOTE_UNANSWERABLE = (
    'The verdict is "no answer"; what is explained is the span that comes closest to one.'
)
NOTE_ROUGH = (
    "There was not enough time, or there were not enough points, for the sum of the attributions "
    "to come as close as it should: see `gap`."
)


def explanation_to_proto(explanation: Explanation) -> pb.Explanation:
    """The same as a message."""
    answer, attention = explanation.answer, explanation.attention
    complete = explanation.completeness
    return pb.Explanation(
        answer=pb.RunnerUp(
            text=answer.text, start=answer.start, end=answer.end, logit=answer.logit
        ),
        words=[
            pb.ExplainedWord(
                text=w.text, start=w.start, end=w.end, part=w.part, attribution=w.attribution
            )
            for w in explanation.words
        ],
        tokens=[
            pb.ExplainedToken(
                text=t.text,
                part=t.part,
                start=t.start,
                end=t.end,
                attribution=t.attribution,
                rollout=t.rollout,
            )
            for t in explanation.tokens
        ],
        method=explanation.method,
        steps=explanation.steps,
        logit=complete.logit,
        baseline_logit=complete.baseline_logit,
        sum=complete.sum,
        gap=complete.gap,
        layers=attention["layers"],
        heads=attention["heads"],
        attention_from=attention["from"],
        attention=np.array(attention["rows"], "<f4").tobytes(),
        runners_up=[
            pb.RunnerUp(text=r.text, start=r.start, end=r.end, logit=r.logit, margin=r.margin)
            for r in explanation.runners_up
        ],
        margin=explanation.margin,
        path=[
            pb.DecisionStep(
                hop=s.hop,
                did=s.did,
                milliseconds=s.milliseconds,
                cache=s.cache or "",
                shape=s.shape or "",
            )
            for s in explanation.path
        ],
        notes=explanation.notes,
    )
