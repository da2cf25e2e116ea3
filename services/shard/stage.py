"""A stage of the ring: its neighbours, its status, and the way of a batch through it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Protocol

import grpc

from miaotui.engine.batch import Batch, CancelledSet, DropCode
from miaotui.engine.decode.head import GenerationHead
from miaotui.engine.decode.types import TokenIds
from miaotui.engine.head import Head
from miaotui.engine.order import SendOrder, Turn
from miaotui.engine.runner import StageRunner
from miaotui.engine.tensors import TensorFormatError
from miaotui.v1 import shard_pb2 as pb
from services.shard.codec import Assembler, Frame, FrameError, decode
from services.shard.convert import batch_to_frame, frame_to_batch
from services.shard.handshake import MismatchError, check_chain
from services.shard.link import Chain, Link
from services.shard.slices import DecodeLimits

log = logging.getLogger(__name__)

# Far above any real batch; bounds what a broken or hostile peer can make a stage allocate.
MAX_TENSOR_BYTES = 512 * 1024 * 1024
# One batch computes, one waits so that the compute thread never idles, one is being sent.
_BATCHES_INSIDE = 3


class ForwardContext(Protocol):
    """What `Forward` needs of gRPC's servicer context."""

    async def write(self, message: pb.ForwardResponse) -> None:
        """Sends a frame back."""

    async def abort(self, code: grpc.StatusCode, details: str) -> None:
        """Ends the stream with a status; raises."""


class _Refused(Exception):
    """Ends a stream with a gRPC status."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class _Answers:
    """The stream's way back; gRPC takes one write at a time."""

    def __init__(self, context: ForwardContext) -> None:
        self._context = context
        self._writing = asyncio.Lock()

    async def write(self, message: pb.ForwardResponse) -> None:
        async with self._writing:
            await self._context.write(message)

    async def credit(self, batch_id: int) -> None:
        await self.write(pb.ForwardResponse(credit=pb.Credit(batch_id=batch_id)))


