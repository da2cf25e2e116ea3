"""Batches leave every stage in the order in which they came, whatever each of them takes."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Coroutine, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from miaotui.engine.batch import Batch, CancelledSet, SequenceMeta
from miaotui.engine.decode.share import KvShare
from miaotui.engine.decode.types import DecodeSlice, SampledTokens
from miaotui.engine.head import Head, HeadSettings
from miaotui.engine.runner import StageRunner
from miaotui.engine.scheduler import Job, Scheduler
from miaotui.engine.worker import ComputeWorker
from miaotui.v1 import shard_pb2 as pb
from miaotui.v1 import tensor_pb2
from services.shard.codec import Frame
from services.shard.convert import batch_to_frame
from services.shard.lane import Lane
from services.shard.link import LinkClock, _Connection
from services.shard.stage import Stage

BATCHES = 40


class Unsteady:
    """A model whose batches take any time, and some of which fail."""

    def __init__(self) -> None:
        self.computed: list[int] = []
        self.released: list[int] = []
        self._chance = random.Random(5)

    def run(self, batch: Any) -> torch.Tensor:
        self.computed.append(batch.slices[0].sequence_id)
        time.sleep(self._chance.random() * 0.004)
        if batch.slices[0].sequence_id % 7 == 3:
            raise ValueError("this one fails")
        self.released += batch.released
        hidden: torch.Tensor = batch.hidden
        return hidden


class Answers:
    async def credit(self, batch_id: int) -> None:
        await asyncio.sleep(0)


class Call:
    """The stream to the next stage; a write takes any time."""

    def __init__(self) -> None:
        self.written: list[int] = []
        self._chance = random.Random(6)

    async def write(self, data: bytes) -> None:
        await asyncio.sleep(self._chance.random() * 0.003)
        self.written.append(pb.ForwardRequest.FromString(data).batch.batch_id)


def _batch(number: int, *, failed: bool = False) -> Batch:
    if failed:  # at a stage before
        return Batch(number, [], released=[])
    item = DecodeSlice(number, 0, np.zeros(1, np.int32), 1)
    metas = [SequenceMeta(f"r{number}", 0, 1, decode=item)]
    return Batch(number, metas, torch.zeros(1, 2), released=[1000 + number])


async def test_a_stage_passes_on_in_the_order_of_arrival(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Unsteady()
    runner = StageRunner(ComputeWorker(model, cores=1), stage=1)
    info = pb.StageInfo(
        index=1, stages=3, kind=pb.MODEL_KIND_GENERATIVE, wire_dtype=tensor_pb2.DTYPE_FLOAT32
    )

    async def changed(_: bool) -> None:
        return

    stage = Stage(
        info,
        runner,
        stages=[["nowhere:1"], ["nowhere:2"], ["nowhere:3"]],
        shares=1,
        wire_dtype="float32",
        inbox_batches=BATCHES,
        part_bytes=1 << 20,
        stall_seconds=30,
        status_changed=changed,
    )
    answers: Any = Answers()
    lane = Lane(
        stage,
        "lane",
        (info,),
        KvShare(),
        answers,
        target="nowhere:3",
        hello=pb.Hello(),
        inbox_batches=BATCHES,
        part_bytes=1 << 20,
        clock=LinkClock(),
    )
    call: Any = Call()
    connection = _Connection(call, 1, LinkClock())

    async def send(frame: Frame) -> None:
        await connection.send(frame, 1 << 20)

    monkeypatch.setattr(lane.link, "send", send)
    # There is nothing to compute for these, so that they are done at once.
    failed = range(5, BATCHES, 5)
    for number in range(1, BATCHES + 1):
        lane._inbox.put_nowait(_batch(number, failed=number in failed))
    consumer = asyncio.create_task(lane._work())
    async with asyncio.timeout(60):
        while len(call.written) < BATCHES:
            await asyncio.sleep(0.002)
            connection.credit()
    consumer.cancel()
    runner.close()
    expected = list(range(1, BATCHES + 1))
    assert model.computed == [number for number in expected if number not in failed]
    assert call.written == expected
    # What a batch that fails here was to release, one behind it does.
    last = max(number for number in model.computed if number % 7 == 3)
    assert set(model.released) >= {1000 + number for number in model.computed if number != last}
    assert len(model.released) == len(set(model.released))


async def test_who_waits_for_room_is_not_overtaken() -> None:
    call: Any = Call()
    connection = _Connection(call, 1, LinkClock())

    def sending(number: int) -> Coroutine[Any, Any, None]:
        frame = batch_to_frame(_batch(number), "float32", results=False)
        return connection.send(frame, 1 << 20)

    async with asyncio.timeout(60):
        await sending(1)
        waiting = [asyncio.create_task(sending(number)) for number in (2, 3)]
        await asyncio.sleep(0.01)
        for number in range(4, 10):
            # This one runs before those that wait notice that there is room.
            waiting.append(asyncio.create_task(sending(number)))
            connection.credit()
            await asyncio.sleep(0.005)
        while not all(task.done() for task in waiting):
            connection.credit()
            await asyncio.sleep(0.001)
    assert call.written == list(range(1, 10))


async def test_the_head_sends_in_the_order_of_its_batches() -> None:
    chance = random.Random(7)
    sent: list[int] = []

    async def compute(batch: Batch, jobs: Sequence[Job]) -> None:
        await asyncio.sleep(chance.random() * 0.01)

    async def send(batch: Batch) -> None:
        await asyncio.sleep(chance.random() * 0.002)
        sent.append(batch.batch_id)
        batch.hidden = torch.zeros(batch.tokens, 2)
        asyncio.get_running_loop().call_soon(head.complete, batch)

    scheduler = Scheduler(
        stages=1, batch_tokens=1, min_batch_tokens=1, max_sequences=100, max_tokens=100
    )
    head = Head(
        scheduler,
        HeadSettings(max_in_flight=8),
        compute=compute,
        send=send,
        cancel=lambda _: None,
    )
    head.pipeline_up()
    ids = np.ones(1, np.int32)
    async with asyncio.timeout(60):
        await asyncio.gather(*(head.infer("r", [(ids, None)]) for _ in range(BATCHES)))
    assert sent == list(range(1, BATCHES + 1))


async def test_a_decoder_keeps_what_was_cancelled_or_is_late() -> None:
    class Last:
        def run(self, batch: Any) -> list[SampledTokens]:
            return [SampledTokens(item.sequence_id, item.blocks) for item in batch.slices]

    runner = StageRunner(ComputeWorker(Last(), cores=1), stage=0)
    cancelled = CancelledSet()
    cancelled.add("r1")
    batch = _batch(1)
    batch.sequences[0].deadline = 0.0
    await runner.decode(batch)
    runner.close()
    assert batch.sampled is not None
    assert [item.sequence_id for item in batch.sampled] == [1]
    assert not batch.dropped
