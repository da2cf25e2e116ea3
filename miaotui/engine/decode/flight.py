"""Batches on their way: what they carry, their order, and whether what comes back fits."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable

import numpy as np

from miaotui.engine.batch import Batch, DropCode, SequenceMeta
from miaotui.engine.decode.scheduler import Plan, Slice
from miaotui.engine.decode.sequence import NO_TOKENS
from miaotui.engine.decode.tables import BlockTables
from miaotui.engine.decode.types import DecodeSlice, SampledTokens, TokenIds
from miaotui.engine.order import SendOrder, Turn

log = logging.getLogger(__name__)


class Flights:
    """The batches in the pipeline. Stage 0 computes and sends them in the order planned."""

    def __init__(
        self,
        *,
        compute: Callable[[Batch, TokenIds], Awaitable[None]],
        send: Callable[[Batch], Awaitable[None]] | None,
        landed: Callable[[Batch], None],
        broke: Callable[[str], None],
    ) -> None:
        """`landed`: takes a batch that goes no further; `broke`: is told that a link has."""
        self.decoding = 0
        """Batches with `Plan.decodes`."""
        self._compute = compute
        self._send = send
        self._landed = landed
        self._broke = broke
        self._plans: dict[int, Plan] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._order = SendOrder()

    def __len__(self) -> int:
        return len(self._plans)

    def start(self, batch: Batch, input_ids: TokenIds, plan: Plan) -> None:
        """Sends a batch on its way."""
        self._plans[batch.batch_id] = plan
        self.decoding += plan.decodes
        batch.in_flight = len(self._plans)
        task = asyncio.create_task(self._run(batch, input_ids, self._order.next()))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def land(self, batch_id: int) -> Plan | None:
        """What was planned for a batch that is back; None: the pipeline broke meanwhile."""
        plan = self._plans.pop(batch_id, None)
        if plan is not None:
            self.decoding -= plan.decodes
        return plan

    def lose(self) -> None:
        """The pipeline broke: nothing will come back."""
        self._plans.clear()
        self.decoding = 0
        self._order.forget()

    async def _run(self, batch: Batch, input_ids: TokenIds, turn: Turn) -> None:
        with turn:
            if batch.batch_id not in self._plans:
                return  # the pipeline broke before this turn of the loop
            # A batch set out alone leaves other cores idle; what joins it meanwhile counts.
            batch.in_flight = max(batch.in_flight, len(self._plans))
            try:
                await self._compute(batch, input_ids)
            except Exception:
                # Its requests would wait for ever otherwise.
                log.exception("stage 0 could not compute batch %d", batch.batch_id)
                batch.fail(DropCode.INTERNAL, "stage 0 failed to compute; see its log")
            await turn.comes()
            if batch.batch_id not in self._plans:
                return  # the pipeline broke meanwhile
            if self._send is None or not batch.sequences:
                self._landed(batch)
                return
            try:
                await self._send(batch)
            except ConnectionError as error:
                if batch.batch_id in self._plans:
                    self._broke(str(error))
            except Exception:
                log.exception("stage 0 could not send batch %d", batch.batch_id)
                batch.fail(DropCode.INTERNAL, "stage 0 failed to send a batch; see its log")
                self._landed(batch)


def load(batch_id: int, plan: Plan, tables: BlockTables) -> tuple[Batch, TokenIds]:
    """A plan as a batch, and the tokens of its slices laid end to end, int32 [tokens]."""
    input_ids = np.empty(plan.tokens, np.int32)
    now = time.monotonic()
    begin = 0
    metas: list[SequenceMeta] = []
    for item in plan.slices:
        text = item.text
        end = begin + item.length
        known = end - len(item.draft)
        stop = item.start + item.length
        input_ids[begin:known] = text.tokens.view(item.start, stop - len(item.draft))
        input_ids[known:end] = item.draft
        tokens = input_ids[begin:end] if text.work.request.source is not None else NO_TOKENS
        begin = end
        metas.append(
            SequenceMeta(
                request_id=text.work.key,
                sequence=text.index,
                length=item.length,
                # Only stage 0 takes a sequence out: the others' KV blocks depend on it.
                deadline=math.inf,
                trace=text.work.trace,
                arrived=text.ready_since,
                decode=DecodeSlice(
                    sequence_id=item.sequence_id,
                    start=item.start,
                    blocks=text.table.view(0, tables.size(stop)),
                    samples=item.samples,
                    draft=item.draft,
                    begin=text.start() if item.first else None,
                    tokens=tokens,
                ),
            )
        )
        text.ready_since = now
    return Batch(batch_id, metas), input_ids


def fits(item: Slice, sampled: SampledTokens | None) -> bool:
    """Whether this is what the last stage may return for a slice."""
    if item.start != item.text.computed:
        return False  # Something before it is missing.
    if not item.samples:
        return True
    if sampled is None or not 1 <= len(sampled.token_ids) <= item.samples:
        return False
    accepted = len(sampled.token_ids) - 1
    return not accepted or np.array_equal(sampled.token_ids[:accepted], item.draft[:accepted])
