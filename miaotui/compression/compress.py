"""Compresses a model: the Python API behind `miaotui compress`."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from miaotui.compression import tasks
from miaotui.compression.errors import CompressionError
from miaotui.compression.methods import parse_method
from miaotui.compression.report import Report, write_report
from miaotui.compression.steps import Options, check
from miaotui.compression.sweep import Advance, Candidate, Tell, sweep
from miaotui.compression.tasks import Run
from miaotui.compression.workers import open_executor
from miaotui.compression.workspace import Workspace
from miaotui.models.checkpoint import CONFIG_FILE, weight_files

if TYPE_CHECKING:  # opacus is an extra
    from miaotui.training.dpsgd import PrivacyConfig


def compress_model(
    model_dir: Path | str,
    out_dir: Path | str,
    *,
    method: str = "int8",
    calibrate: Sequence[Path | str] = (),
    evaluate: Sequence[Path | str] = (),
    calibration_questions: int = 64,
    limit: int = 200,
    group_size: int = 32,
    second_order: bool = False,
    recover_steps: int = 0,
    recover_rate: float = 5e-5,
    seed: int = 0,
    private: Sequence[Path | str] = (),
    privacy: PrivacyConfig | None = None,
    recover_questions: int = 0,
    dask: str | None = None,
    tell: Tell = lambda text: None,
    advance: Advance = lambda done, total: None,
) -> Report:
    """Write a compressed checkpoint of an extractive model, and a report beside it.

    Args:
        model_dir: a Hugging Face directory that `StageModel` loads.
        out_dir: a new directory for the checkpoint; `compression.json`, `.txt` and `.svg` in it
            are the report.
        method: steps such as "int8" or "prune-heads=0.25,int8-static"; see `methods`.
        calibrate, evaluate, calibration_questions, limit, group_size, second_order,
        recover_steps, recover_rate, seed, private, privacy, recover_questions: see `Options`.
        dask: where the work runs, see `workers.open_executor`. "local" starts processes, so the
            caller's main module needs the usual `if __name__ == "__main__":`.
        tell: called with a line for each thing done.
        advance: called with the number of tasks done, and of all known so far.

    Raises:
        CompressionError: the method is unknown or does not fit, or `out_dir` is there already.
        UnsupportedModelError, CheckpointError: the model cannot be loaded.
    """
    options = Options(
        tuple(map(Path, calibrate)),
        tuple(map(Path, evaluate)),
        calibration_questions,
        limit,
        group_size,
        second_order,
        recover_steps,
        recover_rate,
        seed,
        tuple(map(Path, private)),
        privacy,
        recover_questions,
    )
    out = Path(out_dir)
    with tried(Path(model_dir), out, [method], options, dask, tell, advance) as (candidate,):
        if candidate.report is None:
            assert candidate.refused is not None
            raise candidate.refused
        write_report(candidate.report, candidate.directory)
        candidate.directory.rename(out)
    return candidate.report


@contextmanager
def tried(
    source: Path,
    out: Path,
    methods: Sequence[str],
    options: Options,
    dask: str | None,
    tell: Tell,
    advance: Advance,
) -> Iterator[list[Candidate]]:
    """Try methods; their checkpoints lie in a folder beside `out` until this is left."""
    for method in methods:
        check(parse_method(method), options)
    if out.exists():
        raise CompressionError(f"{out}: is there already; give a new directory")
    # Workers have another working directory.
    options = options.resolved()
    run = Run(uuid.uuid4().hex, source.resolve(), options)
    # Refuses what cannot be compressed before any worker is started.
    Workspace.open(run.source)
    parts = -(-len(tasks.examples(run)) // tasks.PART)
    reads = [run.source / CONFIG_FILE, *weight_files(run.source)]
    reads += [*options.calibrate, *options.evaluate, *options.private]
    folder = out.resolve().parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        made = tempfile.TemporaryDirectory(dir=folder, prefix=f".{out.name}-")
    except OSError as error:
        raise CompressionError(f"{out}: cannot be written: {error}") from error
    with made as name:
        most = len(methods) + parts + 1
        with open_executor(dask, most=most, reads=reads, writes=Path(name)) as executor:
            candidates = sweep(run, methods, Path(name), executor, tell, advance)
        yield candidates
