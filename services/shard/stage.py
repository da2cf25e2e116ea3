"""A stage: its neighbours, its status, and the way of a batch through it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import grpc

from miaotui.engine.batch import Batch, CancelledSet
from miaotui.engine.decode.pool import GenerationPool
from miaotui.engine.decode.share import KvShare
from miaotui.engine.decode.types import TokenIds
from miaotui.engine.head import Head
from miaotui.engine.runner import StageRunner
from miaotui.engine.tensors import TensorFormatError
from miaotui.v1 import shard_pb2 as pb
from services.shard.codec import Assembler, Frame
from services.shard.convert import batch_to_frame, frame_to_batch
from services.shard.handshake import MismatchError, check_chain
from services.shard.lane import (
    MAX_TENSOR_BYTES,
    Answers,
    ForwardContext,
    Lane,
    RefusedError,
    read_frames,
)
from services.shard.lanes import Lanes
from services.shard.link import AT, Chain, LinkClock
from services.shard.route import HeadLane
from services.shard.shares import NoShareError, Shares
from services.shard.slices import DecodeLimits

log = logging.getLogger(__name__)

# So long may a lane that stage 0 has replaced take to end.
_VOID_SECONDS = 2.0


class Stage:
    """Connects the engine (`runner`, and `head` at stage 0) with the lanes through it."""

    def __init__(
        self,
        info: pb.StageInfo,
        runner: StageRunner,
        *,
        stages: Sequence[Sequence[str]],
        shares: int,
        wire_dtype: str,
        inbox_batches: int,
        part_bytes: int,
        stall_seconds: float,
        status_changed: Callable[[bool], Awaitable[None]],
    ) -> None:
        """`stages`: the addresses of each stage's replicas. `shares`: lanes that a decoder's KV
        cache is divided among.
        """
        self.info = info
        self.runner = runner
        self.head: Head | GenerationPool | None = None
        self.cancelled = CancelledSet()
        self.shares = Shares(info.kv_blocks, shares)
        self.clock = LinkClock()
        """Of the links to the next stage."""
        self._stages = stages
        self._limits: DecodeLimits | None = None
        if info.kind == pb.MODEL_KIND_GENERATIVE:
            self._limits = DecodeLimits(
                vocabulary=info.vocab_size,
                context=info.max_sequence_length,
                blocks=self.shares.blocks,
                block_tokens=info.kv_block_tokens,
                source_rows=info.source_rows,
                embedded=info.first_layer > info.encoder_layers or not info.source_rows,
            )
        self._wire_dtype = wire_dtype
        self._inbox_batches = inbox_batches
        self._part_bytes = part_bytes
        self._status_changed = status_changed
        self._draining = False
        self._was_serving: bool | None = None
        self._has_served = False
        self._refused = ""
        self._passing: dict[str, Lane] = {}
        self._no_lanes = asyncio.Event()
        self._no_lanes.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.lanes: Lanes | None = None
        if self.is_head and info.stages > 1:
            self.lanes = Lanes(
                self,
                stages[1:],
                self.shares,
                part_bytes=part_bytes,
                clock=self.clock,
                stall_seconds=stall_seconds,
            )

    @property
    def is_head(self) -> bool:
        """Whether this is stage 0."""
        return self.info.index == 0

    @property
    def is_last(self) -> bool:
        """Whether this stage holds the model's head."""
        return self.info.index == self.info.stages - 1

    @property
    def draining(self) -> bool:
        """Whether it shuts down."""
        return self._draining

    @property
    def queued(self) -> int:
        """Sequences that wait here; at later stages, batches."""
        if self.head is not None:
            return self.head.queued
        return sum(lane.queued for lane in self._passing.values())

    @property
    def pipeline(self) -> Chain:
        """The verified stages of one lane: at stage 0 all, elsewhere those up to this one."""
        if self.info.stages == 1:
            return (self.info,)
        if self.lanes is not None:
            return self.lanes.whole
        lane = next((lane for lane in self._passing.values() if lane.link.connected), None)
        return () if lane is None else lane.chain

    async def run(self) -> None:
        """Keeps stage 0's lanes; returns at once elsewhere, and where there is only one stage."""
        if self.info.stages == 1 and self.head is not None:
            if isinstance(self.head, GenerationPool):
                self.head.pipeline_up(0, self.shares.blocks, self.info.kv_block_tokens)
            else:
                self.head.pipeline_up()
        self._update()
        if self.lanes is not None:
            await self.lanes.run()

    async def drain(self, seconds: float) -> None:
        """Takes nothing new, and finishes what is here within `seconds`."""
        self._draining = True
        self._update()
        if self.head is not None:
            await self.head.drain(seconds)
            return
        # Every stage 0 is told, sends its work elsewhere, and leaves.
        for lane in self._passing.values():
            lane.tell_draining(self.info.address)
        try:
            async with asyncio.timeout(seconds):
                await self._no_lanes.wait()
        except TimeoutError:
            log.info("%d lanes still lead through this stage", len(self._passing))

    # -- status ---------------------------------------------------------------------------

    def status(self) -> tuple[pb.StageStatus.ValueType, str]:
        """Whether this stage serves, and why not."""
        if self._draining:
            return pb.STAGE_STATUS_DRAINING, "shutting down"
        if self.info.stages == 1:
            return pb.STAGE_STATUS_SERVING, ""
        if self.lanes is not None:
            if self.lanes.any_up:
                return pb.STAGE_STATUS_SERVING, ""
            if refused := self._refused or self.lanes.refused:
                return pb.STAGE_STATUS_MISMATCHED, refused
            return pb.STAGE_STATUS_WAITING, self.lanes.reason
        if any(lane.link.connected for lane in self._passing.values()):
            return pb.STAGE_STATUS_SERVING, ""
        if self._refused:
            return pb.STAGE_STATUS_MISMATCHED, self._refused
        if not self._passing:
            return pb.STAGE_STATUS_WAITING, f"stage {self.info.index - 1} has not connected yet"
        lane = next(iter(self._passing.values()))
        return pb.STAGE_STATUS_WAITING, f"no link to the next stage at {lane.link.target} yet"

    def lane_changed(self) -> None:
        """A lane was welcomed by the next stage, or has ended."""
        self._update()

    def lanes_changed(self) -> None:
        """The status may be another now."""
        self._update()

    def _update(self) -> None:
        status, reason = self.status()
        serving = status == pb.STAGE_STATUS_SERVING
        if serving == self._was_serving:
            return
        self._was_serving = serving
        task = asyncio.create_task(self._tell(serving))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if serving:
            log.info("stage %d serves", self.info.index)
        else:
            # Before the first time and after the last one this is how it should be.
            expected = self._draining or not self._has_served
            level = logging.INFO if expected else logging.WARNING
            log.log(level, "stage %d does not serve: %s", self.info.index, reason)
        self._has_served = self._has_served or serving

    async def _tell(self, serving: bool) -> None:
        await self._status_changed(serving)

    # -- lanes of this stage 0 -------------------------------------------------------------

    def lane_up(self, lane: HeadLane) -> None:
        """Work may be given to a lane."""
        if isinstance(self.head, GenerationPool):
            # As many blocks as the poorest stage has for it.
            blocks = min(stage.kv_blocks for stage in lane.chain)
            self.head.pipeline_up(lane.number, blocks, self.info.kv_block_tokens)
        elif self.head is not None:
            self.head.pipeline_up(lane.number)

    def lane_leaving(self, lane: HeadLane) -> None:
        """A lane takes nothing new. Texts move on: they may take longer than the lane lasts."""
        if isinstance(self.head, GenerationPool):
            self.head.pipeline_down(lane.number, "a stage shuts down")
        elif self.head is not None:
            self.head.pipeline_leaving(lane.number)

    def lane_idle(self, lane: HeadLane) -> bool:
        """Whether nothing is on a lane, or about to be."""
        on_it = self.head.in_flight(lane.number) if isinstance(self.head, Head) else 0
        return not lane.out and not on_it

    def lane_down(self, lane: HeadLane, reason: str) -> None:
        """A lane has ended; what was on it must run again."""
        if isinstance(self.head, GenerationPool):
            self.head.pipeline_down(lane.number, reason)
        elif self.head is not None:
            self.head.pipeline_down(reason, lane.number)

    # -- incoming streams ------------------------------------------------------------------

    async def forward(self, frames: AsyncIterator[bytes], context: ForwardContext) -> None:
        """Serves the stage before this one (at stage 0: a last one) for as long as it streams."""
        answers = Answers(context)
        reader = read_frames(frames, Assembler(MAX_TENSOR_BYTES))
        try:
            first = await anext(reader, None)
            if first is None:
                return
            if first.message.WhichOneof("frame") != "hello":
                raise RefusedError(
                    grpc.StatusCode.FAILED_PRECONDITION, "the first frame must be Hello"
                )
            if self.is_head:
                await self._receive(first.message.hello, reader, answers)
            else:
                await self._pass_through(first.message.hello, reader, answers)
        except RefusedError as refusal:
            if refusal.code is grpc.StatusCode.INVALID_ARGUMENT:
                log.error("stage %d: malformed frame: %s", self.info.index, refusal)
            at = ((AT, refusal.at or self.info.address),)
            await answers.close()
            await context.abort(refusal.code, str(refusal), at)
        finally:
            await answers.close()

    def _check(self, chain: Chain, own: pb.StageInfo) -> None:
        try:
            check_chain(chain, own)
        except MismatchError as error:
            if self._refused != str(error):
                log.error("stage %d refuses: %s", self.info.index, error)
            if not self.pipeline:
                # Otherwise this stage serves others, which fit: a stranger must not stop it.
                self._refused = str(error)
                self._update()
            raise RefusedError(grpc.StatusCode.FAILED_PRECONDITION, str(error)) from error
        self._refused = ""

    async def _receive(
        self, hello: pb.Hello, frames: AsyncIterator[Frame], answers: Answers
    ) -> None:
        """Stage 0: the results of one of its lanes."""
        chain = tuple(hello.chain)
        lane = None if self.lanes is None else self.lanes.find(hello.lane)
        self._check(chain, self.info if lane is None else lane.info)
        if lane is None or self.lanes is None or self.head is None:
            raise RefusedError(
                grpc.StatusCode.ABORTED, "this stage 0 has given up the lane meanwhile"
            )
        lane.chain = chain
        await answers.write(pb.ForwardResponse(welcome=pb.Welcome(window=self._inbox_batches)))
        lane.closed.set()
        head = self._head_of(lane)
        try:
            async for frame in frames:
                if frame.message.WhichOneof("frame") != "results":
                    raise RefusedError(
                        grpc.StatusCode.INVALID_ARGUMENT, "stage 0 takes no frame but results"
                    )
                try:
                    vectors = self.info.kind == pb.MODEL_KIND_EMBEDDING
                    width = self.info.hidden_size if vectors else 2
                    batch = frame_to_batch(frame, width, self._limits, vectors=vectors)
                except TensorFormatError as error:
                    raise RefusedError(grpc.StatusCode.INVALID_ARGUMENT, str(error)) from error
                batch.lane = lane.number
                lane.returned()
                head(batch)
                self.lanes.landed(lane)
                await answers.credit(batch.batch_id)
        finally:
            lane.ended.set()

    def _head_of(self, lane: HeadLane) -> Callable[[Batch], None]:
        if isinstance(self.head, GenerationPool):
            return self.head.heads[lane.number].complete
        assert self.head is not None
        return self.head.complete

    async def _pass_through(
        self, hello: pb.Hello, frames: AsyncIterator[Frame], answers: Answers
    ) -> None:
        """A later stage: a lane, from its beginning to its end."""
        chain = tuple(hello.chain)
        # Of one share, as every stage names it.
        own = pb.StageInfo()
        own.CopyFrom(self.info)
        own.kv_blocks = self.shares.blocks
        self._check(chain, own)
        if self._draining:
            raise RefusedError(grpc.StatusCode.UNAVAILABLE, "shutting down; try another replica")
        await self._end_void(hello)
        try:
            share = self.shares.take()
        except NoShareError as error:
            raise RefusedError(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error)) from error
        name = hello.lane or f"{chain[0].address}/{chain[0].instance}"
        lane = Lane(
            self,
            name,
            (*chain, own),
            share,
            answers,
            target=self._next_of(hello),
            hello=pb.Hello(
                chain=(*chain, own), lane=hello.lane, route=hello.route, lanes=hello.lanes
            ),
            inbox_batches=self._inbox_batches,
            part_bytes=self._part_bytes,
            clock=self.clock,
        )
        self._passing[name] = lane
        self._no_lanes.clear()
        try:
            self._update()
            await answers.write(pb.ForwardResponse(welcome=pb.Welcome(window=self._inbox_batches)))
            await lane.run(frames)
        finally:
            if self._passing.get(name) is lane:
                del self._passing[name]
            self.shares.give_back(share)
            lane.gone.set()
            if not self._passing:
                self._no_lanes.set()
            self._update()

    async def _end_void(self, hello: pb.Hello) -> None:
        """Ends what this stage holds of a stage 0's lanes that it no longer has."""
        known = set(hello.lanes) - {hello.lane}
        void = [
            lane
            for lane in self._passing.values()
            if lane.head.address == hello.chain[0].address and lane.name not in known
        ]
        for lane in void:
            log.info("stage %d: stage 0 at %s has reconnected", self.info.index, lane.head.address)
            lane.void.set()
        if void:
            gone = asyncio.gather(*(lane.gone.wait() for lane in void))
            try:
                async with asyncio.timeout(_VOID_SECONDS):
                    await gone
            except TimeoutError:
                log.warning("stage %d: a lane that is void does not end", self.info.index)

    def _next_of(self, hello: pb.Hello) -> str:
        """host:port of the stage after this one; after the last comes the lane's stage 0."""
        if self.is_last:
            return hello.chain[0].address
        following = self.info.index + 1
        if len(hello.route) >= following:
            return hello.route[following - 1]
        return self._stages[following][0]

    # -- batches ---------------------------------------------------------------------------

    def read(self, frame: Frame) -> Batch:
        """A batch from its frame. Raises `TensorFormatError`."""
        return frame_to_batch(frame, self.info.hidden_size, self._limits)

    def frame(self, batch: Batch) -> Frame:
        """A computed batch's frame."""
        return batch_to_frame(batch, self._wire_dtype, results=self.is_last)

    async def compute(
        self, batch: Batch, share: KvShare | None, input_ids: TokenIds | None = None
    ) -> None:
        """Computes a batch; `input_ids` at a decoder's stage 0."""
        if self._limits is None:
            await self.runner.compute(batch, self.cancelled)
        else:
            await self.runner.decode(batch, input_ids, share)

    async def send(self, batch: Batch) -> None:
        """Stage 0: sends a computed batch to stage 1, by its lane. Raises `ConnectionError`."""
        lane = None if self.lanes is None else self.lanes.numbered(batch.lane)
        if lane is None or not lane.up:
            raise ConnectionError("the lane has ended")
        lane.sent()
        await lane.link.send(self.frame(batch))

    def note_cancelled(self, request_ids: Sequence[str]) -> None:
        """Nobody waits for these requests any more."""
        for request_id in request_ids:
            self.cancelled.add(request_id)

    def cancel(self, request_ids: Sequence[str]) -> None:
        """Stage 0: the same, told to the stages behind, too."""
        self.note_cancelled(request_ids)
        if self.lanes is not None:
            self.lanes.cancel(request_ids)
