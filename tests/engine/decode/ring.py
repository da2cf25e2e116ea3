"""A pipeline of fake stages that check what they are sent, with a model that forgets nothing.

Each stage keeps a KV cache of slots in which a token and its position stand. What the model
knows of a text it reads through the block table alone, so that any mix-up of blocks, any
stale or missing token changes what is written; `reference` says what should be.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from miaotui.engine.batch import Batch, DropCode
from miaotui.engine.decode.head import GenerationHead
from miaotui.engine.decode.settings import GenerationSettings
from miaotui.engine.decode.types import (
    FinishReason,
    GenerationRequest,
    GenerationUpdate,
    SampledTokens,
    SequenceStart,
    TokenIds,
)

Model = Callable[[Sequence[int], int], int]
"""The token after these; the second argument is the seed."""


def ids(*values: int) -> TokenIds:
    return np.array(values, np.int32)


def chaos(vocabulary: int) -> Model:
    """Every token before it, and its place, decides the next."""

    def model(tokens: Sequence[int], seed: int) -> int:
        state = 17 + seed
        for token in tokens:
            state = (state * 6364136223846793005 + token + 1442695040888963407) % 2**64
        return (state >> 33) % vocabulary

    return model


def copying(period: int) -> Model:
    """Writes again what stood `period` tokens before."""
    return lambda tokens, _seed: tokens[-period] if len(tokens) >= period else tokens[-1]


def reference(
    model: Model, request: GenerationRequest, index: int, limit: int
) -> tuple[list[int], FinishReason]:
    """What text `index` of a request should be; `limit`: most tokens, the prompt's included."""
    tokens = request.prompt.tolist()
    most = len(tokens) + request.max_tokens if request.max_tokens else limit
    while len(tokens) < min(most, limit):
        tokens.append(model(tokens, request.sampling.seed + index))
        if tokens[-1] in request.stop_token_ids:
            return tokens[len(request.prompt) :], FinishReason.STOP
    return tokens[len(request.prompt) :], FinishReason.LENGTH


