"""Measures a checkpoint as a stage computes it: answers, time, size."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from miaotui.compression.questions import BATCH_TOKENS, Example, stage_batch
from miaotui.engine.spans import WindowLogits, read_spans
from miaotui.models.checkpoint import weight_files
from miaotui.models.stage import StageBatch, StageModel
from miaotui.text.tokens import character_spans
from miaotui.text.windows import Window
from miaotui.training.predict import LONGEST_ANSWER
from miaotui.training.scorer import best_scores

_TIMED = 8  # batches
_SINGLE = 12  # questions asked one by one for the latency
_ROUNDS = 3


@dataclass(frozen=True)
class Measurement:
    """Of one checkpoint, unsplit, in one process.

    `em`, `f1` in per cent over `questions`, those of Chinese by characters; None where nothing was
    evaluated. Throughput in batches of 1,024 tokens sorted by length; CPU times are of all
    threads (user and system), and do not count what else runs on the machine.
    """

    disk_bytes: int
    memory_bytes: int
    questions: int = 0
    em: float | None = None
    f1: float | None = None
    latency_ms: float | None = None
    cpu_ms_single: float | None = None
    cpu_ms_question: float | None = None
    questions_per_second: float | None = None
    questions_per_cpu_second: float | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def of(cls, size: tuple[int, int], marks: Sequence[Marks], times: Times) -> Measurement:
        """Put together what was found of a checkpoint: sizes, marks of parts, times."""
        asked, answerable = (sum(getattr(m, n) for m in marks) for n in ("asked", "answerable"))
        em, f1 = (
            round(sum(getattr(m, n) for m in marks) / answerable * 100, 2) if answerable else None
            for n in ("em", "f1")
        )
        return cls(
            *size,
            questions=asked,
            em=em,
            f1=f1,
            latency_ms=times.latency_ms,
            cpu_ms_single=times.cpu_ms_single,
            cpu_ms_question=times.cpu_ms_question,
            questions_per_second=times.questions_per_second,
            questions_per_cpu_second=times.questions_per_cpu_second,
        )


@dataclass(frozen=True)
class Marks:
    """Sums over questions: `em` and `f1`, each 0 to 1, of the `answerable` ones."""

    asked: int
    answerable: int
    em: float
    f1: float


@dataclass(frozen=True)
class Times:
    """As in `Measurement`; None where there was nothing to compute. `threads` of torch."""

    threads: int
    latency_ms: float | None = None
    cpu_ms_single: float | None = None
    cpu_ms_question: float | None = None
    questions_per_second: float | None = None
    questions_per_cpu_second: float | None = None


def sizes(directory: Path) -> tuple[int, int]:
    """A checkpoint's bytes on disk, and of its parameters once loaded as a stage loads them.

    Raises:
        UnsupportedModelError, CheckpointError: as for `StageModel.load`.
    """
    stage = StageModel.load(directory, device="cpu")
    disk = sum(file.stat().st_size for file in weight_files(directory))
    return disk, stage.info.model_parameter_bytes


def answer(stage: StageModel, examples: Sequence[Example]) -> Marks:
    """Ask a whole model questions, and mark its answers."""
    found: list[list[tuple[Window, np.ndarray[Any, Any]]]] = [[] for _ in examples]
    for batch in _batches(_sorted_windows(examples)):
        for (number, window), logits in zip(batch, _run(stage, batch), strict=True):
            found[number].append((window, logits))
    marks = [
        best_scores(_answer(example, logits), example.answers, example.language)
        for example, logits in zip(examples, found, strict=True)
        if example.answers
    ]
    em, f1 = (float(sum(mark[i] for mark in marks)) for i in (0, 1))
    return Marks(len(examples), len(marks), em, f1)


def clock_checkpoints(directories: Sequence[Path], examples: Sequence[Example]) -> list[Times]:
    """Time checkpoints in turns, so that what else the machine does falls on all of them alike.

    One is loaded at a time.
    """
    threads = torch.get_num_threads()
    if not examples:
        return [Times(threads)] * len(directories)
    windows = _sorted_windows(examples)
    batches = _batches(windows)
    chosen = batches[:: max(1, len(batches) // _TIMED)]
    single = [stage_batch(example.windows[:1]) for example in examples[:_SINGLE]]
    share = len(windows) / len(examples)  # windows a question
    rounds: list[list[_Round]] = [[] for _ in directories]
    for _ in range(_ROUNDS):
        for directory, its in zip(directories, rounds, strict=True):
            its.append(_round(directory, chosen, single))
    return [_times(its, share, threads) for its in rounds]


@dataclass(frozen=True, slots=True)
class _Round:
    """Seconds: wall and CPU a window in batches; wall of each single window, CPU of one."""

    wall: float
    cpu: float
    singles: list[float]
    cpu_single: float


def _round(
    directory: Path,
    batches: Sequence[Sequence[tuple[int, Window]]],
    single: Sequence[StageBatch],
) -> _Round:
    stage = StageModel.load(directory, device="cpu")
    _run(stage, batches[len(batches) // 2])
    started, started_cpu = time.perf_counter(), time.process_time()
    for batch in batches:
        _run(stage, batch)
    count = sum(map(len, batches))
    wall = (time.perf_counter() - started) / count
    cpu = (time.process_time() - started_cpu) / count
    for one in single:  # kernels for these lengths are made here
        stage.run(one)
    singles = []
    started_cpu = time.process_time()
    for one in single:
        started = time.perf_counter()
        stage.run(one)
        singles.append(time.perf_counter() - started)
    return _Round(wall, cpu, singles, (time.process_time() - started_cpu) / len(single))


def _times(rounds: Sequence[_Round], share: float, threads: int) -> Times:
    """The least of the rounds; of single windows' wall times the median."""
    wall, cpu = (min(getattr(r, n) for r in rounds) * share for n in ("wall", "cpu"))
    latency = statistics.median(value for r in rounds for value in r.singles)
    return Times(
        threads=threads,
        latency_ms=round(latency * 1e3, 2),
        cpu_ms_single=round(min(r.cpu_single for r in rounds) * 1e3, 2),
        cpu_ms_question=round(cpu * 1e3, 2),
        questions_per_second=round(1 / wall, 2),
        questions_per_cpu_second=round(1 / cpu, 2),
    )


