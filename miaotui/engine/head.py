"""Stage 0 as the head of a pipeline: queue, dispatch, results, and replay when it breaks."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from miaotui.engine.batch import Batch, DropCode, SequenceMeta, StageTiming
from miaotui.engine.order import SendOrder, Turn
from miaotui.engine.readiness import PipelineUnavailableError, Readiness
from miaotui.engine.scheduler import Job, Scheduler

log = logging.getLogger(__name__)

TokenIds = npt.NDArray[np.int32]
TokenTypes = npt.NDArray[np.uint8]
Logits = npt.NDArray[np.float32]


class DeadlineError(Exception):
    """The deadline passed before the result was there."""


class ComputeError(Exception):
    """A stage failed to compute; the message names it."""


@dataclass(slots=True)
class Inference:
    """A request's result."""

    logits: list[Logits]
    """A sequence each: float32 [tokens, 2], start and end logits; of an embedding model
    [1, hidden_size]."""
    timings: list[StageTiming]
    """Per stage, the slowest sequence's."""


@dataclass(slots=True)
class _Request:
    logits: list[Logits | None]
    done: asyncio.Future[None]
    timings: dict[int, StageTiming] = field(default_factory=dict)
    started: bool = False


@dataclass(slots=True)
class _Lane:
    """A way through one replica of each later stage, and what is on it."""

    running: dict[int, list[Job]] = field(default_factory=dict)
    order: SendOrder = field(default_factory=SendOrder)
    tokens: int = 0
    """Of the batches on it."""
    leaving: bool = False
    """Whether it takes nothing new."""


@dataclass(frozen=True)
class HeadSettings:
    """Bounds of the head."""

    max_in_flight: int
    """Batches on each lane at once; stages + 1 keeps every stage busy."""
    grace: float = 15.0
    """Seconds that requests wait for a broken pipeline to come back."""
    max_attempts: int = 3
    """How often a sequence is started before its request fails."""
    vectors: bool = False
    """Whether a sequence's result is one row, not one a token."""


