"""A lane's stream to its next stage: opens, shakes hands, sends within credits, ends."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import grpc
from grpc import aio

from miaotui.v1 import shard_pb2 as pb
from services.rpc.channel import open_channel
from services.shard.codec import Frame, encode, split

log = logging.getLogger(__name__)

FORWARD = "/miaotui.v1.ShardService/Forward"
# Trailing metadata: host:port of the stage whose fault the end of a lane is.
AT = "miaotui-at"
HANDSHAKE_SECONDS = 3.0
# So long does the shortest time of a link count.
_WINDOW_SECONDS = 10.0

Chain = tuple[pb.StageInfo, ...]
Call = aio.StreamStreamCall[bytes, pb.ForwardResponse]


@dataclass(frozen=True, slots=True)
class LinkEnd:
    """Why a link has ended."""

    code: grpc.StatusCode
    """FAILED_PRECONDITION: stages do not fit; RESOURCE_EXHAUSTED: one has no room for a lane."""
    reason: str
    at: str
    """host:port of the stage at fault."""


class LinkClock:
    """How long a link takes one way, in seconds: half of the shortest time of late from a
    batch's sending to its credit, which an idle stage gives at once.

    The shortest, because a busy stage lets batches wait before it takes them.
    """

    def __init__(self) -> None:
        self._last = self._shortest = 0.0
        self._since = 0.0

    @property
    def seconds(self) -> float:
        """Of the last 10 to 20 s with batches; 0: none yet."""
        return min(filter(None, (self._last, self._shortest)), default=0.0)

    def took(self, seconds: float, now: float) -> None:
        """Takes a time from sending to credit; `now` of `time.monotonic()`."""
        if now - self._since > _WINDOW_SECONDS:
            self._last, self._shortest, self._since = self._shortest, 0.0, now
        if not self._shortest or seconds / 2 < self._shortest:
            self._shortest = seconds / 2


class _Connection:
    """One verified stream."""

    def __init__(self, call: Call, window: int, clock: LinkClock) -> None:
        self._call = call
        self._clock = clock
        # When the batches without credit were sent; credits come in their order.
        self._sent: deque[float] = deque()
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
            self._sent.append(time.monotonic())
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
        if self._sent:
            now = time.monotonic()
            self._clock.took(now - self._sent.popleft(), now)
        self._room += 1
        self._changed.set()

    def close(self) -> None:
        self.closed = True
        self._changed.set()


class Link:
    """The way of one lane from a stage to the next; used once."""

    def __init__(
        self,
        target: str,
        hello: pb.Hello,
        *,
        part_bytes: int,
        clock: LinkClock,
        up: Callable[[], None],
        draining: Callable[[str], None],
    ) -> None:
        """`target`: host:port. `up`: the next stage has welcomed this one; `draining`: a stage
        behind (host:port) shuts down.
        """
        self.target = target
        self._hello = hello
        self._part_bytes = part_bytes
        self._clock = clock
        self._up, self._draining = up, draining
        self._connection: _Connection | None = None
        # Set when it is known whether the next stage takes frames: its Welcome came, or never will.
        self._answered = asyncio.Event()
        self._cancelling: set[asyncio.Task[None]] = set()

    @property
    def connected(self) -> bool:
        """Whether the next stage has welcomed this one."""
        return self._connection is not None

    async def send(self, frame: Frame) -> None:
        """Sends a frame once the next stage has room, in the order of the calls.

        A lane's first batch may come before the next stage's Welcome: stage 0 begins when the
        last stage's Hello has reached it, and its answer may still be on the way to that stage.

        Raises `ConnectionError` where the link breaks.
        """
        await self._answered.wait()
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

    async def run(self) -> LinkEnd:
        """From Hello to the stream's end. Cancelling it ends the stream."""
        channel = open_channel(self.target)
        try:
            return await self._session(channel)
        finally:
            if self._connection is not None:
                self._connection.close()
                self._connection = None
            self._answered.set()
            await channel.close()

    async def _session(self, channel: aio.Channel) -> LinkEnd:
        method: aio.StreamStreamMultiCallable[bytes, pb.ForwardResponse]
        method = channel.stream_stream(FORWARD, response_deserializer=pb.ForwardResponse.FromString)
        call: Call = method()
        try:
            async with asyncio.timeout(HANDSHAKE_SECONDS):
                await call.write(encode(Frame(pb.ForwardRequest(hello=self._hello))))
                first = await call.read()
            if first is aio.EOF or not isinstance(first, pb.ForwardResponse):
                return await self._ended(call)
            if first.WhichOneof("frame") != "welcome":
                return self._end("the next stage did not answer Hello with Welcome")
            self._connection = _Connection(call, max(1, first.welcome.window), self._clock)
            self._answered.set()
            self._up()
            return await self._listen(call, self._connection)
        except TimeoutError:
            return self._end("no answer to Hello in time")
        except (aio.AioRpcError, asyncio.InvalidStateError):
            return await self._ended(call)
        finally:
            call.cancel()

    async def _listen(self, call: Call, connection: _Connection) -> LinkEnd:
        while True:
            answer = await call.read()
            if answer is aio.EOF or not isinstance(answer, pb.ForwardResponse):
                return await self._ended(call)
            kind = answer.WhichOneof("frame")
            if kind == "credit":
                connection.credit()
            elif kind == "draining":
                self._draining(answer.draining.address)
            elif kind == "reject":
                return self._end(f"the next stage refused a batch: {answer.reject.message}")

    def _end(self, reason: str) -> LinkEnd:
        return LinkEnd(grpc.StatusCode.UNAVAILABLE, reason, self.target)

    async def _ended(self, call: Call) -> LinkEnd:
        code, details = await call.code(), await call.details() or ""
        at = self.target
        for key, value in await call.trailing_metadata() or ():
            if key == AT and isinstance(value, str):
                at = value
        if at == self.target and code is grpc.StatusCode.UNAVAILABLE:
            return self._end(f"the stage at {at} cannot be reached")
        return LinkEnd(code, details or code.name, at)
