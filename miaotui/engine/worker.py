"""The thread that owns a stage's model, and the bounded queue before it."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from miaotui.engine.threads import available_cores, threads_for

log = logging.getLogger(__name__)

# A stage that rehearses while the request is at another one takes cores from it.
_QUIET_SECONDS = 0.5


class QueueFullError(Exception):
    """The worker's queue is full: nothing was done, try again later."""


class WorkerClosedError(Exception):
    """The worker is shutting down and takes nothing new."""


class Model(Protocol):
    """What a worker computes with: a stage that `miaotui.models.loading` loads."""

    def run(self, batch: Any, /) -> Any:
        """Return the stage's output for a batch of the model's kind."""
        ...


@dataclass(frozen=True, slots=True)
class Computed:
    """A batch's output and when it was computed.

    `output` is what the model's `run` returned. `submitted`, `started` and `finished` are
    readings of `time.monotonic()` in seconds: between the first two the batch waited, between
    the last two it was computed, on `threads` cores.
    """

    output: Any
    submitted: float
    started: float
    finished: float
    threads: int


@dataclass(frozen=True, slots=True)
class _Job:
    batch: Any
    in_flight: int
    future: Future[Computed]
    submitted: float


def stay_on_one_thread() -> None:
    """Keeps the calling thread's torch operations on it: only compute threads share cores.

    Call it before any compute thread starts; `openmp_environment` says what it is for.
    """
    torch.set_num_threads(1)
    # At its first use of torch, a thread takes the number that was set last by any: now.
    torch.get_num_threads()


class ComputeWorker:
    """Computes batches one after another on a thread of its own, in the order submitted.

    The thread is the only one that touches the model, so an event loop never computes; torch
    releases the GIL while it does. Every batch says how many are in the pipeline, from which
    follows how many cores it may use (see `threads_for`).

    Thread-safe. `submit` must not be called from a future's callback.
    """

    def __init__(
        self,
        model: Model,
        *,
        capacity: int = 64,
        colocated_stages: int = 1,
        cores: int | None = None,
        prepare: Callable[[], object] | None = None,
        rehearse: Callable[[], Iterator[object]] | None = None,
        name: str = "compute",
    ) -> None:
        """Start the thread.

        Args:
            model: from now on this worker's alone.
            capacity: batches that may wait, besides the one being computed.
            colocated_stages: stages on this machine, this one included.
            cores: cores that they share; None: those that this process may use.
            prepare: called once on the thread, before the first batch; `StageModel.warm_up`
                here spares the first request the set-up of threads and kernels.
            rehearse: more of that, in steps; made once for every number of threads that a
                batch may get, and advanced on the thread while nothing has come for a while.
            name: the thread's name, for debuggers and profilers.

        Raises:
            ValueError: a number is below 1.
        """
        cores = available_cores() if cores is None else cores
        if min(capacity, colocated_stages, cores) < 1:
            raise ValueError(
                f"capacity {capacity}, colocated_stages {colocated_stages} and cores {cores} "
                "must be at least 1"
            )
        self.capacity = capacity
        self.colocated_stages = colocated_stages
        self.cores = cores
        self._model = model
        self._prepare = prepare
        self._rehearsal = None if rehearse is None else self._rehearse(rehearse)
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._busy = False
        self._last = time.monotonic()
        # A daemon, so that a batch that never ends cannot keep a process from exiting.
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)
        self._thread.start()

    def submit(self, batch: Any, *, in_flight: int = 1) -> Future[Computed]:
        """Queue a batch and return its future, without blocking.

        The future's callbacks run on the worker's thread and must be brief; an asyncio
        service uses `asyncio.wrap_future`. Cancelling the future before its turn drops the
        batch; one that is being computed runs to its end. An error of the model's becomes
        the future's.

        Args:
            batch: the stage's input, as the model's `run` takes it.
            in_flight: batches in the pipeline now, this one included.

        Raises:
            QueueFullError: `capacity` batches are waiting.
            WorkerClosedError: `close` has been called.
        """
        job = _Job(batch, in_flight, Future(), time.monotonic())
        with self._changed:
            if self._closed:
                raise WorkerClosedError("the compute worker is shutting down")
            if len(self._jobs) >= self.capacity:
                # What was cancelled keeps its place only until someone needs it.
                self._jobs = deque(job for job in self._jobs if not job.future.cancelled())
            if len(self._jobs) >= self.capacity:
                raise QueueFullError(
                    f"{self.capacity} batches are waiting to be computed; try again later"
                )
            self._jobs.append(job)
            self._changed.notify()
        return job.future

    @property
    def waiting(self) -> int:
        """Batches that wait for their turn; cancelled ones are not counted."""
        with self._changed:
            return sum(not job.future.cancelled() for job in self._jobs)

    @property
    def busy(self) -> bool:
        """Whether a batch is being computed."""
        return self._busy

    def close(self, *, drain: bool = False, timeout: float | None = 30.0) -> bool:
        """Take nothing new, and wait until the thread has ended.

        Args:
            drain: compute what waits; otherwise its futures are cancelled.
            timeout: longest wait in seconds; None: no limit.

        Returns:
            Whether the thread has ended.
        """
        with self._changed:
            self._closed = True
            dropped = [] if drain else list(self._jobs)
            if not drain:
                self._jobs.clear()
            self._changed.notify()
        for job in dropped:
            job.future.cancel()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _loop(self) -> None:
        if self._prepare is not None:
            try:
                torch.set_num_threads(threads_for(1, self.colocated_stages, self.cores))
                self._prepare()
            except Exception:
                # Not fatal here: a batch that hits the same trouble reports it to its caller.
                log.exception("the compute thread could not warm up")
        while True:
            while self._rehearsal is not None and self._quiet():
                if next(self._rehearsal, None) is None:
                    self._rehearsal = None
            if (job := self._next()) is None:
                return
            if job.future.set_running_or_notify_cancel():
                self._compute(job)
            # The tensors are the caller's: this thread must not keep them alive while idle.
            del job
            self._last = time.monotonic()

    def _rehearse(self, rehearse: Callable[[], Iterator[object]]) -> Iterator[bool]:
        """Yield True after each step. Fewer threads come last: a lone batch has most."""
        shares = {
            threads_for(n, self.colocated_stages, self.cores)
            for n in range(1, 1 + self.colocated_stages)
        }
        try:
            for threads in sorted(shares, reverse=True):
                steps = rehearse()
                while True:
                    # Batches in between may have got another number.
                    self._use(threads)
                    try:
                        next(steps)
                    except StopIteration:
                        break
                    yield True
        except Exception:
            log.exception("the compute thread could not rehearse")

    def _quiet(self) -> bool:
        """Whether nothing has come for so long that this machine's other stages rest, too."""
        with self._changed:
            self._busy = False
            left = self._last + _QUIET_SECONDS - time.monotonic()
            return not self._changed.wait_for(lambda: self._jobs or self._closed, max(left, 0))

    def _next(self) -> _Job | None:
        with self._changed:
            self._busy = False
            while not self._jobs:
                if self._closed:
                    return None
                self._changed.wait()
            self._busy = True
            return self._jobs.popleft()

    def _compute(self, job: _Job) -> None:
        started = time.monotonic()
        threads = threads_for(job.in_flight, self.colocated_stages, self.cores)
        try:
            self._use(threads)
            output = self._model.run(job.batch)
        except Exception as error:  # noqa: BLE001 - whoever waits for the batch gets it
            job.future.set_exception(error)
            return
        job.future.set_result(Computed(output, job.submitted, started, time.monotonic(), threads))

    @staticmethod
    def _use(threads: int) -> None:
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)
