"""`python -m tests.bench.answering ENGINE MODEL KEPT`: questions to answers by a bare engine.

All engines share the tokenisation, batches of windows of like length, and the product's own
reading of spans, so that only the computation differs.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from miaotui.engine.spans import WindowLogits, read_spans
from tests.bench.child import answer_lines
from tests.bench.engines import INPUTS, Batch, Engine, load
from tests.bench.peers import Body, encode

AGREEING = 0.9  # of the answers; int8 graphs differ in a few


class Answerer:
    """Questions to answers by one engine."""

    def __init__(self, engine: str, directory: Path, kept: Path, threads: int = 0) -> None:
        self._tokenizer: Any = AutoTokenizer.from_pretrained(directory)
        self._ways = load(engine, directory, kept, threads)
        self._engine: Engine = next(iter(self._ways.values()))

    def tune(self, bodies: Sequence[Body], batch: int) -> str:
        """Keeps the fastest way of running the engine on these questions; its name.

        A way whose answers are not nearly all those of the first does not count: an exporter
        may have taken a condition for a constant.
        """
        rates: dict[str, float] = {}
        first: list[str] = []
        for way, engine in self._ways.items():
            self._engine = engine
            texts = self.answers(bodies, batch)  # warms it up
            first = first or texts
            if sum(map(str.__eq__, texts, first)) < AGREEING * len(texts):
                print(f"{way}: left out, its answers are others", file=sys.stderr)
                continue
            began = time.perf_counter()
            self.answers(bodies, batch)
            rates[way] = len(bodies) / (time.perf_counter() - began)
        best = max(rates, key=rates.__getitem__)
        self._engine = self._ways[best]
        self._ways = {best: self._engine}
        return best

    def answers(self, bodies: Sequence[Body], batch: int) -> list[str]:
        """The best span's text of each question; `batch` windows of like length at a time."""
        encoded = encode(self._tokenizer, bodies, padding=False)
        rows = encoded[INPUTS[0]]
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
        parts = [order[first : first + batch] for first in range(0, len(order), batch)]
        outputs = self._engine([self._padded(encoded, part) for part in parts])
        best: list[tuple[float, str]] = [(-np.inf, "")] * len(bodies)
        for part, (starts, ends) in zip(parts, outputs, strict=True):
            for row, start, end in zip(part, starts, ends, strict=True):
                owner = encoded["overflow_to_sample_mapping"][row]
                position = encoded[INPUTS[2]][row].index(1)
                size = len(rows[row])
                window = WindowLogits(start[:size], end[:size], position, 0, size - 1 - position)
                span = read_spans([window]).spans[0]
                if span.logit > best[owner][0]:
                    low = encoded.token_to_chars(row, position + span.first).start
                    high = encoded.token_to_chars(row, position + span.last).end
                    best[owner] = span.logit, bodies[owner]["context"][low:high]
        return [text for _, text in best]

    def _padded(self, encoded: Any, rows: Sequence[int]) -> Batch:
        longest = max(len(encoded[INPUTS[0]][row]) for row in rows)
        ids, mask, types = (np.zeros((len(rows), longest), np.int64) for _ in INPUTS)
        ids[:] = self._tokenizer.pad_token_id
        for place, row in enumerate(rows):
            size = len(encoded[INPUTS[0]][row])
            ids[place, :size] = encoded[INPUTS[0]][row]
            mask[place, :size] = 1
            types[place, :size] = encoded[INPUTS[2]][row]
        return ids, mask, types


class _Lazy:
    """Loads with the first call, so that what fails is told to the parent."""

    answerer: Answerer

    def tune(self, bodies: Sequence[Body], batch: int) -> dict[str, str]:
        """{"way": …}, or {"error": …} where the engine cannot be loaded or run."""
        try:
            self.answerer = Answerer(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
            return {"way": self.answerer.tune(bodies, batch)}
        except Exception as error:  # noqa: BLE001 - whatever an engine raises, it is left out
            lines = str(error).strip().splitlines()
            return {"error": f"{type(error).__name__}: {lines[0] if lines else ''}"}

    def answers(self, bodies: Sequence[Body], batch: int) -> list[str]:
        """As `Answerer.answers`."""
        return self.answerer.answers(bodies, batch)


if __name__ == "__main__":
    lazy = _Lazy()
    answer_lines(tune=lazy.tune, answers=lazy.answers)
