"""What a compression consists of, as functions that any process that sees the files can run.

They take and return plain data, and write checkpoints to a folder that all processes share.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from miaotui.compression.errors import CompressionError
from miaotui.compression.evaluate import Marks, Times, answer, clock_checkpoints, sizes
from miaotui.compression.methods import parse_method
from miaotui.compression.questions import Example, Labelled, read_examples
from miaotui.compression.steps import (
    Options,
    PrivateRecovery,
    apply_step,
    calibration_batches,
    layer_sensitivities,
)
from miaotui.compression.workspace import Workspace
from miaotui.models.fingerprint import model_fingerprint
from miaotui.models.stage import StageModel
from miaotui.text.tokenizer import load_tokenizer

# Questions scored by one task: fixed, so that batches, and with them the last digits of logits,
# do not depend on the number of workers.
PART = 64

# A worker with several threads: torch computes on all its own threads already, and what is kept
# below is the process's.
_one_at_a_time = threading.Lock()


@dataclass(frozen=True)
class Run:
    """One call of `compress_model` or `compress_within`.

    `key` is unique: what a worker keeps of one run must not serve another, whose files may have
    changed. Paths are absolute.
    """

    key: str
    source: Path = field(compare=False)
    options: Options = field(compare=False)


@dataclass(frozen=True)
class Made:
    """A checkpoint that was written, and what its making is reported with."""

    settings: dict[str, Any]
    details: dict[str, Any]
    cpu_seconds: float
    disk_bytes: int
    memory_bytes: int


def analyse(run: Run) -> dict[str, Any]:
    """How much each layer of the uncompressed model matters, for the report."""
    with _one_at_a_time:
        workspace = Workspace.open(run.source)
        return layer_sensitivities(workspace, _calibration(run), run.options)


def make(run: Run, method: str, out: Path) -> Made:
    """Write the checkpoint that a method makes, in the place of any that is there.

    Raises:
        CompressionError: the method does not fit the model, or the run is over.
    """
    with _one_at_a_time:
        started = time.process_time()
        steps = parse_method(method)
        workspace = Workspace.open(run.source)
        batches = _calibration(run)
        taking = [step for step in steps if step.takes_away]
        trains = taking or any(step.rounds_coarsely for step in steps)
        private = None
        if run.options.private:
            tokenizer = load_tokenizer(run.source)
            private = PrivateRecovery.of(tokenizer, len(taking), run.options)
        recovering = None
        if trains and run.options.recover_steps and private is None:
            recovering = _labelled(run, run.options.recover_questions or None)
        details = {
            str(step): apply_step(workspace, step, batches, run.options, private, recovering)
            for step in steps
        }
        settings: dict[str, Any] = {
            "method": method,
            "calibration_questions": run.options.calibration_questions if batches else 0,
            "group_size": run.options.group_size,
            "second_order": run.options.second_order,
            "recover_steps": run.options.recover_steps if trains else 0,
            "recover_rate": run.options.recover_rate,
            "recover_questions": run.options.recover_questions,
            "source_fingerprint": model_fingerprint(run.source),
        }
        if private is not None:
            settings["privacy"] = private.steps.spent.model_dump()
        if not out.parent.is_dir():
            raise CompressionError(f"{out.parent}: is gone; the run was stopped")
        # Left by a worker that was lost before it could say that it was done.
        shutil.rmtree(out, ignore_errors=True)
        workspace.save(out, [str(step) for step in steps], settings)
        return Made(settings, details, round(time.process_time() - started, 1), *sizes(out))


def score(run: Run, directory: Path, part: int) -> Marks:
    """The marks of a checkpoint on the `part`-th 64 questions."""
    with _one_at_a_time:
        chosen = examples(run)[part * PART : (part + 1) * PART]
        return answer(_stage(run.key, directory), chosen)


def clock(run: Run, directories: Sequence[Path]) -> list[Times]:
    """Time checkpoints against one another, in one process."""
    with _one_at_a_time:
        return clock_checkpoints(directories, examples(run))


@lru_cache(maxsize=1)
def examples(run: Run) -> tuple[Example, ...]:
    """The questions that a run evaluates on; none where it does not.

    Raises:
        CompressionError: a file cannot be read, or has no question.
    """
    files, options = run.options.evaluate, run.options
    if not files:
        return ()
    tokenizer = load_tokenizer(run.source)
    return tuple(read_examples(files, tokenizer, limit=options.limit, seed=options.seed))


@lru_cache(maxsize=2)  # to calibrate and to recover on
def _labelled(run: Run, limit: int | None) -> tuple[Labelled, ...]:
    """At most `limit` questions of each file; None: as many as are calibrated on."""
    return tuple(calibration_batches(load_tokenizer(run.source), run.options, limit))


def _calibration(run: Run) -> tuple[Labelled, ...]:
    return _labelled(run, None)


@lru_cache(maxsize=1)
def _stage(key: str, directory: Path) -> StageModel:
    return StageModel.load(directory, device="cpu")


def forget() -> None:
    """Let go of what this process keeps of the last run."""
    for kept in (examples, _labelled, _stage):
        kept.cache_clear()
