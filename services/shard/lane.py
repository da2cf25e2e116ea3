"""A lane's passage through a later stage: what comes in, is computed, and goes on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Protocol

import grpc
from grpc import aio

from miaotui.engine.batch import Batch, DropCode
from miaotui.engine.decode.share import KvShare
from miaotui.engine.order import SendOrder, Turn
from miaotui.engine.tensors import TensorFormatError
from miaotui.v1 import shard_pb2 as pb
from services.shard.codec import Assembler, Frame, FrameError, decode
from services.shard.link import Chain, Link, LinkClock, LinkEnd

log = logging.getLogger(__name__)

# Far above any real batch; bounds what a broken or hostile peer can make a stage allocate.
MAX_TENSOR_BYTES = 512 * 1024 * 1024
# One batch computes, one waits so that the compute thread never idles, one is being sent.
_BATCHES_INSIDE = 3


class ForwardContext(Protocol):
    """What `Forward` needs of gRPC's servicer context."""

    async def write(self, message: pb.ForwardResponse) -> None:
        """Sends a frame back."""

    async def abort(
        self,
        code: grpc.StatusCode,
        details: str = "",
        trailing_metadata: tuple[tuple[str, str], ...] = (),
    ) -> None:
        """Ends the stream with a status; raises."""


class RefusedError(Exception):
    """Ends a stream with a gRPC status."""

    def __init__(self, code: grpc.StatusCode, message: str, at: str = "") -> None:
        """`at`: host:port of the stage at fault; empty: this one."""
        super().__init__(message)
        self.code = code
        self.at = at


class Answers:
    """The stream's way back; gRPC takes one write at a time, and none while it ends."""

    def __init__(self, context: ForwardContext) -> None:
        self._context = context
        self._writing = asyncio.Lock()
        self._closed = False

    async def write(self, message: pb.ForwardResponse) -> None:
        """Sends a frame back. Raises `asyncio.InvalidStateError` once the stream is closed."""
        # Whoever waits may be cancelled; gRPC would go on writing all the same.
        writing = asyncio.ensure_future(self._write(message))
        # Where nobody waits any more, nobody hears of a stream that broke meanwhile.
        writing.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.shield(writing)

    async def _write(self, message: pb.ForwardResponse) -> None:
        async with self._writing:
            if self._closed:
                raise asyncio.InvalidStateError("the stream has ended")
            await self._context.write(message)

    async def close(self) -> None:
        """Returns once nothing is being written; nothing will be."""
        self._closed = True
        async with self._writing:
            pass

    async def credit(self, batch_id: int) -> None:
        """Gives the sender room for one more batch."""
        await self.write(pb.ForwardResponse(credit=pb.Credit(batch_id=batch_id)))

    async def draining(self, address: str) -> None:
        """Tells that a stage shuts down."""
        await self.write(pb.ForwardResponse(draining=pb.Draining(address=address)))


async def read_frames(frames: AsyncIterator[bytes], assembler: Assembler) -> AsyncIterator[Frame]:
    """The stream's frames, whole. Raises `RefusedError` for what is none."""
    try:
        async for data in frames:
            frame = assembler.feed(decode(data))
            if frame is not None:
                yield frame
    except (FrameError, TensorFormatError) as error:
        raise RefusedError(grpc.StatusCode.INVALID_ARGUMENT, str(error)) from error


class LaneStage(Protocol):
    """What a lane needs of its stage."""

    @property
    def info(self) -> pb.StageInfo:
        """Who it is."""

    @property
    def is_last(self) -> bool:
        """Whether it holds the model's head."""

    def read(self, frame: Frame) -> Batch:
        """A batch from its frame. Raises `TensorFormatError`."""

    def frame(self, batch: Batch) -> Frame:
        """A computed batch's frame."""

    async def compute(self, batch: Batch, share: KvShare | None) -> None:
        """Computes a batch."""

    def note_cancelled(self, request_ids: list[str]) -> None:
        """Nobody waits for these requests any more."""

    def lane_changed(self) -> None:
        """A lane was welcomed by the next stage, or has ended."""


