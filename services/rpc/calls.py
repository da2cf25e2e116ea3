"""Many calls on one long-lived stream (protos/miaotui/v1/calls.proto), both sides.

A unary call opens and closes an HTTP/2 stream of its own, which costs several wake-ups of
threads on each side; a message on an open stream costs one. Between idle cores that is about
half of a call's latency. Handlers and callers look as they do for unary calls.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from typing import Any, Generic, NoReturn, Protocol, TypeVar

import grpc
from grpc import aio

from miaotui.v1 import calls_pb2 as pb
from services.rpc.tracing import server_span

log = logging.getLogger(__name__)

Request = TypeVar("Request")
Response = TypeVar("Response")
RequestIn = TypeVar("RequestIn", contravariant=True)
ResponseOut = TypeVar("ResponseOut", covariant=True)

# Services bound their own work; this bounds what a stream's bookkeeping can grow to.
MAX_OPEN_CALLS = 8192


# -- server ---------------------------------------------------------------------------------


class CallError(Exception):
    """Ends a call with a gRPC status."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self.code = code
        self.details = details


class CallContext:
    """What a unary handler uses of gRPC's servicer context, for a call on a stream."""

    def __init__(self, header: pb.CallHeader) -> None:
        self._deadline = None
        if header.timeout_micros:
            self._deadline = time.monotonic() + header.timeout_micros / 1e6
        self._metadata = (("traceparent", header.traceparent), ("tracestate", header.tracestate))
        self._code: grpc.StatusCode | None = None

    def time_remaining(self) -> float | None:
        """Seconds until the deadline; None: there is none."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        """The call's trace context."""
        return tuple(item for item in self._metadata if item[1])

    def code(self) -> grpc.StatusCode | None:
        """The status that the call was aborted with."""
        return self._code

    def cancelled(self) -> bool:
        """Whether the caller gave up; a call that fails without a status was cancelled."""
        return self._code is None

    async def abort(self, code: grpc.StatusCode, details: str = "") -> NoReturn:
        """Ends the call with a status."""
        self._code = code
        raise CallError(code, details)


class CallFrame(Protocol):
    """A request message of a stream of calls."""

    @property
    def call(self) -> pb.CallHeader:
        """Which call."""

    @property
    def request(self) -> Any:
        """The call's request."""


NOT_UNIQUE = (
    f"call ids must be unique among a stream's open calls, of which there may be {MAX_OPEN_CALLS}"
)


async def _ended(tasks: Collection[asyncio.Task[None]]) -> None:
    """Waits until all have ended, however."""
    if tasks:
        await asyncio.wait(tasks)


