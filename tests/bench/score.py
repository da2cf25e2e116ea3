"""Scores the answers of running services on question sets: `python -m tests.bench.score FILE…`.

FILE is in SQuAD's form; a question without answers counts as one that has none. `--heldout FOLDER`
takes the held-out articles of the bundled model's own sets instead. Without `--url` services are
started over the bundled model, in two stages.

Each question is asked over HTTP of its own passage: EM and F1, SQuAD's for English and CMRC's for
Chinese (by the passage's script). And of a wrong one, the paragraph of the same article (else of
another) that shares most words with it and holds none of its answers: AUROC of the no-answer score.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import re
import statistics
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from miaotui.training.data import DOMAINS, Language, read_corpus
from miaotui.training.glosses import is_han
from miaotui.training.scorer import auroc, best_scores
from tests.processes import Cluster

BUNDLED = Path(__file__).resolve().parents[2] / "miaotui" / "bundled" / "qa"
AT_ONCE = 16
CANDIDATES = 8


@dataclass(frozen=True)
class Item:
    """A question, its passage with the article it is of, and its answers, none for no answer."""

    of: str
    article: str
    question: str
    passage: str
    truths: tuple[str, ...]

    @property
    def language(self) -> Language:
        """Chinese where a fifth of the passage is ideographs."""
        return "zh" if sum(map(is_han, self.passage)) * 5 > len(self.passage) else "en"


@dataclass(frozen=True)
class Reply:
    """What the services said: the best span, which may be empty, and the no-answer score."""

    text: str
    no_answer: float


@dataclass(frozen=True)
class Score:
    """Per cent, but for the AUROC, which is None without wrong passages."""

    of: str
    questions: int
    em: float
    f1: float
    auroc: float | None


def read_file(path: Path) -> list[Item]:
    """The questions of a SQuAD-format file. Raises KeyError or ValueError for another form."""
    items = []
    for number, article in enumerate(json.loads(path.read_text(encoding="utf-8"))["data"]):
        title = str(article.get("title") or article.get("id") or number)
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                truths = tuple(answer["text"] for answer in qa.get("answers", ()))
                items.append(
                    Item(path.stem, title, qa["question"].strip(), paragraph["context"], truths)
                )
    return items


def read_heldout(folder: Path) -> list[Item]:
    """The questions that the bundled model never saw, of every domain."""
    corpus = read_corpus(folder, DOMAINS)
    items = []
    for question in corpus.select("heldout"):
        passage = corpus.passages[question.passage]
        truths = tuple(passage.text[a.start : a.end] for a in question.answers)
        items.append(Item(passage.domain, passage.article, question.text, passage.text, truths))
    return items


def wrong_passage(item: Item, passages: dict[str, list[str]], rng: random.Random) -> str | None:
    """A passage that does not answer, as much like the question as any of a few; None if none."""
    pool = passages[item.article]
    if len(pool) < 3:
        pool = [passage for those in passages.values() for passage in those]
    words = set(re.findall(r"\w", item.question) if item.language == "zh" else _words(item))
    best: tuple[int, str] | None = None
    for passage in rng.sample(pool, min(CANDIDATES, len(pool))):
        lowered = passage.lower()
        if passage == item.passage or any(truth.lower() in lowered for truth in item.truths):
            continue
        shared = sum(word in lowered for word in words)
        if best is None or shared > best[0]:
            best = (shared, passage)
    return None if best is None else best[1]


def _words(item: Item) -> list[str]:
    return re.findall(r"\w+", item.question.lower())


async def ask(
    http: httpx.AsyncClient, pairs: Sequence[tuple[str, str]], progress: Progress
) -> list[Reply]:
    """Asks (question, passage) pairs, `AT_ONCE` at once. Raises httpx.HTTPStatusError."""
    gate = asyncio.Semaphore(AT_ONCE)
    task = progress.add_task("questions", total=len(pairs))

    async def one(question: str, passage: str) -> Reply:
        async with gate:
            response = await http.post("/v1/qa", json={"question": question, "context": passage})
        response.raise_for_status()
        progress.advance(task)
        found = response.json()
        best = found["answers"][0]["text"] if found["answers"] else ""
        return Reply(best, found["no_answer_score"])

    return await asyncio.gather(*(one(*pair) for pair in pairs))


async def score(
    http: httpx.AsyncClient, items: Sequence[Item], limit: int, seed: int
) -> list[Score]:
    """A score of each set, of `limit` questions at most of each."""
    rng = random.Random(seed)
    scores = []
    with Progress(console=Console(stderr=True)) as progress:
        for of in dict.fromkeys(item.of for item in items):
            mine = [item for item in items if item.of == of]
            passages: dict[str, list[str]] = {}
            for item in mine:
                known = passages.setdefault(item.article, [])
                if item.passage not in known:
                    known.append(item.passage)
            chosen = rng.sample(mine, min(limit, len(mine)))
            answered = [item for item in chosen if item.truths]
            wrong = [(i.question, p) for i in answered if (p := wrong_passage(i, passages, rng))]
            wrong += [(i.question, i.passage) for i in chosen if not i.truths]
            right = await ask(http, [(i.question, i.passage) for i in answered], progress)
            refused = await ask(http, wrong, progress)
            marks = [
                best_scores(reply.text, item.truths, item.language)
                for reply, item in zip(right, answered, strict=True)
            ]
            scores.append(
                Score(
                    of,
                    len(answered),
                    100 * statistics.fmean(em for em, _ in marks),
                    100 * statistics.fmean(f1 for _, f1 in marks),
                    auroc([r.no_answer for r in refused], [r.no_answer for r in right])
                    if refused
                    else None,
                )
            )
    return scores


@contextlib.asynccontextmanager
async def services(url: str) -> AsyncIterator[str]:
    """The services at `url`, or own ones."""
    if url:
        yield url
        return
    async with Cluster(BUNDLED, stages=2) as cluster:
        yield cluster.url


async def main() -> None:
    parser = argparse.ArgumentParser(description="Scores running services on question sets.")
    parser.add_argument("files", nargs="*", type=Path, help="question sets in SQuAD's form")
    parser.add_argument("--heldout", type=Path, help="folder of the bundled model's own sets")
    parser.add_argument("--url", default="", help="a gateway; without it services are started")
    parser.add_argument("--limit", type=int, default=400, help="most questions of each set")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    items = [item for path in options.files for item in read_file(path)]
    if options.heldout:
        items += read_heldout(options.heldout)
    if not items:
        parser.error("name question sets, or --heldout FOLDER")
    async with (
        services(options.url) as url,
        httpx.AsyncClient(base_url=url, trust_env=False, timeout=60.0) as http,
    ):
        scores = await score(http, items, options.limit, options.seed)
    table = Table("set", "questions", "EM", "F1", "AUROC no answer")
    for row in scores:
        separation = "" if row.auroc is None else f"{row.auroc:.3f}"
        table.add_row(row.of, str(row.questions), f"{row.em:.1f}", f"{row.f1:.1f}", separation)
    Console(width=80).print(table)


if __name__ == "__main__":
    asyncio.run(main())