class Lane:
    """One lane at a later stage, from its Hello to its end."""

    def __init__(
        self,
        stage: LaneStage,
        name: str,
        chain: Chain,
        share: KvShare,
        answers: Answers,
        *,
        target: str,
        hello: pb.Hello,
        inbox_batches: int,
        part_bytes: int,
        clock: LinkClock,
    ) -> None:
        """`chain`: from stage 0 to this one; `target`: host:port of the next."""
        self.name = name
        self.chain = chain
        self.share = share
        self.void = asyncio.Event()
        """Set where stage 0 no longer knows this lane."""
        self.gone = asyncio.Event()
        """Set when it has ended."""
        self._stage = stage
        self._answers = answers
        self._inbox_batches = inbox_batches
        self._inbox: asyncio.Queue[Batch] = asyncio.Queue(inbox_batches)
        self._telling: set[asyncio.Task[None]] = set()
        self.link = Link(
            target,
            hello,
            part_bytes=part_bytes,
            clock=clock,
            up=stage.lane_changed,
            draining=self.tell_draining,
        )

    @property
    def head(self) -> pb.StageInfo:
        """The stage 0 that the lane belongs to."""
        return self.chain[0]

    @property
    def queued(self) -> int:
        """Batches that wait."""
        return self._inbox.qsize()

    def tell_draining(self, address: str) -> None:
        """Tells stage 0, by way of the stages before, that a stage of the lane shuts down."""

        async def tell() -> None:
            try:
                await self._answers.draining(address)
            except (aio.BaseError, asyncio.InvalidStateError) as error:
                # The stream has ended, and stage 0 knows.
                log.debug("draining was not told: %s", type(error).__name__)

        task = asyncio.create_task(tell())
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    async def run(self, frames: AsyncIterator[Frame]) -> None:
        """Until the stage before ends the stream. Raises `RefusedError` where anything else
        ends the lane.
        """
        reading = asyncio.create_task(self._read(frames))
        linking = asyncio.create_task(self.link.run())
        working = asyncio.create_task(self._work())
        voided = asyncio.create_task(self.void.wait())
        tasks = (reading, linking, working, voided)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if reading.done():
                reading.result()
            elif linking.done():
                raise _broken(linking.result())
            elif working.done():
                working.result()
            else:
                raise RefusedError(grpc.StatusCode.ABORTED, "stage 0 has replaced this lane")
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, frames: AsyncIterator[Frame]) -> None:
        async for frame in frames:
            kind = frame.message.WhichOneof("frame")
            if kind == "batch":
                await self._take(frame)
            elif kind == "cancel":
                request_ids = list(frame.message.cancel.request_ids)
                self._stage.note_cancelled(request_ids)
                if not self._stage.is_last:
                    self.link.cancel(request_ids)
            else:
                raise RefusedError(
                    grpc.StatusCode.INVALID_ARGUMENT,
                    "a second Hello"
                    if kind == "hello"
                    else f"stage {self._stage.info.index} takes no frame of kind "
                    f"{kind or 'unknown'!r}",
                )

    async def _take(self, frame: Frame) -> None:
        try:
            batch = self._stage.read(frame)
        except TensorFormatError as error:
            raise RefusedError(grpc.StatusCode.INVALID_ARGUMENT, str(error)) from error
        try:
            self._inbox.put_nowait(batch)
        except asyncio.QueueFull:
            reject = pb.Reject(
                batch_id=batch.batch_id,
                code=grpc.StatusCode.RESOURCE_EXHAUSTED.value[0],
                message=f"the inbox of stage {self._stage.info.index} is full "
                f"({self._inbox_batches} batches); wait for a Credit before sending",
            )
            await self._answers.write(pb.ForwardResponse(reject=reject))

    async def _work(self) -> None:
        room = asyncio.Semaphore(_BATCHES_INSIDE)
        order = SendOrder()
        async with asyncio.TaskGroup() as group:
            while True:
                batch = await self._inbox.get()
                await room.acquire()
                # First the work, then the credit: the one is waited for, the other is not.
                task = group.create_task(self._pass_on(batch, order.next()))
                task.add_done_callback(lambda _: room.release())
                await self._answers.credit(batch.batch_id)

    async def _pass_on(self, batch: Batch, turn: Turn) -> None:
        """Computes a batch, and sends it in its turn.

        Tasks start in the order in which they were made, so batches are computed in it, too.
        """
        with turn:
            await self._stage.compute(batch, self.share)
            await turn.comes()
            await self._send_or_fail(batch)

    async def _send_or_fail(self, batch: Batch) -> None:
        try:
            try:
                await self.link.send(self._stage.frame(batch))
            except ConnectionError:
                raise
            except Exception:
                # The sequences are reported as failed rather than never.
                index = self._stage.info.index
                log.exception("stage %d could not send batch %d", index, batch.batch_id)
                batch.fail(DropCode.INTERNAL, f"stage {index} failed; see its log")
                batch.sampled = None
                await self.link.send(self._stage.frame(batch))
        except ConnectionError as error:
            # Stage 0 sees the break too and runs the batch's sequences again.
            log.debug("batch %d is not passed on: %s", batch.batch_id, error)


def _broken(end: LinkEnd) -> RefusedError:
    kept = (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.RESOURCE_EXHAUSTED)
    code = end.code if end.code in kept else grpc.StatusCode.UNAVAILABLE
    return RefusedError(code, end.reason, end.at)
