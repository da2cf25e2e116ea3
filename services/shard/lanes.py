"""Stage 0's lanes: which replicas they lead through, and what happens when one breaks.

A lane is a way through one replica of each later stage and back. A stage 0 keeps so many that
every replica that works is on one, and gives work to the lane with the least. A replica that
fails is left alone for a while (a circuit breaker), and is tried by one lane before it gets
work again.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

import grpc
from grpc import aio

from miaotui.v1 import shard_pb2 as pb
from miaotui.v1 import shard_pb2_grpc
from services.rpc.channel import open_channel
from services.rpc.endpoints import Endpoints
from services.rpc.tracing import UNSAMPLED
from services.shard.link import HANDSHAKE_SECONDS, Chain, Link, LinkClock, LinkEnd
from services.shard.route import HeadLane, Replica
from services.shard.shares import NoShareError, Shares

log = logging.getLogger(__name__)

_WATCH_SECONDS = 2.0
_WATCH_TIMEOUT_SECONDS = 1.5
_LATE_WATCHES = 2
_REFUSED_SECONDS = 1.0
_IDLE_SECONDS = 0.5
_STALLED_PAUSE_SECONDS = 5.0


class LaneOwner(Protocol):
    """What the lanes need of stage 0."""

    @property
    def info(self) -> pb.StageInfo:
        """Who it is."""

    def lane_up(self, lane: HeadLane) -> None:
        """Work may be given to a lane."""

    def lane_leaving(self, lane: HeadLane) -> None:
        """A lane takes nothing new."""

    def lane_idle(self, lane: HeadLane) -> bool:
        """Whether nothing is on a lane, or about to be."""

    def lane_down(self, lane: HeadLane, reason: str) -> None:
        """A lane has ended; what was on it must run again."""

    def lanes_changed(self) -> None:
        """The status may be another now."""


class Lanes:
    """Keeps the lanes of one stage 0."""

    def __init__(
        self,
        owner: LaneOwner,
        stages: Sequence[Sequence[str]],
        shares: Shares,
        *,
        part_bytes: int,
        clock: LinkClock,
        stall_seconds: float,
    ) -> None:
        """`stages`: the addresses of each later stage's replicas, from stage 1 on."""
        self._owner = owner
        self._shares = shares
        self._part_bytes = part_bytes
        self._clock = clock
        self._stall_seconds = stall_seconds
        self._endpoints = [Endpoints(addresses) for addresses in stages]
        self._replicas: list[dict[str, Replica]] = [{} for _ in stages]
        self._lanes: dict[str, HeadLane] = {}
        self._numbers = itertools.count()
        self._names = itertools.count(1)
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._watches: dict[Replica, asyncio.Task[None]] = {}

    @property
    def any_up(self) -> bool:
        """Whether work can be done."""
        return any(lane.up for lane in self._lanes.values())

    @property
    def whole(self) -> Chain:
        """The stages of a lane that is up; empty where none is."""
        return next((lane.chain for lane in self._lanes.values() if lane.up), ())

    @property
    def refused(self) -> str:
        """Why a replica does not fit; empty where all do, or nothing is known."""
        return next((one.refused for one in self._every() if one.refused), "")

    @property
    def reason(self) -> str:
        """Why no lane is up."""
        for replicas in self._replicas:
            if replicas and not any(one.usable for one in replicas.values()):
                return next(iter(replicas.values())).reason
        for one in self._every():
            if one.reason:
                return one.reason
        return "the later stages have not been reached yet"

    def find(self, name: str) -> HeadLane | None:
        """The lane of this name."""
        return self._lanes.get(name)

    def numbered(self, number: int) -> HeadLane | None:
        """The lane of this number."""
        return next((lane for lane in self._lanes.values() if lane.number == number), None)

    def cancel(self, request_ids: Sequence[str]) -> None:
        """Tells the stages behind that nobody waits for these requests."""
        for lane in self._lanes.values():
            if lane.up:
                lane.link.cancel(request_ids)

    def replicas(self) -> list[pb.StageReplica]:
        """All replicas known, by stage."""
        lanes = Counter(one for lane in self._lanes.values() if lane.up for one in lane.route)
        return [one.view(lanes[one]) for one in self._every()]

    async def run(self) -> None:
        """Until cancelled."""
        try:
            while True:
                self._changed.clear()
                await self._refresh()
                self._check_progress()
                while self._open_lane():
                    pass
                self._leave_some()
                self._owner.lanes_changed()
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._pause()):
                        await self._changed.wait()
        finally:
            for task in (*self._tasks, *self._watches.values()):
                task.cancel()

    # -- replicas --------------------------------------------------------------------------

    def _every(self) -> list[Replica]:
        return [one for replicas in self._replicas for one in replicas.values()]

    async def _refresh(self) -> None:
        for index, endpoints in enumerate(self._endpoints):
            known = self._replicas[index]
            addresses = await endpoints.refresh()
            for address in addresses:
                if address not in known:
                    one = known[address] = Replica(index + 1, address)
                    self._watches[one] = asyncio.create_task(self._watch(one))
            on_lanes = {one for lane in self._lanes.values() for one in lane.route}
            for address in [a for a in known if a not in addresses]:
                one = known[address]
                one.draining = True  # nothing new for what DNS names no more
                if one not in on_lanes:
                    self._watches.pop(one).cancel()
                    del known[address]

    async def _watch(self, one: Replica) -> None:
        channel = open_channel(one.address)
        stub = shard_pb2_grpc.ShardServiceStub(channel)
        late, heard = 0, False
        try:
            while True:
                try:
                    one.told = await stub.Describe(
                        pb.ShardServiceDescribeRequest(),
                        timeout=_WATCH_TIMEOUT_SECONDS,
                        metadata=UNSAMPLED,
                    )
                    one.draining = one.told.status == pb.STAGE_STATUS_DRAINING
                    late, heard = 0, True
                except aio.AioRpcError as error:
                    one.told = None
                    if error.code() is grpc.StatusCode.UNAVAILABLE:
                        one.draining = False  # it has ended; the breaker says when it is back
                    late = late + 1 if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED else 0
                    # One that was never heard may be out of reach from here, by a network's rules.
                    if late >= _LATE_WATCHES and heard:
                        self._hangs(one)
                        heard = False
                    elif late and heard:
                        continue
                await asyncio.sleep(_WATCH_SECONDS)
        finally:
            await channel.close()

    def _hangs(self, one: Replica) -> None:
        """Gives up a replica that does not answer, though its connections stand, for another.

        Its event loop never computes, so that it answers soon however much it has to do. On a
        machine that is starved it may not: a lone replica is left alone.
        """
        lanes = [lane for lane in self._lanes.values() if one in lane.route]
        same = self._replicas[one.stage - 1].values()
        if not lanes or not any(other.usable for other in same if other is not one):
            return
        one.reason = "it does not answer"
        log.warning(
            "stage %d at %s does not answer; its work goes to others", one.stage, one.address
        )
        for lane in lanes:
            lane.fault = one.address
            lane.end(f"stage {one.stage} at {one.address} does not answer")

    # -- lanes -----------------------------------------------------------------------------

    def _pause(self) -> float:
        """Until when nothing happens unless something changes."""
        waits = [one.breaker.opens_in for one in self._every() if one.breaker.state == "open"]
        return min((wait for wait in waits if wait > 0), default=_IDLE_SECONDS) + 0.001

    def _open_lane(self) -> bool:
        """Opens a lane through a replica that is on none; whether there was one."""
        covered = Counter(
            one for lane in self._lanes.values() if not lane.leaving for one in lane.route
        )
        usable = [[one for one in some.values() if one.usable] for some in self._replicas]
        if not all(usable) or all(covered[one] for some in usable for one in some):
            return False
        # Replicas of several stages that are on no lane are put on one together.
        route = tuple(min(some, key=lambda one: (covered[one], random.random())) for some in usable)
        try:
            share = self._shares.take()
        except NoShareError:
            return False  # as many as there may be
        info = pb.StageInfo()
        info.CopyFrom(self._owner.info)
        if self._shares.blocks:
            info.kv_blocks = self._shares.blocks
        name = f"{info.instance}/{next(self._names)}"
        hello = pb.Hello(
            chain=[info],
            lane=name,
            route=[one.address for one in route],
            lanes=[*self._lanes, name],
        )
        link = Link(
            route[0].address,
            hello,
            part_bytes=self._part_bytes,
            clock=self._clock,
            up=lambda: lane.welcomed.set(),
            draining=lambda address: self._draining(lane, address),
        )
        number = share.index if self._shares.blocks else next(self._numbers)
        lane = HeadLane(number, name, route, share, info, link)
        self._lanes[name] = lane
        for one in route:
            one.breaker.begin()
        task = asyncio.create_task(self._keep(lane))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return True

    async def _keep(self, lane: HeadLane) -> None:
        """A lane from its beginning to its end."""
        linking = asyncio.create_task(lane.link.run())
        end: LinkEnd | None = None
        try:
            end = await self._connect(lane, linking)
            if end is None:
                end = await self._serve(lane, linking)
        finally:
            linking.cancel()
            await asyncio.gather(linking, return_exceptions=True)
            del self._lanes[lane.name]
            was_up, lane.up = lane.up, False
            if end is not None:
                self._blame(lane, end)
            reason = end.reason if end is not None else lane.why
            if was_up:
                self._owner.lane_down(lane, reason)
            self._shares.give_back(lane.share)
            self._owner.lanes_changed()
            self._changed.set()

    async def _connect(self, lane: HeadLane, linking: asyncio.Task[LinkEnd]) -> LinkEnd | None:
        """Waits until the ring is closed; otherwise why it is not."""
        whole = asyncio.create_task(lane.whole())
        # Each stage gives the next one so long.
        patience = HANDSHAKE_SECONDS * (len(lane.route) + 1)
        try:
            await asyncio.wait((linking, whole), timeout=patience, return_when="FIRST_COMPLETED")
        finally:
            whole.cancel()
        if linking.done():
            return linking.result()
        if whole.done():
            return None
        last = lane.route[-1]
        reason = f"the last stage, {last.stage}, has not closed the ring yet"
        return LinkEnd(grpc.StatusCode.UNAVAILABLE, reason, last.address)

    async def _serve(self, lane: HeadLane, linking: asyncio.Task[LinkEnd]) -> LinkEnd | None:
        """From the closed ring to the end; why it broke, or None where it was not needed."""
        lane.up = True
        for one in lane.route:
            one.breaker.succeeded()
            one.reason = one.refused = ""
        log.info("lane through %s is up", ", ".join(one.address for one in lane.route))
        self._owner.lane_up(lane)
        self._owner.lanes_changed()
        ended = asyncio.create_task(lane.ended.wait())
        try:
            await asyncio.wait((linking, ended), return_when="FIRST_COMPLETED")
        finally:
            ended.cancel()
        if linking.done():
            return linking.result()
        if lane.leaving:
            return None
        # The way back has gone, and soon the way there tells whose fault it is; work need not
        # wait for that.
        lane.up = False
        self._owner.lane_down(lane, lane.why)
        self._owner.lanes_changed()
        if lane.fault:
            return LinkEnd(grpc.StatusCode.UNAVAILABLE, lane.why, lane.fault)
        await asyncio.wait((linking,), timeout=1.0)
        if linking.done():
            return linking.result()
        return LinkEnd(grpc.StatusCode.UNAVAILABLE, lane.why, lane.route[-1].address)

    def _blame(self, lane: HeadLane, end: LinkEnd) -> None:
        fault = next((one for one in lane.route if one.is_at(end.at)), lane.route[-1])
        for one in lane.route:
            if one is not fault:
                one.breaker.gave_up()
        refused = end.code is grpc.StatusCode.FAILED_PRECONDITION
        fault.reason = end.reason
        fault.breaker.failed(
            _REFUSED_SECONDS if refused or end.code is grpc.StatusCode.RESOURCE_EXHAUSTED else None
        )
        if refused and fault.refused != end.reason:
            log.error("stage %d at %s refuses: %s", fault.stage, fault.address, end.reason)
        elif fault.breaker.failures in (1, 20):
            log.info("stage %d at %s: %s; trying again", fault.stage, fault.address, end.reason)
        fault.refused = end.reason if refused else ""

    def _draining(self, lane: HeadLane, address: str) -> None:
        for one in lane.route:
            if one.is_at(address) and not one.draining:
                one.draining = True
                one.reason = "it shuts down"
                log.info("stage %d at %s shuts down", one.stage, address)
        # Another way first, if there is one.
        while self._open_lane():
            pass
        if lane.up:
            self._leave(lane)

    def landed(self, lane: HeadLane) -> None:
        """A batch has come back, and has been dealt with."""
        if lane.leaving and self._owner.lane_idle(lane):
            lane.end("it is not needed any more")

    def _leave(self, lane: HeadLane) -> None:
        if not lane.leaving:
            lane.leaving = True
            self._owner.lane_leaving(lane)
        self.landed(lane)

    def _leave_some(self) -> None:
        """Leaves lanes through replicas that shut down, and one that is not needed: all of its
        replicas are on others, too.
        """
        up = [lane for lane in self._lanes.values() if lane.up]
        for lane in up:
            if lane.leaving or any(one.draining for one in lane.route):
                self._leave(lane)
        covered = Counter(one for lane in up if not lane.leaving for one in lane.route)
        for lane in up:
            if not lane.leaving and all(covered[one] > 1 for one in lane.route):
                self._leave(lane)
                return

    def _check_progress(self) -> None:
        """Gives up a lane on which nothing moves, where there is another."""
        now = time.monotonic()
        up = [lane for lane in self._lanes.values() if lane.up and not lane.leaving]
        for lane in up:
            if len(up) > 1 and lane.out and now - lane.waiting_since > self._stall_seconds:
                others = {one for other in up if other is not lane for one in other.route}
                for one in lane.route:
                    if one not in others:
                        one.reason = f"nothing came back for {self._stall_seconds:g} s"
                        one.breaker.failed(_STALLED_PAUSE_SECONDS)
                log.warning("a lane stands still; its work goes to others")
                lane.end(f"nothing came back for {self._stall_seconds:g} s")
                return
