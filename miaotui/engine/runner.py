"""One stage's way with a batch: prune, compute, report."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from miaotui.engine.batch import Batch, CancelledSet, DropCode, StageTiming, drop_unwanted
from miaotui.engine.decode.share import KvShare
from miaotui.engine.decode.types import DecodeSlice, TokenIds
from miaotui.engine.observe import StageObserver
from miaotui.engine.scheduler import Job
from miaotui.engine.worker import Computed, ComputeWorker
from miaotui.models.errors import BatchError
from miaotui.models.stage import StageBatch
from miaotui.models.writing_stage import DecoderBatch

log = logging.getLogger(__name__)


class Passages(Protocol):
    """Where replicas of stage 0 share what they have computed of passages."""

    async def find(self, inputs: StageBatch, /) -> Mapping[bytes, torch.Tensor] | None:
        """Return what it has of a batch's passages, as `StageBatch.found`. Never raises.

        None where there was nothing to look for.
        """
        ...


class StageRunner:
    """Computes batches on the worker's thread, in the order in which the calls are entered.

    With `passages`, those of stage 0's batches are looked for first, on the event loop: the
    compute thread does not wait for a network, and batches that find theirs may overtake.
    """

    def __init__(
        self, worker: ComputeWorker, *, stage: int, passages: Passages | None = None
    ) -> None:
        self.stage = stage
        self._passages = passages
        self.observer = StageObserver(stage)
        self._worker = worker
        self._share = KvShare()

    async def compute(
        self, batch: Batch, cancelled: CancelledSet, jobs: Sequence[Job] | None = None
    ) -> None:
        """Replaces `batch.hidden` by this stage's output; `jobs`: stage 0's token ids.

        Never raises for the batch's sake: sequences that are not computed are dropped with
        the reason.
        """
        if jobs is None:
            self._prune(batch, cancelled)
        if batch.sequences:
            inputs = _stage_batch(batch, jobs)
            if jobs is not None and self._passages is not None:
                began = time.monotonic()
                found = await self._passages.find(inputs)
                if found is not None:
                    self.observer.looked(batch, began, time.monotonic(), len(found))
                inputs = replace(inputs, found=found)
            batch.hidden = await self._run(batch, inputs)

    async def decode(
        self, batch: Batch, input_ids: TokenIds | None = None, share: KvShare | None = None
    ) -> None:
        """As `compute`, of a decoder: `batch.hidden`, or at the last stage `batch.sampled`.

        `input_ids`: stage 0's, int32 [tokens]. `share`: the lane's part of the KV cache; None:
        all of it. Nothing is dropped from such a batch, because the KV cache must hold the same
        at every stage: it is computed or fails as a whole.
        """
        share = self._share if share is None else share
        batch.released = share.settle(batch.released)
        if batch.sequences:
            output = await self._run(batch, _decoder_batch(batch, input_ids, share))
            if isinstance(output, list):
                batch.hidden, batch.sampled = None, share.sampled(output)
            else:
                batch.hidden = output
        if not batch.sequences:
            # Of a batch that was not computed here or before: the next one's to report.
            share.owe(batch.released)
            batch.released = []

    async def _run(self, batch: Batch, inputs: StageBatch | DecoderBatch) -> Any:
        """The model's output; None where it failed, and the batch with it."""
        try:
            done = await asyncio.wrap_future(self._worker.submit(inputs, in_flight=batch.in_flight))
        except asyncio.CancelledError:
            raise
        except BatchError as error:
            # What another stage sent does not fit; its numbers are all that the message has.
            log.error("stage %d refuses batch %d: %s", self.stage, batch.batch_id, error)
            batch.fail(DropCode.INTERNAL, f"stage {self.stage} refuses the batch; see its log")
            return None
        except Exception as error:
            # The message may quote tensors' contents; its type and the log's trace do not.
            log.exception("stage %d could not compute batch %d", self.stage, batch.batch_id)
            message = f"stage {self.stage} failed to compute ({type(error).__name__}); see its log"
            batch.fail(DropCode.INTERNAL, message)
            return None
        waited = max(done.started - meta.arrived for meta in batch.sequences)
        batch.timings.append(
            StageTiming(
                stage=self.stage,
                queue=waited,
                compute=done.finished - done.started,
                sequences=len(batch.sequences),
                tokens=batch.tokens,
            )
        )
        # Once the batch is on its way: what is reported keeps a lone request waiting otherwise.
        asyncio.get_running_loop().call_soon(self._report, batch, done)
        return done.output

    def _report(self, batch: Batch, done: Computed) -> None:
        try:
            self.observer.computed(batch, done.started, done.finished)
        except Exception:
            log.exception("stage %d could not report batch %d", self.stage, batch.batch_id)

    def _prune(self, batch: Batch, cancelled: CancelledSet) -> None:
        known = len(batch.dropped)
        drop_unwanted(batch, cancelled)
        for code, count in Counter(d.code.name.lower() for d in batch.dropped[known:]).items():
            self.observer.dropped(code, count)

    def close(self) -> None:
        """Stops the compute thread."""
        self._worker.close()


def _stage_batch(batch: Batch, jobs: Sequence[Job] | None) -> StageBatch:
    lengths = batch.lengths
    if jobs is None:
        return StageBatch(lengths, hidden=batch.hidden)
    ids = torch.from_numpy(np.concatenate([job.input_ids for job in jobs]))
    salts = [job.salt for job in jobs]
    if all(job.token_type_ids is None for job in jobs):
        return StageBatch(lengths, input_ids=ids, salts=salts)
    types = torch.from_numpy(np.concatenate([_token_types(job) for job in jobs]))
    return StageBatch(lengths, input_ids=ids, token_type_ids=types, salts=salts)


def _token_types(job: Job) -> npt.NDArray[np.uint8]:
    if job.token_type_ids is None:
        return np.zeros(job.meta.length, np.uint8)
    return job.token_type_ids


def _decoder_batch(batch: Batch, input_ids: TokenIds | None, share: KvShare) -> DecoderBatch:
    ids = None if input_ids is None else torch.from_numpy(input_ids)
    released = share.released(batch.released)
    return DecoderBatch(batch.lengths, share.slices(_slices(batch)), ids, batch.hidden, released)


def _slices(batch: Batch) -> list[DecodeSlice]:
    slices = [meta.decode for meta in batch.sequences if meta.decode is not None]
    if len(slices) != len(batch.sequences):
        raise ValueError("a decoder's batch with a sequence that has no place in it")
    return slices