class Stage:
    """Connects the engine (`runner`, and `head` at stage 0) with the links on both sides."""

    def __init__(
        self,
        info: pb.StageInfo,
        runner: StageRunner,
        *,
        next_address: str,
        wire_dtype: str,
        inbox_batches: int,
        part_bytes: int,
        status_changed: Callable[[bool], Awaitable[None]],
    ) -> None:
        """`next_address`: of the stage that follows; of stage 0, for the last."""
        self.info = info
        self.runner = runner
        self.head: Head | GenerationHead | None = None
        self.cancelled = CancelledSet()
        self.pipeline: Chain = (info,) if info.stages == 1 else ()
        self.draining = False
        self._limits: DecodeLimits | None = None
        if info.kind == pb.MODEL_KIND_GENERATIVE:
            self._limits = DecodeLimits(
                vocabulary=info.vocab_size,
                context=info.max_sequence_length,
                blocks=info.kv_blocks,
                block_tokens=info.kv_block_tokens,
            )
        self._wire_dtype = wire_dtype
        self._inbox_batches = inbox_batches
        self._status_changed = status_changed
        self._was_serving: bool | None = None
        self._has_served = False
        self._upstream_refused = ""
        self._downstream_refused = ""
        self._incoming: asyncio.Task[None] | None = None
        self._inbox: asyncio.Queue[Batch] = asyncio.Queue(inbox_batches)
        self._tasks: set[asyncio.Task[None]] = set()
        self.link = Link(
            next_address,
            part_bytes=part_bytes,
            up=self._link_up,
            down=self._link_down,
            refused=self._link_refused,
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
    def queued(self) -> int:
        """Sequences that wait here."""
        if self.head is not None:
            return self.head.queued
        return self._inbox.qsize()

    async def run(self) -> None:
        """Keeps the outgoing link up; returns at once where there is only one stage."""
        if self.is_head:
            self.link.set_chain((self.info,) if self.info.stages > 1 else None)
        self._update()
        if self.info.stages > 1:
            await self.link.run()

    # -- status ---------------------------------------------------------------------------

    def status(self) -> tuple[pb.StageStatus.ValueType, str]:
        """Whether this stage serves, and why not."""
        if self.draining:
            return pb.STAGE_STATUS_DRAINING, "shutting down"
        if self.info.stages > 1:
            if refused := self._upstream_refused or self._downstream_refused:
                return pb.STAGE_STATUS_MISMATCHED, refused
            if not self.is_head and not self.pipeline:
                return pb.STAGE_STATUS_WAITING, f"stage {self.info.index - 1} has not connected yet"
            if not self.link.connected:
                return (
                    pb.STAGE_STATUS_WAITING,
                    f"no link to the next stage at {self.link.target} yet",
                )
            if not self.pipeline:
                return (
                    pb.STAGE_STATUS_WAITING,
                    f"the last stage, {self.info.stages - 1}, has not closed the ring yet",
                )
        return pb.STAGE_STATUS_SERVING, ""

    def _update(self) -> None:
        status, reason = self.status()
        serving = status == pb.STAGE_STATUS_SERVING
        if self.head is not None:
            if not serving:
                self.head.pipeline_down(reason)
            elif isinstance(self.head, GenerationHead):
                # As many blocks as the poorest stage has.
                blocks = min(stage.kv_blocks for stage in self.pipeline)
                self.head.pipeline_up(blocks, self.info.kv_block_tokens)
            else:
                self.head.pipeline_up()
        if serving != self._was_serving:
            self._was_serving = serving
            self._spawn(self._status_changed(serving))
            if serving:
                log.info("stage %d serves", self.info.index)
            else:
                # Before the first time and after the last one this is how it should be.
                expected = self.draining or not self._has_served
                level = logging.INFO if expected else logging.WARNING
                log.log(level, "stage %d does not serve: %s", self.info.index, reason)
            self._has_served = self._has_served or serving

    def _spawn(self, work: Awaitable[None]) -> None:
        async def guarded() -> None:
            await work

        task = asyncio.create_task(guarded())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _link_up(self) -> None:
        self._downstream_refused = ""
        self._update()

    def _link_down(self, _reason: str) -> None:
        if self.is_head:
            # Every stage behind begins anew, and the ring is whole when the last one says so.
            self.pipeline = ()
        self._update()

    def _link_refused(self, reason: str) -> None:
        if self._downstream_refused != reason:
            self._downstream_refused = reason
            log.error("the next stage at %s refuses this one: %s", self.link.target, reason)
        self._update()

    # -- the incoming stream ---------------------------------------------------------------

    async def forward(self, frames: AsyncIterator[bytes], context: ForwardContext) -> None:
        """Serves the stage before this one (at stage 0: the last one) for as long as it streams."""
        assembler = Assembler(MAX_TENSOR_BYTES)
        answers = _Answers(context)
        mine = asyncio.current_task()
        welcomed = False
        consumer: asyncio.Task[None] | None = None
        try:
            async for data in frames:
                frame = assembler.feed(decode(data))
                if frame is None:
                    continue
                kind = frame.message.WhichOneof("frame")
                if not welcomed:
                    if kind != "hello":
                        raise _Refused(
                            grpc.StatusCode.FAILED_PRECONDITION, "the first frame must be Hello"
                        )
                    self._greet(tuple(frame.message.hello.chain))
                    self._replace_incoming(mine)
                    welcomed = True
                    welcome = pb.Welcome(window=self._inbox_batches)
                    await answers.write(pb.ForwardResponse(welcome=welcome))
                    if not self.is_head:
                        consumer = asyncio.create_task(self._consume(answers))
                elif kind == "hello":
                    raise _Refused(grpc.StatusCode.INVALID_ARGUMENT, "a second Hello")
                else:
                    await self._take(kind, frame, answers)
        except _Refused as refusal:
            await context.abort(refusal.code, str(refusal))
        except (FrameError, TensorFormatError) as error:
            log.error("stage %d: malformed frame: %s", self.info.index, error)
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        finally:
            if consumer is not None:
                consumer.cancel()
            if welcomed and self._incoming is mine:
                self._incoming = None
                self._lost_upstream()

    def _greet(self, chain: Chain) -> None:
        try:
            check_chain(chain, self.info)
        except MismatchError as error:
            if self._incoming is None:
                # Otherwise this stage serves another, fitting one: a stranger must not stop it.
                if self._upstream_refused != str(error):
                    log.error("stage %d refuses: %s", self.info.index, error)
                self._upstream_refused = str(error)
                self._update()
            raise _Refused(grpc.StatusCode.FAILED_PRECONDITION, str(error)) from error
        self._upstream_refused = ""
        if self.is_head:
            self.pipeline = chain
        else:
            self.pipeline = (*chain, self.info)

    def _replace_incoming(self, task: asyncio.Task[None] | None) -> None:
        previous, self._incoming = self._incoming, task
        if previous is not None:
            log.info("stage %d: the stage before has reconnected", self.info.index)
            previous.cancel()
        self._inbox = asyncio.Queue(self._inbox_batches)
        if previous is not None and self.head is not None:
            self.head.pipeline_down("the last stage has reconnected")
        if not self.is_head:
            # Anew, even where nothing changed: what the old link carried is void.
            self.link.set_chain(None)
            self.link.set_chain(self.pipeline)
        self._update()

    def _lost_upstream(self) -> None:
        self.pipeline = ()
        self._inbox = asyncio.Queue(self._inbox_batches)
        if not self.is_head:
            self.link.set_chain(None)
        self._update()

    async def _take(self, kind: str | None, frame: Frame, answers: _Answers) -> None:
        if kind == "cancel":
            for request_id in frame.message.cancel.request_ids:
                self.cancelled.add(request_id)
            if not self.is_last:
                self.link.cancel(list(frame.message.cancel.request_ids))
        elif kind == "results" and self.head is not None:
            batch = frame_to_batch(frame, 2, self._limits)
            self.head.complete(batch)
            await answers.credit(batch.batch_id)
        elif kind == "batch" and not self.is_head:
            batch = frame_to_batch(frame, self.info.hidden_size, self._limits)
            try:
                self._inbox.put_nowait(batch)
            except asyncio.QueueFull:
                reject = pb.Reject(
                    batch_id=batch.batch_id,
                    code=grpc.StatusCode.RESOURCE_EXHAUSTED.value[0],
                    message=f"the inbox of stage {self.info.index} is full "
                    f"({self._inbox_batches} batches); wait for a Credit before sending",
                )
                await answers.write(pb.ForwardResponse(reject=reject))
        else:
            raise _Refused(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"stage {self.info.index} takes no frame of kind {kind or 'unknown'!r}",
            )

    async def _consume(self, answers: _Answers) -> None:
        room = asyncio.Semaphore(_BATCHES_INSIDE)
        inbox = self._inbox
        order = SendOrder()
        async with asyncio.TaskGroup() as group:
            while True:
                batch = await inbox.get()
                await room.acquire()
                # First the work, then the credit: the one is waited for, the other is not.
                task = group.create_task(self._pass_on(batch, order.next()))
                task.add_done_callback(lambda _: room.release())
                await answers.credit(batch.batch_id)

    async def _pass_on(self, batch: Batch, turn: Turn) -> None:
        """Computes a batch, and sends it in its turn.

        Tasks start in the order in which they were made, so batches are computed in it, too.
        """
        with turn:
            await self.compute(batch)
            await turn.comes()
            await self._send_or_fail(batch)

    async def _send_or_fail(self, batch: Batch) -> None:
        try:
            try:
                await self.send(batch)
            except ConnectionError:
                raise
            except Exception:
                # The sequences are reported as failed rather than never.
                log.exception("stage %d could not send batch %d", self.info.index, batch.batch_id)
                batch.fail(DropCode.INTERNAL, f"stage {self.info.index} failed; see its log")
                batch.sampled = None
                await self.send(batch)
        except ConnectionError as error:
            # Stage 0 sees the break too and runs the batch's sequences again.
            log.debug("batch %d is not passed on: %s", batch.batch_id, error)

    async def compute(self, batch: Batch, input_ids: TokenIds | None = None) -> None:
        """Computes a batch; `input_ids` at a decoder's stage 0."""
        if self._limits is None:
            await self.runner.compute(batch, self.cancelled)
        else:
            await self.runner.decode(batch, input_ids)

    async def send(self, batch: Batch) -> None:
        """Sends a computed batch to the next stage; the last stage's results go to stage 0."""
        await self.link.send(batch_to_frame(batch, self._wire_dtype, results=self.is_last))

    def cancel(self, request_ids: Sequence[str]) -> None:
        """Stage 0: nobody waits for these requests any more."""
        for request_id in request_ids:
            self.cancelled.add(request_id)
        self.link.cancel(request_ids)
