"""The stream to the next stage: connects, shakes hands, sends within credits, reconnects."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

import grpc
from grpc import aio

from miaotui.v1 import shard_pb2 as pb
from services.rpc.channel import open_channel
from services.shard.codec import Frame, encode, split

log = logging.getLogger(__name__)

FORWARD = "/miaotui.v1.ShardService/Forward"
_HANDSHAKE_SECONDS = 5.0
_BACKOFF_SECONDS = (0.05, 0.1, 0.2, 0.5, 1.0)

Chain = tuple[pb.StageInfo, ...]
Call = aio.StreamStreamCall[bytes, pb.ForwardResponse]


class _Connection:
    """One verified stream."""

    def __init__(self, call: Call, window: int) -> None:
        self._call = call
        self._room = window
        self._changed = asyncio.Event()
        # Locks let their waiters in one after another, as they came.
        self._turn = asyncio.Lock()
        self._writing = asyncio.Lock()
        self.closed = False

    async def send(self, frame: Frame, part_bytes: int) -> None:
        async with self._turn:
            while not self._room and not self.closed:
                self._changed.clear()
                await self._changed.wait()
            self._room -= 1
            await self.write(frame, part_bytes)

    async def write(self, frame: Frame, part_bytes: int) -> None:
        async with self._writing:
            for part in split(frame, part_bytes):
                if self.closed:
                    raise ConnectionError("the link to the next stage broke")
                try:
                    await self._call.write(encode(part))
                except (aio.AioRpcError, asyncio.InvalidStateError) as error:
                    raise ConnectionError("the link to the next stage broke") from error

    def credit(self) -> None:
        self._room += 1
        self._changed.set()

    def close(self) -> None:
        self.closed = True
        self._changed.set()


class Link:
    """The outgoing link of a stage. `up` and `down` are told of every change.

    A link exists while the stage has a verified chain of stages before it (`set_chain`); it
    ends when that chain does, so that a break anywhere travels round the ring to stage 0.
    """

    def __init__(
        self,
        target: str,
        *,
        part_bytes: int,
        up: Callable[[], None],
        down: Callable[[str], None],
        refused: Callable[[str], None],
    ) -> None:
        self.target = target
        self._part_bytes = part_bytes
        self._up, self._down, self._refused = up, down, refused
        self._chain: Chain | None = None
        self._changed = asyncio.Event()
        self._connection: _Connection | None = None
        self._call: Call | None = None
        self._cancelling: set[asyncio.Task[None]] = set()

    @property
    def connected(self) -> bool:
        """Whether the next stage has welcomed this one."""
        return self._connection is not None

    def set_chain(self, chain: Chain | None) -> None:
        """The verified stages up to and including this one; None: not verified (any more)."""
        if chain == self._chain and (chain is None or self.connected):
            return
        self._chain = chain
        self._changed.set()
        if self._call is not None:
            self._call.cancel()

    async def send(self, frame: Frame) -> None:
        """Sends a frame once the next stage has room, in the order of the calls.

        Raises `ConnectionError` where the link breaks.
        """
        connection = self._connection
        if connection is None:
            raise ConnectionError(f"no link to the next stage at {self.target}")
        await connection.send(frame, self._part_bytes)

    def cancel(self, request_ids: Sequence[str]) -> None:
        """Tells the stages behind that nobody waits for these requests."""
        connection = self._connection
        if connection is None:
            return
        frame = Frame(pb.ForwardRequest(cancel=pb.Cancel(request_ids=request_ids)))

        async def tell() -> None:
            try:
                await connection.write(frame, self._part_bytes)
            except ConnectionError:
                log.debug("link broke before a cancellation was sent")

        task = asyncio.create_task(tell())
        self._cancelling.add(task)
        task.add_done_callback(self._cancelling.discard)

    async def run(self) -> None:
        """Keeps the link up until cancelled."""
        failures = 0
        while True:
            self._changed.clear()
            if self._chain is None:
                failures = 0
                await self._changed.wait()
                continue
            channel = open_channel(self.target)
            try:
                reason, welcomed = await self._session(channel, self._chain)
            finally:
                self._call = None
                await channel.close()
            failures = 0 if welcomed else failures + 1
            if failures in (1, 20):
                log.info("link to %s: %s; trying again", self.target, reason)
            pause = _BACKOFF_SECONDS[min(failures, len(_BACKOFF_SECONDS) - 1)]
            try:
                async with asyncio.timeout(pause):
                    await self._changed.wait()
            except TimeoutError:
                continue

    async def _session(self, channel: aio.Channel, chain: Chain) -> tuple[str, bool]:
        """One stream from Hello to its end; returns why it ended and whether it was welcomed."""
        method: aio.StreamStreamMultiCallable[bytes, pb.ForwardResponse]
        method = channel.stream_stream(FORWARD, response_deserializer=pb.ForwardResponse.FromString)
        call: Call = method()
        self._call = call
        welcomed = False
        reason = "closed by the next stage"
        try:
            async with asyncio.timeout(_HANDSHAKE_SECONDS):
                hello = Frame(pb.ForwardRequest(hello=pb.Hello(chain=chain)))
                await call.write(encode(hello))
                first = await call.read()
            if first is aio.EOF or not isinstance(first, pb.ForwardResponse):
                await call.code()
                reason = await self._ended(call)
            elif first.WhichOneof("frame") != "welcome":
                reason = "the next stage did not answer Hello with Welcome"
            else:
                welcomed = True
                self._connection = _Connection(call, max(1, first.welcome.window))
                log.info("link to %s is up", self.target)
                self._up()
                reason = await self._listen(call, self._connection)
        except TimeoutError:
            reason = "no answer to Hello in time"
        except aio.AioRpcError:
            reason = await self._ended(call)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            reason = "the stages before this one changed"
        finally:
            call.cancel()
            if self._connection is not None:
                self._connection.close()
                self._connection = None
                log.info("link to %s is down: %s", self.target, reason)
                self._down(reason)
        return reason, welcomed

    async def _listen(self, call: Call, connection: _Connection) -> str:
        while True:
            answer = await call.read()
            if answer is aio.EOF or not isinstance(answer, pb.ForwardResponse):
                return await self._ended(call)
            if answer.WhichOneof("frame") == "credit":
                connection.credit()
            elif answer.WhichOneof("frame") == "reject":
                return f"the next stage refused a batch: {answer.reject.message}"

    async def _ended(self, call: Call) -> str:
        """Why a stream ended; tells `refused` where the next stage says that it does not fit."""
        code, details = await call.code(), await call.details() or ""
        if code is grpc.StatusCode.FAILED_PRECONDITION:
            self._refused(details)
            return f"refused: {details}"
        if code is grpc.StatusCode.UNAVAILABLE:
            return "the next stage cannot be reached"
        return f"{code.name}: {details}" if details else code.name
