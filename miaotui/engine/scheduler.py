"""Which waiting sequences run next: batches by a token budget, first come, first served.

Iteration-level batching after Orca (Yu et al., OSDI 2022): a batch is formed when a slot of
the pipeline falls free, from what waits at that moment; nothing sleeps to fill a batch.
Micro-batches as in GPipe (Huang et al., 2019): what waits is spread over the free slots, so
that every stage has work.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from miaotui.engine.batch import SequenceMeta


class QueueFullError(Exception):
    """The queue holds as much as it may; nothing was taken, try again later."""


@dataclass(slots=True)
class Job:
    """A sequence to be computed."""

    meta: SequenceMeta
    input_ids: npt.NDArray[np.int32]
    """int32 [tokens]."""
    token_type_ids: npt.NDArray[np.uint8] | None
    """uint8 [tokens], or None where all are 0."""
    salt: bytes = b""
    """Only sequences of equal salt share what was computed of their passages."""
    attempts: int = 0
    """How often it was started before; a pipeline that breaks costs one."""


class Scheduler:
    """The queue of stage 0. Not thread-safe: the event loop owns it."""

    def __init__(
        self,
        *,
        stages: int,
        batch_tokens: int,
        min_batch_tokens: int,
        max_sequences: int,
        max_tokens: int,
    ) -> None:
        """`batch_tokens`: at most so many tokens a batch (one longer sequence runs alone).

        `min_batch_tokens`: smaller batches are not split further to feed more stages.
        `max_sequences`, `max_tokens`: bounds of the queue.
        """
        self.stages = stages
        self.batch_tokens = batch_tokens
        self.min_batch_tokens = min(min_batch_tokens, batch_tokens)
        self.max_sequences = max_sequences
        self.max_tokens = max_tokens
        self._queue: deque[Job] = deque()
        self._tokens = 0

    def __len__(self) -> int:
        return len(self._queue)

    def __iter__(self) -> Iterator[Job]:
        return iter(self._queue)

    @property
    def tokens(self) -> int:
        """Tokens that wait."""
        return self._tokens

    def add(self, jobs: list[Job]) -> None:
        """Queues all of a request's jobs, or none: then `QueueFullError`."""
        tokens = sum(job.meta.length for job in jobs)
        if len(self._queue) + len(jobs) > self.max_sequences or (
            # A single huge request may still run on an idle stage.
            self._queue and self._tokens + tokens > self.max_tokens
        ):
            raise QueueFullError(
                f"the queue holds {len(self._queue)} sequences ({self._tokens} tokens) and takes "
                f"{self.max_sequences} ({self.max_tokens} tokens) at most; try again later"
            )
        self._queue.extend(jobs)
        self._tokens += tokens

    def put_back(self, jobs: list[Job]) -> None:
        """Puts jobs that were running in front, in their old order, whatever the bounds."""
        self._queue.extendleft(reversed(jobs))
        self._tokens += sum(job.meta.length for job in jobs)

    def remove(self, request_id: str) -> list[Job]:
        """Takes a request's waiting jobs out."""
        removed = [job for job in self._queue if job.meta.request_id == request_id]
        if removed:
            self._queue = deque(j for j in self._queue if j.meta.request_id != request_id)
            self._tokens -= sum(job.meta.length for job in removed)
        return removed

    def next_batch(self) -> list[Job]:
        """The next micro-batch; empty where nothing waits.

        What waits is cut into as many batches as there are stages, between the two bounds of
        a batch's size, so that a burst keeps all stages busy at once.
        """
        share = math.ceil(self._tokens / self.stages)
        budget = max(self.min_batch_tokens, min(self.batch_tokens, share))
        batch: list[Job] = []
        used = 0
        while self._queue:
            length = self._queue[0].meta.length
            if batch and used + length > budget:
                break
            batch.append(self._queue.popleft())
            used += length
        self._tokens -= used
        return batch
