"""Question sets turned into collections: every passage of a set is a document."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from miaotui.retrieval.collection import Found, SqliteCollection
from miaotui.retrieval.prepare import prepare_text
from miaotui.training.data import DOMAINS, Corpus, Language, Split, read_corpus
from tests.encoder import StageVectors

# Its passages are single sentences of few articles: no documents that anyone would add.
_LEFT_OUT = "qamr"


@dataclass(frozen=True)
class Asked:
    """A question, the place of its answers, and the answers; offsets in the document's text."""

    text: str
    language: Language
    domain: str
    source: str
    spans: tuple[tuple[int, int], ...]
    truths: tuple[str, ...]

    def is_answered_by(self, found: Found) -> bool:
        """Whether a passage holds one of the answers, at its place."""
        passage = found.passage
        return passage.document.source == self.source and any(
            passage.start <= start and end <= passage.end for start, end in self.spans
        )


def read_questions(folder: Path) -> Corpus:
    """The sets of a folder of SQuAD files."""
    domains = tuple(source for source in DOMAINS if source.name != _LEFT_OUT)
    return read_corpus(folder, domains)


def source_of(corpus: Corpus, passage: int) -> str:
    """The document's source."""
    return f"{corpus.passages[passage].domain}/{passage}"


def sample(corpus: Corpus, split: Split, domain: str, count: int, seed: int = 1) -> list[Asked]:
    """Questions of one domain and split."""
    questions = corpus.select(split, domain)
    chosen = random.Random(seed).sample(questions, min(count, len(questions)))
    asked = []
    for question in chosen:
        passage = corpus.passages[question.passage]
        spans = tuple((answer.start, answer.end) for answer in question.answers)
        truths = tuple(passage.text[start:end] for start, end in spans)
        source = source_of(corpus, question.passage)
        asked.append(Asked(question.text, passage.language, domain, source, spans, truths))
    return asked


def add_all(collection: SqliteCollection, corpus: Corpus) -> None:
    """Adds every passage as a document."""
    for number, passage in enumerate(corpus.passages):
        collection.add(prepare_text(source_of(corpus, number), passage.text))


def add_vectors(collection: SqliteCollection, encoder: StageVectors, batch: int = 64) -> int:
    """Encodes what has no vector yet; returns how many passages that were."""
    after, done = 0, 0
    while waiting := collection.without_vector(after, batch):
        ids = [identifier for identifier, _ in waiting]
        collection.add_vectors(ids, encoder.encode([text for _, text in waiting]))
        after, done = ids[-1], done + len(ids)
    return done
