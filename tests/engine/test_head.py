"""The head of the pipeline with stages that are played by the test: bounds, replay, cancel."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miaotui.engine.batch import Batch, CancelledSet, DropCode, SequenceMeta, drop_unwanted
from miaotui.engine.head import (
    ComputeError,
    DeadlineError,
    Head,
    HeadSettings,
)
from miaotui.engine.readiness import PipelineUnavailableError
from miaotui.engine.scheduler import Job, QueueFullError, Scheduler


def _scheduler(**bounds: int) -> Scheduler:
    defaults = {
        "stages": 2,
        "batch_tokens": 100,
        "min_batch_tokens": 20,
        "max_sequences": 1000,
        "max_tokens": 100_000,
    }
    return Scheduler(**(defaults | bounds))


def _ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


class Ring:
    """Later stages, by hand: what the head sent is in `sent` until `answer` takes it."""

    def __init__(self, head_settings: HeadSettings, scheduler: Scheduler | None = None) -> None:
        self.sent: list[Batch] = []
        self.cancelled: list[str] = []
        self.broken = False
        self.fault: Exception = ConnectionError("cut")
        self.head = Head(
            _scheduler() if scheduler is None else scheduler,
            head_settings,
            compute=self._compute,
            send=self._send,
            cancel=self.cancelled.extend,
        )

    async def _compute(self, batch: Batch, jobs: Sequence[Job]) -> None:
        ids = np.concatenate([job.input_ids for job in jobs])
        batch.hidden = torch.from_numpy(ids).to(torch.float32)[:, None].repeat(1, 2)

    async def _send(self, batch: Batch) -> None:
        if self.broken:
            raise self.fault
        self.sent.append(batch)

    def answer(self) -> None:
        """Returns everything as it was sent: logits equal the token ids."""
        sent, self.sent = self.sent, []
        for batch in sent:
            self.head.complete(batch)


async def _settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_results_find_their_requests_in_any_order() -> None:
    ring = Ring(HeadSettings(max_in_flight=10), _scheduler(batch_tokens=3, min_batch_tokens=1))
    ring.head.pipeline_up()
    calls = [
        asyncio.create_task(ring.head.infer("same-id", [(_ids(n, n + 1), None), (_ids(n), None)]))
        for n in range(4)
    ]
    await _settle()
    ring.sent.reverse()
    while ring.sent:
        ring.answer()
        await _settle()
    for n, call in enumerate(calls):
        result = await call
        assert result.logits[0][:, 0].tolist() == [n, n + 1]
        assert result.logits[1][:, 1].tolist() == [n]
    assert ring.head.open_requests == 0
    assert ring.head.running_sequences == 0


async def test_no_more_batches_are_in_flight_than_allowed() -> None:
    ring = Ring(HeadSettings(max_in_flight=3), _scheduler(batch_tokens=1, min_batch_tokens=1))
    ring.head.pipeline_up()
    calls = [asyncio.create_task(ring.head.infer("r", [(_ids(n), None)])) for n in range(10)]
    await _settle()
    assert len(ring.sent) == 3
    assert len(ring.head.scheduler) == 7
    while not all(call.done() for call in calls):
        ring.answer()
        await _settle()
        assert len(ring.sent) <= 3


async def test_a_full_queue_refuses_all_of_a_request() -> None:
    ring = Ring(HeadSettings(max_in_flight=1), _scheduler(max_sequences=2))
    ring.head.pipeline_up()
    running = asyncio.create_task(ring.head.infer("r", [(_ids(1), None)]))
    await _settle()
    waiting = asyncio.create_task(ring.head.infer("r", [(_ids(1), None)]))
    await _settle()
    with pytest.raises(QueueFullError, match="try again later"):
        await ring.head.infer("r", [(_ids(1), None)] * 2)
    assert len(ring.head.scheduler) == 1
    while ring.sent:
        ring.answer()
        await _settle()
    await asyncio.gather(running, waiting)


async def test_cancelling_frees_queue_and_pipeline() -> None:
    ring = Ring(HeadSettings(max_in_flight=1), _scheduler(batch_tokens=1, min_batch_tokens=1))
    ring.head.pipeline_up()
    call = asyncio.create_task(ring.head.infer("r", [(_ids(1), None), (_ids(2), None)]))
    await _settle()
    assert len(ring.head.scheduler) == 1
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert len(ring.head.scheduler) == 0
    assert ring.cancelled == [ring.sent[0].sequences[0].request_id]
    ring.answer()
    assert ring.head.running_sequences == 0


async def test_a_broken_pipeline_runs_its_sequences_again() -> None:
    ring = Ring(HeadSettings(max_in_flight=3))
    ring.head.pipeline_up()
    call = asyncio.create_task(ring.head.infer("r", [(_ids(5), None)]))
    await _settle()
    lost = ring.sent.pop()
    ring.head.pipeline_down("stage 1 is gone")
    ring.head.complete(lost)  # too late: of the pipeline that broke
    await _settle()
    assert not call.done()
    ring.head.pipeline_up()
    await _settle()
    ring.answer()
    assert (await call).logits[0][:, 0].tolist() == [5]


async def test_a_failing_send_counts_as_a_break() -> None:
    ring = Ring(HeadSettings(max_in_flight=3))
    ring.broken = True
    ring.head.pipeline_up()
    call = asyncio.create_task(ring.head.infer("r", [(_ids(5), None)]))
    await _settle()
    assert not ring.head.ready
    ring.broken = False
    ring.head.pipeline_up()
    await _settle()
    ring.answer()
    assert (await call).logits[0][:, 0].tolist() == [5]


async def test_a_batch_that_cannot_be_sent_fails_its_requests() -> None:
    ring = Ring(HeadSettings(max_in_flight=3))
    ring.broken, ring.fault = True, ValueError("a defect")
    ring.head.pipeline_up()
    with pytest.raises(ComputeError, match="failed to send"):
        await ring.head.infer("r", [(_ids(5), None)])
    assert ring.head.ready
    assert ring.head.running_sequences == 0


async def test_a_pipeline_that_breaks_again_and_again_fails_the_request() -> None:
    ring = Ring(HeadSettings(max_in_flight=3, max_attempts=2))
    call = asyncio.create_task(_infer_when_up(ring))
    await _settle()
    for _ in range(2):
        ring.head.pipeline_up()
        await _settle()
        ring.head.pipeline_down("cut")
    with pytest.raises(PipelineUnavailableError, match="broke 2 times"):
        await call


async def _infer_when_up(ring: Ring) -> None:
    ring.head.pipeline_up()
    ring.head.pipeline_down("not yet")
    await ring.head.infer("r", [(_ids(5), None)])


async def test_a_pipeline_that_stays_away_fails_what_waits() -> None:
    ring = Ring(HeadSettings(max_in_flight=3, grace=0.05))
    with pytest.raises(PipelineUnavailableError, match="not been verified"):
        await ring.head.infer("r", [(_ids(5), None)])
    ring.head.pipeline_up()
    call = asyncio.create_task(ring.head.infer("r", [(_ids(5), None)]))
    await _settle()
    ring.head.pipeline_down("stage 1 is gone")
    with pytest.raises(PipelineUnavailableError, match="stage 1 is gone"):
        await call
    assert len(ring.head.scheduler) == 0


async def test_deadlines_end_waiting_and_queued_work() -> None:
    ring = Ring(HeadSettings(max_in_flight=1))
    ring.head.pipeline_up()
    soon = time.monotonic() + 0.3
    running = asyncio.create_task(ring.head.infer("r", [(_ids(1), None)], deadline=soon))
    queued = asyncio.create_task(ring.head.infer("r", [(_ids(2), None)], deadline=soon))
    for call in (running, queued):
        with pytest.raises(DeadlineError):
            await call
    assert len(ring.head.scheduler) == 0
    assert len(ring.cancelled) == 1
    ring.answer()
    await _settle()
    assert ring.head.running_sequences == 0


async def test_what_a_stage_could_not_compute_fails_only_its_request() -> None:
    ring = Ring(HeadSettings(max_in_flight=3))
    ring.head.pipeline_up()
    bad = asyncio.create_task(ring.head.infer("bad", [(_ids(1), None)]))
    await _settle()
    good = asyncio.create_task(ring.head.infer("good", [(_ids(2), None)]))
    await _settle()
    ring.sent[0].fail(DropCode.INTERNAL, "stage 1 failed to compute")
    ring.answer()
    with pytest.raises(ComputeError, match="stage 1"):
        await bad
    assert (await good).logits[0][:, 0].tolist() == [2]


def test_dropping_takes_the_rows_out() -> None:
    metas = [SequenceMeta("a", 0, 2), SequenceMeta("b", 0, 1), SequenceMeta("c", 0, 3, deadline=0)]
    batch = Batch(1, metas, torch.arange(6.0)[:, None])
    cancelled = CancelledSet()
    cancelled.add("a")
    drop_unwanted(batch, cancelled)
    assert batch.hidden is not None
    assert batch.hidden[:, 0].tolist() == [2]
    assert [(d.request_id, d.code) for d in batch.dropped] == [
        ("a", DropCode.CANCELLED),
        ("c", DropCode.DEADLINE_EXCEEDED),
    ]
    cancelled.add("b")
    drop_unwanted(batch, cancelled)
    assert batch.hidden is None
    assert batch.tokens == 0


@given(st.lists(st.integers(1, 60), max_size=40), st.integers(1, 5), st.integers(1, 80))
def test_batches_keep_order_and_budget(lengths: list[int], stages: int, budget: int) -> None:
    scheduler = _scheduler(stages=stages, batch_tokens=budget, min_batch_tokens=10)
    jobs = [Job(SequenceMeta(str(i), 0, n), _ids(*range(n)), None) for i, n in enumerate(lengths)]
    scheduler.add(jobs)
    seen: list[Job] = []
    while batch := scheduler.next_batch():
        tokens = sum(job.meta.length for job in batch)
        assert tokens <= budget or len(batch) == 1
        seen += batch
    assert seen == jobs
    assert scheduler.tokens == 0


def test_a_burst_is_spread_over_the_stages() -> None:
    scheduler = _scheduler(stages=3, batch_tokens=1000, min_batch_tokens=10)
    scheduler.add([Job(SequenceMeta(str(i), 0, 30), _ids(*range(30)), None) for i in range(9)])
    assert len(scheduler.next_batch()) == 3


async def test_a_call_given_up_at_one_replica_does_not_end_its_next_try_at_another() -> None:
    """Replicas of stage 0 share the stages behind, and a caller who tries again keeps its id."""
    first, second = (Ring(HeadSettings(max_in_flight=3)) for _ in range(2))
    behind = CancelledSet()
    for ring in (first, second):
        ring.head.pipeline_up()
    given_up = asyncio.create_task(first.head.infer("one-id", [(_ids(1), None)]))
    await _settle()
    given_up.cancel()
    await _settle()
    for request_id in first.cancelled:
        behind.add(request_id)
    again = asyncio.create_task(second.head.infer("one-id", [(_ids(2), None)]))
    await _settle()
    for batch in (*first.sent, *second.sent):
        drop_unwanted(batch, behind)
    assert [len(batch.sequences) for batch in (*first.sent, *second.sent)] == [0, 1]
    second.answer()
    assert (await again).logits[0][:, 0].tolist() == [2]
