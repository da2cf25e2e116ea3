"""Questions of SQuAD-format files as model inputs, with their answers as tokens."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from miaotui.compression.errors import CompressionError
from miaotui.models.stage import StageBatch
from miaotui.text.errors import TextError
from miaotui.text.tokenizer import TextTokenizer
from miaotui.text.tokens import TokenizedText
from miaotui.text.windows import Window
from miaotui.training.data import Language
from miaotui.training.glosses import is_han

# A batch as large as the shards make them on CPUs.
BATCH_TOKENS = 1024


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One question on one passage; `answers` may be empty: the passage holds none.

    `spans` are the answers' first and last passage tokens.
    """

    passage: TokenizedText
    text: str
    answers: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]
    language: Language
    windows: tuple[Window, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Labelled:
    """A batch and, of each window, the position of the answer's first and last token."""

    batch: StageBatch
    starts: tuple[int, ...]
    ends: tuple[int, ...]


def read_examples(
    files: Sequence[Path], tokenizer: TextTokenizer, *, limit: int | None, seed: int = 0
) -> list[Example]:
    """Draw at most `limit` questions of each file, the same ones each time; None: all, in order.

    Raises:
        CompressionError: a file cannot be read, is not in SQuAD's form, or has no question.
    """
    found: list[Example] = []
    for file in files:
        items = _read(file)
        chosen = items
        if limit is not None:
            chosen = random.Random(seed).sample(items, min(limit, len(items)))
        for question, text, answers in chosen:
            try:
                found.append(_example(tokenizer, question, text, answers))
            except TextError:  # empty once cleaned, or too long for a window
                continue
    if not found:
        raise CompressionError(
            f"{', '.join(map(str, files))}: no question with a passage; give a file in SQuAD's form"
        )
    return found


def passage_texts(files: Sequence[Path]) -> set[str]:
    """All passages of SQuAD files. Raises CompressionError as `read_examples` does."""
    return {text for file in files for _, text, _ in _read(file)}


def stage_batch(windows: Sequence[Window]) -> StageBatch:
    """One batch of windows, end to end."""
    ids = torch.from_numpy(np.concatenate([w.input_ids for w in windows]))
    types = [w.token_type_ids for w in windows if w.token_type_ids is not None]
    return StageBatch(
        [len(w.input_ids) for w in windows],
        input_ids=ids,
        token_type_ids=torch.from_numpy(np.concatenate(types)) if types else None,
    )


def labelled_batches(
    examples: Sequence[Example], *, tokens: int = BATCH_TOKENS
) -> Iterator[Labelled]:
    """Batches of the windows that hold an answer whole, in order."""
    held: list[tuple[Window, int, int]] = []
    size = 0
    for example in examples:
        placed = _placed(example)
        if placed is None:
            continue
        if held and size + len(placed[0].input_ids) > tokens:
            yield _labelled(held)
            held, size = [], 0
        held.append(placed)
        size += len(placed[0].input_ids)
    if held:
        yield _labelled(held)


def labelled_passages(examples: Sequence[Example]) -> list[list[Labelled]]:
    """Of each passage its questions as `labelled_batches` has them, each a batch of its own."""
    found: dict[str, list[Labelled]] = {}
    for example in examples:
        placed = _placed(example)
        if placed is not None:
            found.setdefault(example.text, []).append(_labelled([placed]))
    return list(found.values())


def _labelled(held: Sequence[tuple[Window, int, int]]) -> Labelled:
    return Labelled(
        stage_batch([window for window, _, _ in held]),
        tuple(start for _, start, _ in held),
        tuple(end for _, _, end in held),
    )


def _placed(example: Example) -> tuple[Window, int, int] | None:
    for first, last in example.spans:
        for window in example.windows:
            low = window.passage_first
            if low <= first and last < low + window.passage_tokens:
                shift = window.passage_position - low
                return window, first + shift, last + shift
    return None


def _read(file: Path) -> list[tuple[str, str, list[tuple[str, int]]]]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        return [
            (
                str(qa["question"]),
                str(paragraph["context"]),
                [(str(a["text"]), int(a["answer_start"])) for a in qa.get("answers", [])],
            )
            for article in data["data"]
            for paragraph in article["paragraphs"]
            for qa in paragraph["qas"]
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CompressionError(f"{file}: cannot be read as a SQuAD file: {error!r}") from error


def _example(
    tokenizer: TextTokenizer, question: str, text: str, answers: list[tuple[str, int]]
) -> Example:
    passage = tokenizer.tokenize(text)
    windows = tokenizer.windows(tokenizer.tokenize(question), passage)
    spans = []
    for answer, start in answers:
        first = int(np.searchsorted(passage.ends, start, side="right"))
        last = int(np.searchsorted(passage.starts, start + len(answer), side="left")) - 1
        if text.startswith(answer, start) and answer and first <= last:
            spans.append((first, last))
    chinese = sum(map(is_han, text)) * 4 > len(text)
    return Example(
        passage,
        text,
        tuple(dict.fromkeys(answer for answer, _ in answers)),
        tuple(dict.fromkeys(spans)),
        "zh" if chinese else "en",
        tuple(windows),
    )


def describe(examples: Sequence[Example]) -> dict[str, Any]:
    """How many questions, and of what."""
    tokens = [len(w.input_ids) for e in examples for w in e.windows]
    return {
        "questions": len(examples),
        "chinese": sum(example.language == "zh" for example in examples),
        "windows": len(tokens),
        "mean_tokens": round(sum(tokens) / len(tokens), 1),
    }
