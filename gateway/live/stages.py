"""Watches every stage of the models: whether it is there, and what it does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import grpc
from grpc import aio

from miaotui.v1 import shard_pb2 as pb
from miaotui.v1 import shard_pb2_grpc
from services.rpc.channel import open_channel
from services.rpc.tracing import UNSAMPLED

State: TypeAlias = Literal["serving", "starting", "unreachable"]

_LOOK_SECONDS = 1.0
# One late answer may be a busy machine's; the second look follows at once.
_LATE_LOOKS = 2
_SOON_SECONDS = 0.25
# Rates are taken over at least this long, so that one batch more or less does not show.
_RATE_SECONDS = 4.0


@dataclass(frozen=True, slots=True)
class Rates:
    """What a stage did of late; per second, but for the batch's size and the share."""

    batch_size: float | None
    batches: float
    tokens: float
    written: float
    busy: float


@dataclass(frozen=True, slots=True)
class _Sample:
    time: float
    told: pb.ShardServiceDescribeResponse


@dataclass(slots=True)
class WatchedStage:
    """One stage."""

    address: str
    channel: aio.Channel
    samples: list[_Sample] = field(default_factory=list)
    late: int = 0
    reached: bool = False
    """Whether it has ever answered under this address."""
    away: bool = False

    @property
    def told(self) -> pb.ShardServiceDescribeResponse | None:
        """What it said last; `None` where it is away."""
        return self.samples[-1].told if self.samples and not self.away else None

    def state(self, named: bool) -> State:
        """Whether it serves; `named`: stage 0 names it as a part of a ring that is whole."""
        told = self.told
        if told is not None:
            return "serving" if told.status == pb.STAGE_STATUS_SERVING else "starting"
        # Where a network lets the gateway reach stage 0 alone, the ring speaks for the rest.
        return "serving" if named and not self.reached else "unreachable"

    def rates(self) -> Rates | None:
        """What it does; `None` where it was not seen for long enough."""
        if self.away or len(self.samples) < 2:
            return None
        first, last = self.samples[0], self.samples[-1]
        seconds = last.time - first.time
        old, new = first.told, last.told
        if seconds <= 0:
            return None
        batches = new.batches_total - old.batches_total
        sequences = new.sequences_total - old.sequences_total
        busy = (new.compute_micros_total - old.compute_micros_total) / 1e6 / seconds
        return Rates(
            batch_size=sequences / batches if batches else None,
            batches=batches / seconds,
            tokens=(new.tokens_total - old.tokens_total) / seconds,
            written=(new.written_tokens_total - old.written_tokens_total) / seconds,
            # A batch counts when it is done, also what it took before the first look.
            busy=min(1.0, busy),
        )

    async def look(self) -> bool:
        """Asks the stage; returns whether to ask again soon."""
        stub = shard_pb2_grpc.ShardServiceStub(self.channel)
        request = pb.ShardServiceDescribeRequest()
        try:
            told = await stub.Describe(request, timeout=_LOOK_SECONDS, metadata=UNSAMPLED)
        except aio.AioRpcError as error:
            late = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            self.late = self.late + 1 if late else _LATE_LOOKS
            if self.late >= _LATE_LOOKS:
                self.away = True
                self.samples.clear()
            return self.late < _LATE_LOOKS
        self._take(_Sample(time.monotonic(), told))
        return False

    def _take(self, sample: _Sample) -> None:
        self.late, self.away, self.reached = 0, False, True
        if self.samples and sample.told.batches_total < self.samples[-1].told.batches_total:
            self.samples.clear()  # another process
        self.samples.append(sample)
        while len(self.samples) > 2 and sample.time - self.samples[1].time >= _RATE_SECONDS:
            del self.samples[0]


class StageWatch:
    """Looks at every stage again and again, at all of them at once."""

    def __init__(self, wanted: Callable[[], set[str]], poll_seconds: float) -> None:
        """`wanted`: the addresses of the stages known now."""
        self._wanted = wanted
        self._poll_seconds = poll_seconds
        self._stages: dict[str, WatchedStage] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to watch."""
        self._task = asyncio.create_task(self._poll())

    def stage(self, address: str) -> WatchedStage | None:
        """The stage under this address; `None` where it was not looked at yet."""
        return self._stages.get(address)

    async def _poll(self) -> None:
        while True:
            again = await self._look(self._wanted())
            await asyncio.sleep(_SOON_SECONDS if again else self._poll_seconds)

    async def _look(self, wanted: set[str]) -> bool:
        for address in wanted - self._stages.keys():
            self._stages[address] = WatchedStage(address, open_channel(address))
        for address in self._stages.keys() - wanted:
            await self._stages.pop(address).channel.close()
        # Each within its own deadline: one that hangs holds up no other.
        return any(await asyncio.gather(*(stage.look() for stage in self._stages.values())))

    async def close(self) -> None:
        """Stops watching."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        for stage in self._stages.values():
            await stage.channel.close()
