"""Reading SQuAD-format question sets and splitting them by article, never by question."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Split = Literal["train", "dev", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "dev", "heldout")
Language = Literal["en", "zh"]

SALT = "d"  # one of ten tried, for six Wikipedia articles held out and one for development


@dataclass(frozen=True)
class DomainSource:
    """Where one domain comes from. ``unit`` is what a split keeps whole."""

    name: str
    files: tuple[str, ...]
    language: Language
    unit: Literal["article", "passage"]
    source: str
    licence: str


DOMAINS: tuple[DomainSource, ...] = (
    DomainSource(
        "wiki", ("wiki.json",), "en", "article",
        "SQuADShifts new_wiki (Miller et al., ICML 2020)", "CC BY 4.0",
    ),
    DomainSource(
        "amazon", ("amazon.json",), "en", "article",
        "SQuADShifts amazon_reviews (Miller et al., ICML 2020)", "CC BY 4.0",
    ),
    DomainSource(
        "reddit", ("reddit.json",), "en", "passage",
        "SQuADShifts reddit (Miller et al., ICML 2020)", "CC BY 4.0",
    ),
    DomainSource(
        "qamr", ("qamr.json",), "en", "article",
        "QAMR dev and test (Michael et al., NAACL 2018)", "MIT",
    ),
    DomainSource(
        "cmrc", ("cmrc_trial.json", "cmrc_dev.json"), "zh", "article",
        "CMRC 2018 trial and dev (Cui et al., EMNLP 2019)", "CC BY-SA 4.0",
    ),
    DomainSource(
        "drcd", ("drcd_dev.json",), "zh", "article",
        "DRCD dev (Shao et al., 2018)", "CC BY-SA 3.0",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """An answer as character offsets [start, end) of its passage."""

    start: int
    end: int


@dataclass(frozen=True)
class Question:
    """One question. ``answers`` are the distinct votes of all annotators, repeats kept."""

    id: str
    text: str
    answers: tuple[Answer, ...]
    passage: int


@dataclass(frozen=True)
class Passage:
    """One passage with the index of its article and its place in the splits."""

    text: str
    article: str
    split: Split
    domain: str
    language: Language


@dataclass
class Corpus:
    """Passages and the questions on them; ``Question.passage`` indexes ``passages``."""

    passages: list[Passage]
    questions: list[Question]

    def select(self, split: Split, domain: str | None = None) -> list[Question]:
        """Questions of one split, of one domain or of all, in file order."""
        return [
            q
            for q in self.questions
            if self.passages[q.passage].split == split
            and (domain is None or self.passages[q.passage].domain == domain)
        ]


def split_of(key: str, dev: float = 0.05, heldout: float = 0.10) -> Split:
    """The split of an article (or passage), a function of its key alone.

    The BLAKE2 hash of the key, read as a fraction of 1, falls in [0, heldout) or
    [heldout, heldout + dev) or the rest, so that adding articles moves none.
    """
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    fraction = int.from_bytes(digest, "big") / 2**64
    if fraction < heldout:
        return "heldout"
    return "dev" if fraction < heldout + dev else "train"


def trim(text: str, start: int, length: int) -> Answer | None:
    """The answer at ``start`` without spaces at its ends; None if nothing is left."""
    end = min(len(text), start + length)
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    return Answer(start, end) if end > start else None


def read_domain(folder: Path, source: DomainSource, into: Corpus) -> None:
    """Append one domain's passages and questions to ``into``.

    A passage that occurs twice keeps its first split key, so its text is in one split only.
    Answers whose text is not at their offset are dropped, questions without answers too.
    Raises FileNotFoundError for a missing file, KeyError or ValueError for one not in SQuAD form.
    """
    index: dict[str, int] = {}
    for name in source.files:
        for article in json.loads((folder / name).read_text(encoding="utf-8"))["data"]:
            title = str(article.get("title") or article.get("id"))
            for paragraph in article["paragraphs"]:
                text: str = paragraph["context"]
                if text not in index:
                    key = title if source.unit == "article" else text
                    split = split_of(f"{SALT}\0{source.name}\0{key}")
                    index[text] = len(into.passages)
                    into.passages.append(Passage(text, title, split, source.name, source.language))
                for qa in paragraph["qas"]:
                    answers = tuple(
                        span
                        for a in qa["answers"]
                        if text.startswith(a["text"], a["answer_start"])
                        and (span := trim(text, a["answer_start"], len(a["text"])))
                    )
                    if answers and qa["question"].strip():
                        into.questions.append(
                            Question(str(qa["id"]), qa["question"].strip(), answers, index[text])
                        )


def read_corpus(folder: Path, domains: tuple[DomainSource, ...] = DOMAINS) -> Corpus:
    """All domains of ``folder``, in the order given."""
    corpus = Corpus([], [])
    for source in domains:
        read_domain(folder, source, corpus)
    return corpus


def squad(corpus: Corpus, questions: list[Question]) -> dict[str, Any]:
    """Questions with their passages in SQuAD's form, an article each."""
    articles: dict[str, dict[int, list[Question]]] = {}
    for question in questions:
        article = corpus.passages[question.passage].article
        articles.setdefault(article, {}).setdefault(question.passage, []).append(question)
    return {
        "version": "1.1",
        "data": [
            {
                "title": title,
                "paragraphs": [
                    _paragraph(corpus.passages[number].text, asked)
                    for number, asked in paragraphs.items()
                ],
            }
            for title, paragraphs in articles.items()
        ],
    }


def write_squad(file: Path, corpus: Corpus, questions: list[Question]) -> None:
    """Write questions with their passages as a SQuAD file."""
    text = json.dumps(squad(corpus, questions), ensure_ascii=False)
    file.write_text(text, encoding="utf-8")


def _paragraph(text: str, questions: list[Question]) -> dict[str, Any]:
    return {
        "context": text,
        "qas": [
            {
                "id": q.id,
                "question": q.text,
                "answers": [
                    {"text": text[a.start : a.end], "answer_start": a.start} for a in q.answers
                ],
            }
            for q in questions
        ],
    }


def subset(numbers: list[int], fraction: float, seed: int) -> list[int]:
    """A random part of ``numbers``, in their order; all of them for a fraction of 1."""
    if fraction >= 1:
        return numbers
    count = max(1, round(len(numbers) * fraction))
    return sorted(random.Random(seed).sample(numbers, count))
