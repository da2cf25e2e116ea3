"""A tiny model, and questions on its tokenizer's texts in SQuAD's form."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from tests.checkpoints import EXAMPLES, make_checkpoint, one_thread

# One answer for each of `EXAMPLES`.
ANSWERS = ("Paris", "Jane Austen", "6,300 km", "北京", "6300公里", "曹雪芹", "Python")
LAYERS = 3


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of three layers, 64 wide, with four heads. Tests must not change it."""
    return make_checkpoint(
        tmp_path_factory.mktemp("compression") / "bert", "bert", layers=LAYERS, hidden=64, seed=3
    )


def write_squad(file: Path, items: Iterable[tuple[str, str, str]]) -> Path:
    """A SQuAD file of (question, passage, answer)."""
    paragraphs = [
        {
            "context": text,
            "qas": [
                {
                    "id": str(number),
                    "question": question,
                    "answers": [{"text": answer, "answer_start": text.index(answer)}],
                }
            ],
        }
        for number, (question, text, answer) in enumerate(items)
    ]
    content = {"data": [{"title": "all", "paragraphs": paragraphs}]}
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQuAD file."""
    items = [(*pair, answer) for pair, answer in zip(EXAMPLES, ANSWERS, strict=True)]
    return write_squad(tmp_path_factory.mktemp("questions") / "squad.json", items)
