"""What a lane leads through, as stage 0 knows it: replicas of the later stages."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from miaotui.engine.decode.share import KvShare
from miaotui.v1 import shard_pb2 as pb
from services.rpc.breaker import CircuitBreaker
from services.shard.link import Chain, Link


@dataclass(eq=False, slots=True)
class Replica:
    """A replica of a later stage, as this stage 0 knows it."""

    stage: int
    address: str
    breaker: CircuitBreaker = field(default_factory=CircuitBreaker)
    reason: str = ""
    """Why it has no work; empty where nothing is wrong."""
    refused: str = ""
    """Why it does not fit; empty where it does."""
    draining: bool = False
    told: pb.ShardServiceDescribeResponse | None = None
    """What it last told of itself."""

    @property
    def usable(self) -> bool:
        """Whether a lane may lead through it."""
        return not self.draining and self.breaker.state != "open"

    def is_at(self, address: str) -> bool:
        """Whether this is its host:port: as it was found, or as it calls itself.

        Where DNS leads to several replicas, they are found by their IP addresses.
        """
        told = self.told
        return address == self.address or (told is not None and address == told.stage.address)

    def view(self, lanes: int) -> pb.StageReplica:
        """What is told of it to who asks; `lanes`: how many that are up lead through it."""
        status, reason = pb.STAGE_STATUS_WAITING, self.reason
        if self.draining:
            status = pb.STAGE_STATUS_DRAINING
        elif lanes:
            status, reason = pb.STAGE_STATUS_SERVING, ""
        elif self.refused:
            status = pb.STAGE_STATUS_MISMATCHED
        return pb.StageReplica(
            stage=self.stage,
            address=self.address,
            status=status,
            reason=reason or ("" if lanes else "no lane leads through it yet"),
            lanes=lanes,
            told=self.told,
        )


@dataclass(eq=False, slots=True)
class HeadLane:
    """One lane, at stage 0."""

    number: int
    name: str
    route: tuple[Replica, ...]
    share: KvShare
    info: pb.StageInfo
    """Stage 0's own, with the KV blocks of this lane."""
    link: Link
    chain: Chain = ()
    """All stages, once the last one has closed the ring."""
    up: bool = False
    leaving: bool = False
    """Whether it takes nothing new, and ends when it is empty."""
    out: int = 0
    """Batches that have been sent and have not come back."""
    waiting_since: float = 0.0
    """When the last one came back, or the first was sent, on `time.monotonic()`."""
    welcomed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when stage 1 takes batches."""
    closed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the last stage is connected: the ring is closed."""
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when it is to end, or its way back has."""
    why: str = "the last stage has gone away"
    fault: str = ""
    """host:port of the stage at fault, where it is known."""

    async def whole(self) -> None:
        """Waits until batches can set out and come back. Either may be known first."""
        await self.welcomed.wait()
        await self.closed.wait()

    def sent(self) -> None:
        """A batch sets out."""
        if not self.out:
            self.waiting_since = time.monotonic()
        self.out += 1

    def returned(self) -> None:
        """A batch is back."""
        self.out = max(0, self.out - 1)
        self.waiting_since = time.monotonic()

    def end(self, why: str) -> None:
        """Ends it."""
        self.why = why
        self.ended.set()
