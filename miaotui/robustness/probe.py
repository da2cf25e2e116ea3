"""How answers fare when their questions and passages are disturbed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from miaotui.robustness.perturbations import PERTURBATIONS, Item
from miaotui.robustness.scoring import same_answer


class QuestionFileError(ValueError):
    """A file that holds no questions in SQuAD's format; the message says what is wrong."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """An answer's text ("" for none), and whether it came with a warning about the input."""

    text: str
    warned: bool


Ask = Callable[[Sequence[Item]], list[Outcome]]
"""Answers items, in their order."""


@dataclass(frozen=True, slots=True)
class Row:
    """What a perturbation did; shares and F1 are from 0 to 1.

    `items`: how many it could be applied to; `same`: of these, how many answers stayed equal,
    and `f1` the mean overlap with the undisturbed answer. `right_before` and `right_after`: F1
    with the answers wanted, None where none are known. `warned`: how many inputs got a warning.
    """

    name: str
    does: str
    items: int
    same: float
    f1: float
    right_before: float | None
    right_after: float | None
    warned: float


@dataclass(frozen=True, slots=True)
class Report:
    """All perturbations over some items."""

    items: int
    seed: int
    rows: list[Row]

    def as_json(self) -> dict[str, Any]:
        """For a program."""
        rows = [{name: getattr(row, name) for name in Row.__slots__} for row in self.rows]
        return {"items": self.items, "seed": self.seed, "perturbations": rows}


def probe(items: Sequence[Item], ask: Ask, *, seed: int = 0) -> Report:
    """Disturb items in every way, and compare the answers with those to the items as they are.

    Equal seeds disturb alike. Raises what `ask` raises, and `ValueError` where there are no items.
    """
    if not items:
        raise ValueError("there are no questions to disturb")
    before = ask(items)
    rows = []
    for perturbation in PERTURBATIONS:
        chance = random.Random(f"{seed} {perturbation.name}")
        disturbed = [perturbation.disturb(item, chance) for item in items]
        places = [place for place, item in enumerate(disturbed) if item is not None]
        if not places:
            continue
        after = ask([item for item in disturbed if item is not None])
        rows.append(
            _row(
                perturbation.name,
                perturbation.does,
                [items[place] for place in places],
                [before[place] for place in places],
                after,
            )
        )
    return Report(len(items), seed, rows)


def _row(
    name: str,
    does: str,
    items: Sequence[Item],
    before: Sequence[Outcome],
    after: Sequence[Outcome],
) -> Row:
    scores = [
        same_answer(new.text, (old.text,), item.language)
        for item, old, new in zip(items, before, after, strict=True)
    ]
    known = [place for place, item in enumerate(items) if item.answers]

    def right(outcomes: Sequence[Outcome]) -> float | None:
        if not known:
            return None
        return fmean(
            same_answer(outcomes[place].text, items[place].answers, items[place].language)[1]
            for place in known
        )

    return Row(
        name=name,
        does=does,
        items=len(items),
        same=fmean(exact for exact, _ in scores),
        f1=fmean(f1 for _, f1 in scores),
        right_before=right(before),
        right_after=right(after),
        warned=fmean(outcome.warned for outcome in after),
    )


def read_squad(path: Path, *, limit: int, seed: int = 0) -> list[Item]:
    """Answerable questions of a file in SQuAD's format: `limit` of them, drawn by the seed.

    Raises `QuestionFileError`, and `OSError` where the file cannot be read.
    """
    try:
        data = json.loads(path.read_text("utf-8-sig"))
        items = [
            Item(qa["question"], paragraph["context"], tuple(a["text"] for a in qa["answers"]))
            for article in data["data"]
            for paragraph in article["paragraphs"]
            for qa in paragraph["qas"]
            if qa.get("answers")
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise QuestionFileError(
            f"{path} is not a file of questions in SQuAD's format ({type(error).__name__}); "
            'it needs {"data": [{"paragraphs": [{"context": …, "qas": [{"question": …, '
            '"answers": [{"text": …}]}]}]}]}'
        ) from error
    items = [item for item in items if item.question.strip() and item.context.strip()]
    if not items:
        raise QuestionFileError(f"{path} holds no question that has an answer")
    random.Random(seed).shuffle(items)
    return items[:limit]