class Head:
    """Holds requests from arrival to result. The event loop owns it; nothing here computes.

    `compute` runs a batch through stage 0; `send` passes it to stage 1 by way of the lane
    `batch.lane` (None where there is only one stage); both are called in the order of the
    batches, `send` of those of a lane. `cancel` tells the stages behind that nobody waits for
    some requests. A batch goes to the lane with the least work on it.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        settings: HeadSettings,
        *,
        compute: Callable[[Batch, Sequence[Job]], Awaitable[None]],
        send: Callable[[Batch], Awaitable[None]] | None,
        cancel: Callable[[Sequence[str]], None],
    ) -> None:
        self.scheduler = scheduler
        self.settings = settings
        self._compute = compute
        self._send = send
        self._cancel = cancel
        self._requests: dict[str, _Request] = {}
        self._lanes: dict[int, _Lane] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._batch_ids = itertools.count(1)
        self._request_ids = itertools.count(1)
        self._instance = secrets.token_hex(4)
        self._pipeline = Readiness(settings.grace, self._fail_all)

    @property
    def ready(self) -> bool:
        """Whether the pipeline is complete."""
        return self._pipeline.ready

    @property
    def queued(self) -> int:
        """Sequences that wait."""
        return len(self.scheduler)

    @property
    def running_sequences(self) -> int:
        """Sequences in the pipeline now."""
        return sum(len(jobs) for lane in self._lanes.values() for jobs in lane.running.values())

    @property
    def open_requests(self) -> int:
        """Requests that wait for their result."""
        return len(self._requests)

    async def infer(
        self,
        request_id: str,
        sequences: Sequence[tuple[TokenIds, TokenTypes | None]],
        *,
        deadline: float = math.inf,
        trace: Mapping[str, str] | None = None,
        salt: bytes = b"",
    ) -> Inference:
        """Computes a request's sequences; they may run in different batches.

        `deadline` on `time.monotonic()`. `salt`: see `Job`. Raises `QueueFullError`,
        `PipelineUnavailableError`, `DeadlineError` or `ComputeError`. Cancelling the call
        frees the work at every stage.
        """
        self._pipeline.check()
        # Callers may reuse their ids, and try again at another replica of this stage; the
        # pipeline's must be unique, or the one's cancellation would end the other's work.
        key = f"{request_id}#{self._instance}.{next(self._request_ids)}"
        jobs = [
            Job(SequenceMeta(key, index, len(ids), deadline, trace or {}), ids, types, salt)
            for index, (ids, types) in enumerate(sequences)
        ]
        self.scheduler.add(jobs)
        done = asyncio.get_running_loop().create_future()
        request = _Request(logits=[None] * len(jobs), done=done)
        self._requests[key] = request
        self._pump()
        try:
            timeout = None if math.isinf(deadline) else deadline - time.monotonic()
            async with asyncio.timeout(timeout):
                await done
        except TimeoutError as error:
            raise DeadlineError("the deadline passed before the pipeline had answered") from error
        finally:
            self._forget(key)
        logits = [item for item in request.logits if item is not None]
        return Inference(logits, [request.timings[stage] for stage in sorted(request.timings)])

    def complete(self, batch: Batch) -> None:
        """Takes a batch's results: `hidden` is float32 [tokens, 2], or [sequences, hidden_size]
        of a model that turns texts into vectors."""
        lane = self._lanes.get(batch.lane)
        jobs = None if lane is None else lane.running.pop(batch.batch_id, None)
        if lane is None or jobs is None:
            return  # of a lane that broke meanwhile: its sequences run again
        lane.tokens -= sum(job.meta.length for job in jobs)
        for dropped in batch.dropped:
            if dropped.code is DropCode.DEADLINE_EXCEEDED:
                self._fail(dropped.request_id, DeadlineError(dropped.message))
            elif dropped.code is DropCode.INTERNAL:
                self._fail(dropped.request_id, ComputeError(dropped.message))
        if batch.hidden is not None:
            logits = batch.hidden.numpy()
            begin = 0
            for meta in batch.sequences:
                rows = 1 if self.settings.vectors else meta.length
                self._store(meta, logits[begin : begin + rows], batch.timings)
                begin += rows
        self._pump()

    def pipeline_up(self, lane: int = 0) -> None:
        """A lane is complete: its stages are there and fit together."""
        self._lanes.setdefault(lane, _Lane())
        self._pipeline.up()
        self._pump()

    def pipeline_leaving(self, lane: int) -> None:
        """A lane takes no new batches."""
        if (leaving := self._lanes.get(lane)) is not None:
            leaving.leaving = True

    def in_flight(self, lane: int) -> int:
        """Batches on a lane."""
        return len(self._lanes[lane].running) if lane in self._lanes else 0

    def pipeline_down(self, reason: str, lane: int = 0) -> None:
        """A lane broke: what is on it will run again, on another or once one is back."""
        broken = self._lanes.pop(lane, None)
        if broken is None:
            if not self._lanes:
                self._pipeline.down(reason)
            return
        replay: list[Job] = []
        for jobs in broken.running.values():
            for job in jobs:
                request = self._requests.get(job.meta.request_id)
                if request is None or request.logits[job.meta.sequence] is not None:
                    continue
                job.attempts += 1
                if job.attempts >= self.settings.max_attempts:
                    error = PipelineUnavailableError(
                        f"the pipeline broke {job.attempts} times under this request: {reason}"
                    )
                    self._fail(job.meta.request_id, error)
                else:
                    replay.append(job)
        self.scheduler.put_back(replay)
        if replay:
            log.warning("%d sequences will run again: %s", len(replay), reason)
        if self._lanes:
            self._pump()
        else:
            self._pipeline.down(reason)

    async def drain(self, seconds: float) -> None:
        """Waits until nothing is open, for at most `seconds`."""
        if self._requests:
            await asyncio.wait([r.done for r in self._requests.values()], timeout=seconds)

    def _free_lane(self) -> int | None:
        """The lane with the least work that has room for a batch."""
        free = [
            (lane.tokens, number)
            for number, lane in self._lanes.items()
            if not lane.leaving and len(lane.running) < self.settings.max_in_flight
        ]
        return min(free)[1] if free else None

    def _pump(self) -> None:
        while self._pipeline.ready and (number := self._free_lane()) is not None:
            jobs = [job for job in self.scheduler.next_batch() if not self._overdue(job)]
            if not jobs:
                if not len(self.scheduler):
                    return
                continue
            lane = self._lanes[number]
            batch = Batch(next(self._batch_ids), [job.meta for job in jobs], lane=number)
            lane.running[batch.batch_id] = jobs
            lane.tokens += batch.tokens
            batch.in_flight = len(lane.running)
            task = asyncio.create_task(self._run(batch, jobs, lane, lane.order.next()))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _run(self, batch: Batch, jobs: list[Job], lane: _Lane, turn: Turn) -> None:
        """Computes a batch, and sends it in its turn."""
        with turn:
            if self._lanes.get(batch.lane) is not lane:
                return  # the lane broke before this turn of the loop
            # A batch set out alone leaves other cores idle; what joins it until it computes counts.
            batch.in_flight = max(batch.in_flight, len(lane.running))
            await self._compute(batch, jobs)
            await turn.comes()
            if self._lanes.get(batch.lane) is lane:  # otherwise it broke meanwhile
                await self._pass_on(batch, lane)

    async def _pass_on(self, batch: Batch, lane: _Lane) -> None:
        if self._send is None or not batch.sequences:
            self.complete(batch)
            return
        try:
            await self._send(batch)
        except ConnectionError as error:
            if self._lanes.get(batch.lane) is lane:
                self.pipeline_down(str(error), batch.lane)
        except Exception:
            # Its requests would wait for ever otherwise.
            log.exception("stage 0 could not send batch %d", batch.batch_id)
            batch.fail(DropCode.INTERNAL, "stage 0 failed to send a batch; see its log")
            self.complete(batch)

    def _overdue(self, job: Job) -> bool:
        if job.meta.request_id not in self._requests:
            return True
        if job.meta.expired():
            self._fail(
                job.meta.request_id, DeadlineError("the deadline passed while this was queued")
            )
            return True
        self._requests[job.meta.request_id].started = True
        return False

    def _store(self, meta: SequenceMeta, logits: Logits, timings: Sequence[StageTiming]) -> None:
        request = self._requests.get(meta.request_id)
        if request is None:
            return
        request.logits[meta.sequence] = logits
        for timing in timings:
            slowest = request.timings.get(timing.stage)
            if slowest is None or timing.queue + timing.compute > slowest.queue + slowest.compute:
                request.timings[timing.stage] = timing
        if all(item is not None for item in request.logits) and not request.done.done():
            request.done.set_result(None)

    def _fail(self, key: str, error: Exception) -> None:
        request = self._requests.get(key)
        if request is not None and not request.done.done():
            request.done.set_exception(error)

    def _fail_all(self) -> None:
        for key in list(self._requests):
            self._fail(key, PipelineUnavailableError(self._pipeline.reason))

    def _forget(self, key: str) -> None:
        """Frees what a request still holds, here and at the stages behind."""
        request = self._requests.pop(key)
        complete = all(item is not None for item in request.logits)
        if complete:
            return
        self.scheduler.remove(key)
        if request.started:
            self._cancel([key])
