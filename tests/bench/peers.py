"""`python -m tests.bench.peers MODEL`: transformers' own model on the same weights, as a child.

Eager, float32, on all cores, called from the process's main thread, with torch's and OpenMP's
own settings: as one calls it. Our layers run beside it for a comparison without any service.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from miaotui.models.stage import StageBatch, StageModel
from tests.bench.child import answer_lines

MAX_LENGTH, STRIDE = 384, 128  # the tokenizer service's defaults

Body = Mapping[str, str]
"""A question as it is sent over HTTP."""


def encode(tokenizer: Any, asked: Sequence[Body], *, padding: bool = True, **more: Any) -> Any:
    """Model inputs, windows where a passage is longer than one; padded to the longest."""
    return tokenizer(
        [body["question"] for body in asked],
        [body["context"] for body in asked],
        truncation="only_second",
        return_overflowing_tokens=True,
        padding=padding,
        max_length=MAX_LENGTH,
        stride=STRIDE,
        **more,
    )


class Transformers:
    """`AutoModelForQuestionAnswering` in this process."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._model: Any = AutoModelForQuestionAnswering.from_pretrained(
            directory, dtype=torch.float32
        ).eval()
        self._tokenizer: Any = AutoTokenizer.from_pretrained(directory)

    @cached_property
    def _stage(self) -> StageModel:
        return StageModel.load(self._directory, dtype="float32", device="cpu")

    def _encode(self, asked: Sequence[Body]) -> Any:
        encoded = encode(self._tokenizer, asked, return_tensors="pt")
        encoded.pop("overflow_to_sample_mapping")
        return encoded

    @torch.inference_mode()
    def _call(self, encoded: Any) -> float:
        started = time.perf_counter()
        self._model(**encoded)
        return time.perf_counter() - started

    def prepare(self, body: Body) -> int:
        """Tokenises the question that the next `call` and `stage` are about; its windows."""
        self._encoded = self._encode([body])
        return len(self._encoded["input_ids"])

    def call(self) -> float:
        """Seconds of one model call, without tokenisation."""
        return self._call(self._encoded)

    def stage(self) -> float:
        """Seconds of the same in Miaotui's layers, unsplit and in this process."""
        windows = self._encoded["attention_mask"].sum(1).tolist()
        real = self._encoded["attention_mask"].bool()
        ids, types = (self._encoded[name][real] for name in ("input_ids", "token_type_ids"))
        batch = StageBatch(windows, ids, types)
        stage = self._stage
        started = time.perf_counter()
        stage.run(batch)
        return time.perf_counter() - started

    def throughput(self, bodies: Sequence[Body], batch: int) -> float:
        """Questions a second in batches of neighbours in length, tokenisation included."""
        ordered = sorted(bodies, key=lambda body: len(body["context"]))
        started = time.perf_counter()
        for first in range(0, len(ordered), batch):
            self._call(self._encode(ordered[first : first + batch]))
        return len(ordered) / (time.perf_counter() - started)


if __name__ == "__main__":
    peer = Transformers(Path(sys.argv[1]))
    answer_lines(prepare=peer.prepare, call=peer.call, stage=peer.stage, throughput=peer.throughput)