def _sorted_windows(examples: Sequence[Example]) -> list[tuple[int, Window]]:
    windows = [(n, window) for n, example in enumerate(examples) for window in example.windows]
    return sorted(windows, key=lambda item: len(item[1].input_ids))


def _batches(windows: Sequence[tuple[int, Window]]) -> list[list[tuple[int, Window]]]:
    batches: list[list[tuple[int, Window]]] = [[]]
    for item in windows:
        tokens = sum(len(w.input_ids) for _, w in batches[-1]) + len(item[1].input_ids)
        if batches[-1] and tokens > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(item)
    return batches


def _run(stage: StageModel, batch: Sequence[tuple[int, Window]]) -> list[np.ndarray[Any, Any]]:
    made = stage_batch([window for _, window in batch])
    output = stage.run(made).numpy()
    return np.split(output, np.cumsum(made.lengths)[:-1])


def _answer(example: Example, logits: Sequence[tuple[Window, np.ndarray[Any, Any]]]) -> str:
    reading = read_spans(
        [
            WindowLogits(
                start=np.ascontiguousarray(values[:, 0]),
                end=np.ascontiguousarray(values[:, 1]),
                passage_position=window.passage_position,
                passage_first=window.passage_first,
                passage_tokens=window.passage_tokens,
            )
            for window, values in logits
        ],
        max_answer_length=LONGEST_ANSWER[example.language],
    )
    best = reading.spans[0]
    starts, ends = character_spans(
        example.passage, np.array([best.first], np.int32), np.array([best.last], np.int32)
    )
    return example.text[int(starts[0]) : int(ends[0])]