class CallServer:
    """Serves streams of calls by a unary handler.

    `name`: the unary method's "package.Service/Method", which spans bear. `answer` makes the
    stream's response message of a status and the handler's response.
    """

    def __init__(
        self,
        name: str,
        handler: Callable[[Any, Any], Awaitable[Any]],
        answer: Callable[[pb.CallStatus, Any], Any],
    ) -> None:
        self._name = name
        self._handler = handler
        self._answer = answer
        self._streams: set[asyncio.Task[Any]] = set()
        self._open: set[asyncio.Task[None]] = set()
        self._draining = False

    async def serve(self, frames: AsyncIterator[CallFrame], context: Any) -> None:
        """One stream, for as long as the client keeps it."""
        writing = asyncio.Lock()
        open_calls: dict[int, asyncio.Task[None]] = {}
        answering: set[asyncio.Task[None]] = set()
        refused = ""
        stream = asyncio.current_task()
        assert stream is not None
        self._streams.add(stream)

        async def run(frame: CallFrame) -> None:
            status, response = await self._run(frame)
            # From here on nobody cancels it: gRPC would still be writing, and could neither
            # write nor end the stream meanwhile.
            task = open_calls.pop(frame.call.call_id)
            answering.add(task)
            try:
                async with writing:
                    if not refused:
                        await context.write(self._answer(status, response))
            except (aio.BaseError, asyncio.InvalidStateError):
                log.debug("a caller was gone before its answer")

        def done(call_id: int, task: asyncio.Task[None]) -> None:
            if open_calls.get(call_id) is task:
                del open_calls[call_id]
            answering.discard(task)
            self._open.discard(task)

        try:
            async for frame in frames:
                call_id = frame.call.call_id
                if frame.call.cancel:
                    if (known := open_calls.get(call_id)) is not None:
                        known.cancel()
                    continue
                if call_id in open_calls or len(open_calls) >= MAX_OPEN_CALLS:
                    refused = NOT_UNIQUE
                    break
                task = asyncio.create_task(run(frame))
                open_calls[call_id] = task
                self._open.add(task)
                task.add_done_callback(functools.partial(done, call_id))
            else:
                # The caller has nothing more to ask, but still waits for these.
                await _ended((*open_calls.values(), *answering))
        finally:
            self._streams.discard(stream)
            for task in list(open_calls.values()):
                task.cancel()
            await _ended((*open_calls.values(), *answering))
        if refused:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, refused)

    async def _run(self, frame: CallFrame) -> tuple[pb.CallStatus, Any]:
        status = pb.CallStatus(call_id=frame.call.call_id)
        context = CallContext(frame.call)
        try:
            if self._draining:
                raise CallError(grpc.StatusCode.UNAVAILABLE, "shutting down; try again elsewhere")
            with server_span(self._name, context):
                return status, await self._handler(frame.request, context)
        except CallError as error:
            status.code, status.message = error.code.value[0], error.details
        except Exception:
            log.exception("%s failed", self._name)
            status.code = grpc.StatusCode.INTERNAL.value[0]
            status.message = "the service failed; see its log"
        return status, None

    async def drain(self, seconds: float) -> None:
        """Refuses new calls, lets open ones finish for `seconds`, then ends the streams."""
        self._draining = True
        if self._open:
            await asyncio.wait(list(self._open), timeout=seconds)
        for stream in list(self._streams):
            stream.cancel()


# -- client ---------------------------------------------------------------------------------


def rpc_error(code: grpc.StatusCode, details: str) -> aio.AioRpcError:
    """The error that a failed unary call raises."""
    return aio.AioRpcError(code, aio.Metadata(), aio.Metadata(), details)


_CODES = {code.value[0]: code for code in grpc.StatusCode}


# INTERNAL is what grpc.aio makes of a write that fails because the peer has just died.
_LINK_ENDS = (grpc.StatusCode.OK, grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL)


class StreamLink:
    """One open stream and its calls. What waits for an answer is the subclass's."""

    def __init__(self, call: aio.StreamStreamCall[Any, Any]) -> None:
        self.closed = False
        self._call = call
        self._outbox: asyncio.Queue[Any] = asyncio.Queue()
        # Writes belong to a task of their own: cancelling one would cancel the whole stream.
        self._tasks = [asyncio.create_task(self._write()), asyncio.create_task(self._read())]

    def send(self, message: Any) -> None:
        """Queues a message; never waits."""
        self._outbox.put_nowait(message)

    def deliver(self, answer: Any) -> None:
        """Takes a message of the server's."""
        raise NotImplementedError

    def fail_all(self, error: aio.AioRpcError) -> None:
        """The stream has ended, and with it every call."""
        raise NotImplementedError

    async def _write(self) -> None:
        try:
            while True:
                await self._call.write(await self._outbox.get())
        except (aio.AioRpcError, asyncio.InvalidStateError):
            return  # the reader sees it, too, and says why

    async def _read(self) -> None:
        code, details = grpc.StatusCode.UNAVAILABLE, "the stream ended"
        try:
            while True:
                answer: Any = await self._call.read()
                if answer is aio.EOF:
                    break
                self.deliver(answer)
            code, details = await self._call.code(), await self._call.details() or details
        except aio.AioRpcError as error:
            code, details = error.code(), error.details() or details
        finally:
            self.close(code, details)

    def close(self, code: grpc.StatusCode, details: str) -> None:
        """Ends the stream; its open calls fail with this status."""
        self.closed = True
        self._call.cancel()
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()
        if code in _LINK_ENDS:
            code = grpc.StatusCode.UNAVAILABLE  # the stream's end is not the call's
        self.fail_all(rpc_error(code, details))


