"""Makes, scores and times checkpoints of several methods, as tasks that run beside one another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from miaotui.compression import tasks
from miaotui.compression.errors import CompressionError
from miaotui.compression.evaluate import Marks, Measurement, Times, sizes
from miaotui.compression.questions import describe
from miaotui.compression.report import Report
from miaotui.compression.tasks import Made, Run

Tell = Callable[[str], None]
# Called with the number of tasks done, and of all known so far.
Advance = Callable[[int, int], None]


@dataclass
class Candidate:
    """A method, and what came of it: a checkpoint with its report, or a refusal."""

    method: str
    directory: Path
    report: Report | None = None
    refused: CompressionError | None = None


@dataclass
class _Work:
    """What is known of a checkpoint so far."""

    candidate: Candidate
    size: tuple[int, int] = (0, 0)
    made: Made | None = None
    marks: dict[int, Marks] = field(default_factory=dict)

    def measurement(self, times: Times) -> Measurement:
        marks = [self.marks[part] for part in sorted(self.marks)]
        return Measurement.of(self.size, marks, times)


def sweep(
    run: Run,
    methods: Sequence[str],
    folder: Path,
    executor: Executor,
    tell: Tell = lambda text: None,
    advance: Advance = lambda done, total: None,
) -> list[Candidate]:
    """Try methods; their checkpoints lie in `folder`, which all processes see.

    Scores do not depend on the executor. All times are taken at the end by one process, in
    turns: so what else ran meanwhile does not decide which is fastest.

    Raises:
        CompressionError: the questions cannot be read, or the model cannot be loaded.
    """
    examples = tasks.examples(run)
    parts = range(-(-len(examples) // tasks.PART))
    works = [_Work(Candidate(method, folder / str(n))) for n, method in enumerate(methods)]
    before = _Work(Candidate("uncompressed", run.source), sizes(run.source))
    queue = _Queue(executor, advance)
    analysis: dict[str, Any] = {}

    def score(work: _Work) -> None:
        for part in parts:
            queue.submit(
                partial(scored, work, part), tasks.score, run, work.candidate.directory, part
            )

    def scored(work: _Work, part: int, future: Future[Marks]) -> None:
        work.marks[part] = future.result()

    def made(work: _Work, future: Future[Made]) -> None:
        method = work.candidate.method
        try:
            work.made = future.result()
        except CompressionError as error:
            work.candidate.refused = error
            tell(f"{method}: {error}")
            return
        work.size = work.made.disk_bytes, work.made.memory_bytes
        tell(f"{method}: made in {work.made.cpu_seconds:.1f} CPU seconds")
        score(work)

    def analysed(future: Future[dict[str, Any]]) -> None:
        analysis.update(future.result())

    if run.options.calibrate:
        queue.submit(analysed, tasks.analyse, run)
    for work in works:
        queue.submit(
            partial(made, work), tasks.make, run, work.candidate.method, work.candidate.directory
        )
    score(before)
    queue.wait()
    usable = [work for work in works if work.made is not None]
    if not usable:
        return [work.candidate for work in works]
    timed = [before, *usable]
    if parts:
        tell(f"timing {len(timed)} checkpoints in turns …")
    times: list[Times] = []
    directories = [work.candidate.directory for work in timed]
    queue.submit(lambda future: times.extend(future.result()), tasks.clock, run, directories)
    queue.wait()
    measured = [work.measurement(its) for work, its in zip(timed, times, strict=True)]
    for work, after in zip(usable, measured[1:], strict=True):
        assert work.made is not None
        work.candidate.report = Report(
            model=run.source.name,
            method=work.candidate.method,
            settings=work.made.settings,
            before=measured[0],
            after=after,
            evaluated_on=describe(examples) if examples else None,
            threads=times[0].threads,
            cpu_seconds=work.made.cpu_seconds,
            details={**analysis, **work.made.details},
        )
    return [work.candidate for work in works]


class _Queue:
    """Tasks under way, and what to do when each is done."""

    def __init__(self, executor: Executor, advance: Advance) -> None:
        self._executor, self._advance = executor, advance
        self._waiting: dict[Future[Any], Callable[[Future[Any]], None]] = {}
        self._done = self._total = 0

    def submit(
        self, then: Callable[[Future[Any]], None], function: Callable[..., Any], *args: Any
    ) -> None:
        """Run a task, and then call `then` with its future, in this thread."""
        self._total += 1
        future = self._executor.submit(function, *args)
        self._waiting[future] = then
        if future.done():
            self._finish(future)

    def wait(self) -> None:
        """Until nothing is under way; what a task or a `then` raised is raised here."""
        while self._waiting:
            for future in wait(self._waiting, return_when=FIRST_COMPLETED).done:
                self._finish(future)

    def _finish(self, future: Future[Any]) -> None:
        self._waiting.pop(future)(future)
        self._done += 1
        self._advance(self._done, self._total)
