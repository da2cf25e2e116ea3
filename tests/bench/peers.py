"""The peer in this process: transformers' own model, eager, on the same weights."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from tests.bench.questions import Question


class Transformers:
    """`AutoModelForQuestionAnswering` in float32 on all cores."""

    def __init__(self, directory: Path, max_length: int, stride: int) -> None:
        self.model: Any = AutoModelForQuestionAnswering.from_pretrained(
            directory, dtype=torch.float32
        ).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(directory)
        self._room = {"max_length": max_length, "stride": stride}

    def encode(self, asked: Sequence[Question]) -> Any:
        """Model inputs, padded to the longest; windows where a passage is longer than one."""
        encoded = self.tokenizer(
            [q.question for q in asked],
            [q.context for q in asked],
            truncation="only_second",
            return_overflowing_tokens=True,
            padding=True,
            return_tensors="pt",
            **self._room,
        )
        encoded.pop("overflow_to_sample_mapping")
        return encoded

    @torch.inference_mode()
    def call(self, encoded: Any) -> float:
        """Seconds of one model call."""
        started = time.perf_counter()
        self.model(**encoded)
        return time.perf_counter() - started

    def throughput(self, asked: Sequence[Question], batch: int) -> float:
        """Questions a second in batches of neighbours in length, tokenisation included."""
        ordered = sorted(asked, key=lambda q: len(q.context))
        started = time.perf_counter()
        for first in range(0, len(ordered), batch):
            self.call(self.encode(ordered[first : first + batch]))
        return len(ordered) / (time.perf_counter() - started)
