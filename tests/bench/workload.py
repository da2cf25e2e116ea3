"""The questions that all sides answer, and how good their answers are."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from miaotui.training.data import write_squad
from miaotui.training.glosses import is_han
from miaotui.training.scorer import best_scores
from tests.bench.questions import questions
from tests.bench.squad import read_questions

Body = dict[str, str]
# Question sets that lie beside the project where it is developed.
QUESTION_SETS = Path(__file__).resolve().parents[2].parent / "shared" / "qa"


@dataclass(frozen=True)
class Workload:
    """Questions over passages, and the answers of each where they are known."""

    bodies: list[Body]
    truths: list[tuple[str, ...]]

    def f1(self, texts: Sequence[str]) -> float | None:
        """Mean F1 in percent; `None` where no answers are known."""
        return 100 * statistics.fmean(self._each(texts)) if self.truths else None

    def f1_error(self, texts: Sequence[str], others: Sequence[str]) -> float | None:
        """The standard error, in points, of how much better these texts' F1 is than others'."""
        if len(self.truths) < 2:
            return None
        pairs = zip(self._each(texts), self._each(others), strict=True)
        return 100 * statistics.stdev(a - b for a, b in pairs) / math.sqrt(len(self.truths))

    def _each(self, texts: Sequence[str]) -> list[float]:
        return [
            best_scores(text, truth, "zh" if any(map(is_han, truth[0])) else "en")[1]
            for text, truth in zip(texts, self.truths, strict=True)
        ]


def made(count: int, seed: int) -> Workload:
    """Made questions, whose answers nobody knows."""
    return Workload([question.body for question in questions(count, seed=seed)], [])


def held_out(data: Path, count: int, seed: int) -> Workload:
    """Questions of articles that the bundled model was not trained on, from SQuAD files."""
    corpus = read_questions(data)
    asked = [q for q in corpus.questions if corpus.passages[q.passage].split == "heldout"]
    chosen = random.Random(seed).sample(asked, count)
    bodies, truths = [], []
    for question in chosen:
        text = corpus.passages[question.passage].text
        bodies.append({"question": question.text, "context": text})
        truths.append(tuple(text[answer.start : answer.end] for answer in question.answers))
    return Workload(bodies, truths)


def trained_on(data: Path, out: Path) -> list[Path]:
    """Of each set of a folder of SQuAD files, a file of what the bundled model was trained on."""
    corpus = read_questions(data)
    files = []
    for domain in sorted({passage.domain for passage in corpus.passages}):
        file = out / f"{domain}.json"
        write_squad(file, corpus, corpus.select("train", domain))
        files.append(file)
    return files