class _Link(StreamLink):
    """A stream whose calls have one answer each."""

    def __init__(self, call: aio.StreamStreamCall[Any, Any]) -> None:
        self.pending: dict[int, asyncio.Future[Any]] = {}
        super().__init__(call)

    def deliver(self, answer: Any) -> None:
        future = self.pending.get(answer.call.call_id)
        if future is not None and not future.done():
            future.set_result(answer)

    def fail_all(self, error: aio.AioRpcError) -> None:
        for future in self.pending.values():
            if not future.done():
                future.set_exception(error)


def status_error(status: pb.CallStatus) -> aio.AioRpcError:
    """The error that a call's status other than 0 stands for."""
    return rpc_error(_CODES.get(status.code, grpc.StatusCode.UNKNOWN), status.message)


LinkT = TypeVar("LinkT", bound=StreamLink)


class LinkedCalls(Generic[LinkT]):
    """What callers over a stream share: it is opened when needed, and anew when it broke."""

    def __init__(
        self,
        method: Callable[[], aio.StreamStreamCall[Any, Any]],
        frame: Callable[[pb.CallHeader, Any], Any],
    ) -> None:
        """`method` opens a stream; `frame` makes its request message of a header and the request
        (None: cancelled).
        """
        self._method = method
        self._frame = frame
        self._link: LinkT | None = None
        self._ids = itertools.count(1)

    def _made(self, call: aio.StreamStreamCall[Any, Any]) -> LinkT:
        """The link of a stream that was opened."""
        raise NotImplementedError

    def _opened(self) -> LinkT:
        """The open stream."""
        link = self._link
        if link is None or link.closed:
            link = self._link = self._made(self._method())
        return link

    def _header(self, timeout: float | None, metadata: Any) -> pb.CallHeader:
        """The header of a new call; `timeout` in seconds, `metadata` the W3C trace context."""
        trace = dict(metadata or ())
        return pb.CallHeader(
            call_id=next(self._ids),
            timeout_micros=0 if timeout is None else max(1, int(timeout * 1e6)),
            traceparent=trace.get("traceparent", ""),
            tracestate=trace.get("tracestate", ""),
        )

    def _give_up(self, link: LinkT, call_id: int) -> None:
        """Tells the server that nobody waits for a call."""
        if not link.closed:
            link.send(self._frame(pb.CallHeader(call_id=call_id, cancel=True), None))

    def close(self) -> None:
        """Ends the stream; calls that are open fail with UNAVAILABLE."""
        if self._link is not None:
            self._link.close(grpc.StatusCode.UNAVAILABLE, "closed by the caller")
            self._link = None


class CallStream(LinkedCalls[_Link], Generic[RequestIn, ResponseOut]):
    """Calls a unary method over a stream, as a method of an asyncio stub is called
    (`services.rpc.channel.UnaryMethod`).
    """

    def _made(self, call: aio.StreamStreamCall[Any, Any]) -> _Link:
        return _Link(call)

    async def __call__(
        self,
        request: RequestIn,
        /,
        *,
        timeout: float | None = None,
        metadata: Any = None,
    ) -> ResponseOut:
        """Raises `grpc.aio.AioRpcError`; cancelling the call cancels its work."""
        link, header = self._opened(), self._header(timeout, metadata)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        link.pending[header.call_id] = future
        try:
            link.send(self._frame(header, request))
            async with asyncio.timeout(timeout):
                answer = await future
        except TimeoutError:
            self._give_up(link, header.call_id)
            raise rpc_error(grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline passed") from None
        except asyncio.CancelledError:
            self._give_up(link, header.call_id)
            raise
        finally:
            del link.pending[header.call_id]
        status: pb.CallStatus = answer.call
        if status.code:
            raise status_error(status)
        response: ResponseOut = answer.response
        return response

    @property
    def outstanding(self) -> int:
        """Calls that wait for their answer."""
        return 0 if self._link is None else len(self._link.pending)