class FakeStage:
    """A stage's KV cache and order."""

    def __init__(self, blocks: int, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self.slots: list[tuple[int, int] | None] = [None] * (blocks * block_tokens)
        self.last_batch = 0
        self.histories: list[list[int]] = []

    def compute(self, batch: Batch, input_ids: Sequence[int], doubted: set[int]) -> None:
        """Reads each sequence's tokens before this batch, then writes the batch's.

        `doubted`: sequences of which an earlier batch failed; nothing good can come of them.
        """
        assert batch.batch_id > self.last_batch, "batches overtook one another"
        self.last_batch = batch.batch_id
        assert len(input_ids) == batch.tokens
        self.histories = []
        writes: dict[int, tuple[int, int]] = {}
        begin = 0
        for meta in batch.sequences:
            item = meta.decode
            assert item is not None
            size = self.block_tokens
            assert len(item.blocks) == -(-(item.start + meta.length) // size)
            assert len(set(item.blocks.tolist())) == len(item.blocks)
            table = item.blocks.tolist()
            history = []
            for position in range(item.start):
                slot = self.slots[table[position // size] * size + position % size]
                if item.sequence_id in doubted:
                    slot = (0, position)
                assert slot is not None, "reads a slot that was never written"
                assert slot[1] == position, "reads another position's slot"
                history.append(slot[0])
            own = input_ids[begin : begin + meta.length]
            begin += meta.length
            for position, token in enumerate(own, start=item.start):
                place = table[position // size] * size + position % size
                assert place not in writes, "two sequences of a batch write one slot"
                writes[place] = (token, position)
            self.histories.append([*history, *own])
            if len(item.draft):
                assert list(own)[-len(item.draft) :] == item.draft.tolist()
        for place, value in writes.items():
            self.slots[place] = value


@dataclass
class _Sampling:
    start: SequenceStart
    tokens: list[int]
    """What the sampler was told that the text is, as far as it was told."""


@dataclass
class Ring:
    """A head and its stages, each a task; `pause(stage, batch)` is awaited before a batch."""

    settings: GenerationSettings
    model: Model
    blocks: int
    block_tokens: int
    pause: Callable[[int, Batch], object] | None = None
    link: Callable[[], object] | None = None
    fail: Callable[[int, Batch], bool] = lambda _stage, _batch: False
    problems: list[str] = field(default_factory=list)
    batches: list[Batch] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.head = GenerationHead(
            self.settings,
            compute=self._compute,
            send=self._send if self.settings.stages > 1 else None,
        )
        self._samplers: dict[int, _Sampling] = {}
        self.ended: set[int] = set()
        self.doubted: set[int] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self._computing = asyncio.Lock()
        self.up()

    def up(self) -> None:
        """Starts all stages anew, with empty caches."""
        self.stages = [
            FakeStage(self.blocks, self.block_tokens) for _ in range(self.settings.stages)
        ]
        self._inboxes: list[asyncio.Queue[Batch]] = [
            asyncio.Queue() for _ in range(self.settings.stages + 1)
        ]
        for task in self._tasks:
            task.cancel()
        self._tasks = [
            asyncio.create_task(self._serve(index)) for index in range(1, self.settings.stages)
        ]
        if self.settings.stages > 1:
            self._tasks.append(asyncio.create_task(self._return()))
        self.head.pipeline_up(self.blocks, self.block_tokens)

    def down(self) -> None:
        """Cuts a link: what is in the stages behind is lost."""
        for task in self._tasks:
            task.cancel()
        self.head.pipeline_down("cut")

    def close(self) -> None:
        """Ends the stages' tasks."""
        for task in self._tasks:
            task.cancel()

    async def _wait(self, action: Callable[..., object] | None, *arguments: object) -> None:
        waiting = action(*arguments) if action is not None else None
        if asyncio.iscoroutine(waiting):
            await waiting

    async def _compute(self, batch: Batch, input_ids: TokenIds) -> None:
        self.batches.append(batch)
        stage = self.stages[0]
        async with self._computing:
            await self._wait(self.pause, 0, batch)
            batch.hidden = torch.from_numpy(input_ids.copy())[:, None]
            self._run(0, stage, batch)

    async def _send(self, batch: Batch) -> None:
        self._inboxes[1].put_nowait(batch)

    async def _serve(self, index: int) -> None:
        arrivals: asyncio.Queue[Batch] = asyncio.Queue()
        link = asyncio.create_task(self._link(self._inboxes[index], arrivals))
        stage, following = self.stages[index], self._inboxes[index + 1]
        try:
            while True:
                batch = await arrivals.get()
                await self._wait(self.pause, index, batch)
                self._run(index, stage, batch)
                following.put_nowait(batch)
        finally:
            link.cancel()

    async def _return(self) -> None:
        arrivals: asyncio.Queue[Batch] = asyncio.Queue()
        link = asyncio.create_task(self._link(self._inboxes[-1], arrivals))
        try:
            while True:
                self.head.complete(await arrivals.get())
        finally:
            link.cancel()

    async def _link(self, source: asyncio.Queue[Batch], target: asyncio.Queue[Batch]) -> None:
        """Delays, but does not hold up: many batches may be on their way."""
        order = asyncio.Lock()
        tasks: set[asyncio.Task[None]] = set()

        async def carry(batch: Batch) -> None:
            await self._wait(self.link)
            async with order:
                target.put_nowait(batch)

        if self.link is None:
            while True:
                target.put_nowait(await source.get())
        while True:
            task = asyncio.create_task(carry(await source.get()))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    def _run(self, index: int, stage: FakeStage, batch: Batch) -> None:
        last = index == self.settings.stages - 1
        if batch.sequences and self.fail(index, batch):
            self.doubted.update(m.decode.sequence_id for m in batch.sequences if m.decode)
            batch.fail(DropCode.INTERNAL, f"stage {index} failed to compute")
        if batch.sequences:
            assert batch.hidden is not None
            try:
                stage.compute(batch, batch.hidden[:, 0].tolist(), self.doubted)
                if last:
                    batch.sampled = self._sample(stage, batch)
            except AssertionError as error:
                self.problems.append(f"stage {index}, batch {batch.batch_id}: {error}")
                raise
        if last:
            batch.hidden = None
            for sequence_id in () if batch.dropped else batch.released:
                assert sequence_id not in self.ended, "released twice"
                self.ended.add(sequence_id)
                self._samplers.pop(sequence_id, None)

    def _sample(self, stage: FakeStage, batch: Batch) -> list[SampledTokens]:
        sampled = []
        for meta, history in zip(batch.sequences, stage.histories, strict=True):
            item = meta.decode
            assert item is not None
            assert item.sequence_id not in self.ended, "computes a sequence that has ended"
            if item.sequence_id in self.doubted:
                sampled.append(SampledTokens(item.sequence_id, ids(0)))
                continue
            if item.begin is not None:
                assert item.sequence_id not in self._samplers, "begins twice"
                self._samplers[item.sequence_id] = _Sampling(
                    item.begin, item.begin.written.tolist()
                )
            told = self._samplers[item.sequence_id]
            if not item.samples:
                continue
            assert item.samples == 1 + len(item.draft)
            written = told.tokens
            known = len(history) - len(item.draft)
            if written:
                assert history[:known][-len(written) :] == written
            seed = told.start.sampling.seed
            tokens: list[int] = []
            for place in range(item.samples):
                tokens.append(self.model(history[: known + place], seed))
                if place < len(item.draft) and tokens[-1] != item.draft[place]:
                    break
            written.extend(tokens)
            sampled.append(SampledTokens(item.sequence_id, ids(*tokens)))
        return sampled


@dataclass
class Listener:
    """Collects a request's news and checks their form."""

    texts: dict[int, list[int]] = field(default_factory=dict)
    reasons: dict[int, FinishReason] = field(default_factory=dict)
    updates: list[GenerationUpdate] = field(default_factory=list)
    error: Exception | None = None
    done: asyncio.Event = field(default_factory=asyncio.Event)

    def __call__(self, update: GenerationUpdate | Exception) -> None:
        assert not self.done.is_set(), "news after the end"
        if isinstance(update, Exception):
            self.error = update
            self.done.set()
            return
        self.updates.append(update)
        indices = [delta.index for delta in update.deltas]
        assert len(set(indices)) == len(indices)
        for delta in update.deltas:
            assert delta.index not in self.reasons, "a text grew after its end"
            self.texts.setdefault(delta.index, []).extend(delta.token_ids.tolist())
            if delta.finish_reason is not None:
                self.reasons[delta.index] = delta.finish_reason
        if update.usage is not None:
            self.done.set()


def settings(**values: Any) -> GenerationSettings:
    """Small bounds, so that few tokens reach them."""
    defaults: dict[str, Any] = {
        "stages": 1,
        "vocabulary": 50,
        "context": 200,
        "max_in_flight": int(values.get("stages", 1)) + 1,
        "batch_tokens": 64,
        "chunk_tokens": 16,
        "draft_tokens": 0,
        "grace": 5.0,
    }
    return GenerationSettings(**(defaults | values))


MODEL = chaos(50)


async def finish(*listeners: Listener) -> None:
    """Waits for all ends."""
    async with asyncio.timeout(60):
        for listener in listeners:
            await listener.done.wait()


async def turns(count: int) -> None:
    """Lets the loop turn so often."""
    for _ in range(count):
        await asyncio.sleep(0)


def check(ring: Ring) -> None:
    """Nothing is left behind."""
    assert not ring.problems
    assert ring.head.scheduler.idle
    assert ring.head.open_requests == ring.head.running_sequences == ring.head.queued == 0
    ring.close()


def is_reference(listener: Listener, request: GenerationRequest, limit: int = 200) -> bool:
    """Whether all texts are what `MODEL` writes."""
    return listener.error is None and all(
        (listener.texts[index], listener.reasons[index]) == reference(MODEL, request, index, limit)
        for index in range(request.n)
    )
