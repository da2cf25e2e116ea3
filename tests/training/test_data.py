"""Splits keep articles whole; answers stay where their offsets say."""

from __future__ import annotations

import json
from pathlib import Path

from miaotui.training.data import Corpus, DomainSource, read_domain, split_of, squad, subset

REDDIT = DomainSource("reddit", ("reddit.json",), "en", "passage", "made", "none")


def read(folder: Path, articles: list[dict[str, object]]) -> Corpus:
    (folder / "reddit.json").write_text(json.dumps({"data": articles}))
    corpus = Corpus([], [])
    read_domain(folder, REDDIT, corpus)
    return corpus


def paragraph(text: str, answer: str, start: int, key: str = "1") -> dict[str, object]:
    answers = [{"text": answer, "answer_start": start}]
    return {"context": text, "qas": [{"id": key, "question": "what?", "answers": answers}]}


def test_no_article_is_in_two_splits(corpus: Corpus) -> None:
    splits: dict[tuple[str, str], set[str]] = {}
    for passage in corpus.passages:
        splits.setdefault((passage.domain, passage.article), set()).add(passage.split)
    assert all(len(found) == 1 for found in splits.values())
    assert {s for found in splits.values() for s in found} == {"train", "dev", "heldout"}


def test_no_passage_text_is_in_two_splits(tmp_path: Path) -> None:
    articles: list[dict[str, object]] = [
        {
            "title": title,
            "paragraphs": [paragraph(f"Cats number {i}.", "Cats", 0) for i in range(200)],
        }
        for title in ("one", "two")
    ]
    corpus = read(tmp_path, articles)
    assert len(corpus.passages) == 200
    assert len(corpus.questions) == 400
    assert {p.split for p in corpus.passages} == {"train", "dev", "heldout"}


def test_a_split_depends_on_the_key_alone() -> None:
    splits = [split_of(f"article {n}") for n in range(4000)]
    assert splits == [split_of(f"article {n}") for n in range(4000)]
    assert 0.08 < splits.count("heldout") / 4000 < 0.12
    assert 0.03 < splits.count("dev") / 4000 < 0.07


def test_answers_not_at_their_offset_are_dropped_and_spaces_trimmed(tmp_path: Path) -> None:
    paragraphs = [paragraph("A red cat.", " cat.", 5, "good"), paragraph("A dog.", "cat", 2, "bad")]
    corpus = read(tmp_path, [{"title": "t", "paragraphs": paragraphs}])
    assert [q.id for q in corpus.questions] == ["good"]
    answer = corpus.questions[0].answers[0]
    assert corpus.passages[0].text[answer.start : answer.end] == "cat."


def test_selection_by_split_and_domain(corpus: Corpus) -> None:
    whole = sum(len(corpus.select(s)) for s in ("train", "dev", "heldout"))
    assert whole == len(corpus.questions)
    assert corpus.select("train", "nowhere") == []


def test_subset_is_repeatable() -> None:
    assert subset(list(range(100)), 0.1, 3) == subset(list(range(100)), 0.1, 3)
    assert len(subset(list(range(100)), 0.1, 3)) == 10
    assert subset([4, 5], 1.0, 3) == [4, 5]


def test_a_split_written_as_squad_is_read_back(tmp_path: Path) -> None:
    paragraphs = [paragraph(f"Cats number {i}.", "Cats", 0, str(i)) for i in range(40)]
    corpus = read(tmp_path, [{"title": title, "paragraphs": paragraphs} for title in ("a", "b")])
    asked = corpus.select("train")
    found = read(tmp_path, squad(corpus, asked)["data"])
    assert {(q.id, found.passages[q.passage].text) for q in found.questions} == {
        (q.id, corpus.passages[q.passage].text) for q in asked
    }
    assert {p.split for p in found.passages} == {"train"}
    assert [q.answers for q in found.questions] == [q.answers for q in asked]
