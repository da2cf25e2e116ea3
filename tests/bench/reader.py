"""The extractive pipeline in one process: a question over several passages, in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from miaotui.engine.spans import WindowLogits, read_spans
from miaotui.models.stage import StageBatch, StageModel
from miaotui.text.tokenizer import load_tokenizer
from miaotui.text.tokens import character_spans
from miaotui.text.windows import Window


@dataclass(frozen=True)
class Read:
    """The best span of one passage, and how much "no answer" is above it (a logit)."""

    start: int
    end: int
    logit: float
    no_answer_score: float


class Reader:
    """Holds the whole model."""

    def __init__(self, model: Path) -> None:
        self._tokenizer = load_tokenizer(model)
        self._stage = StageModel.load(model)
        self.thresholds = self._tokenizer.no_answer_thresholds

    def read(self, question: str, passages: Sequence[str]) -> list[Read]:
        """One reading a passage."""
        asked = self._tokenizer.tokenize(question)
        texts = [self._tokenizer.tokenize(passage) for passage in passages]
        windows = [self._tokenizer.windows(asked, text) for text in texts]
        flat = [window for of_passage in windows for window in of_passage]
        logits = iter(self._logits(flat))
        reads = []
        for text, of_passage in zip(texts, windows, strict=True):
            reading = read_spans(
                [
                    WindowLogits(
                        start=found[:, 0],
                        end=found[:, 1],
                        passage_position=window.passage_position,
                        passage_first=window.passage_first,
                        passage_tokens=window.passage_tokens,
                    )
                    for window, found in zip(of_passage, logits, strict=False)
                ]
            )
            best = reading.spans[0]
            starts, ends = character_spans(
                text, np.array([best.first], np.int32), np.array([best.last], np.int32)
            )
            reads.append(Read(int(starts[0]), int(ends[0]), best.logit, reading.no_answer_score))
        return reads

    def _logits(self, windows: Sequence[Window]) -> list[npt.NDArray[np.float32]]:
        lengths = [len(window.input_ids) for window in windows]
        ids = torch.from_numpy(np.concatenate([w.input_ids for w in windows]))
        types = None
        if windows[0].token_type_ids is not None:
            types = torch.from_numpy(np.concatenate([w.token_type_ids for w in windows]))
        output = self._stage.run(StageBatch(lengths, input_ids=ids, token_type_ids=types))
        return np.split(output.numpy(), np.cumsum(lengths)[:-1])
