"""Many server-streaming calls on one long-lived stream: the server's side (see `streaming`)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

import grpc
from grpc import aio
from opentelemetry import trace

from miaotui.v1 import calls_pb2 as pb
from services.rpc.calls import MAX_OPEN_CALLS, NOT_UNIQUE, CallContext, CallError, CallFrame
from services.rpc.streaming import MAX_WAITING, too_slow
from services.rpc.tracing import end_server_span, start_server_span

log = logging.getLogger(__name__)


class Outlet(Protocol):
    """Where a call's responses go. Nothing of it waits."""

    def send(self, response: Any) -> None:
        """A response; it may be merged with others that the caller has not got yet."""

    def end(self, error: CallError | None = None) -> None:
        """The call has ended, well or with a status; nothing may follow."""


class Context(Protocol):
    """What a start of a call may ask of it."""

    def time_remaining(self) -> float | None:
        """Seconds until the deadline; None: there is none."""


Start = Callable[[Any, Context, Outlet], Callable[[], None]]
"""Starts the work of a call: (request, context, outlet) to the function that cancels it.
May raise `CallError`. Neither waits."""


class _Waiting:
    """A call's responses that are not sent yet, merged into one."""

    def __init__(self) -> None:
        self.response: Any = None
        self.count = 0
        self.ended = False
        self.error: CallError | None = None

    def send(self, response: Any) -> bool:
        """Returns whether there was room."""
        if self.ended:
            return True
        if self.response is None:
            self.response = response
        else:
            self.response.MergeFrom(response)
        self.count += 1
        return self.count <= MAX_WAITING

    def end(self, error: CallError | None) -> None:
        if not self.ended:
            self.ended, self.error = True, error

    def overflow(self) -> None:
        self.response = None
        error = too_slow()
        self.end(CallError(error.code(), error.details() or ""))


class SingleCall:
    """The outlet of a plain server-streaming call; iterate over it for the responses."""

    def __init__(self) -> None:
        self._waiting = _Waiting()
        self._changed = asyncio.Event()
        self.cancel: Callable[[], None] = lambda: None

    def send(self, response: Any) -> None:
        """See `Outlet`."""
        if not self._waiting.send(response):
            self._waiting.overflow()
            self.cancel()
        self._changed.set()

    def end(self, error: CallError | None = None) -> None:
        """See `Outlet`."""
        self._waiting.end(error)
        self._changed.set()

    async def __aiter__(self) -> AsyncIterator[Any]:
        """Raises `CallError` where the call ended with one."""
        while True:
            waiting = self._waiting
            if waiting.response is not None:
                response, waiting.response, waiting.count = waiting.response, None, 0
                yield response
            elif waiting.ended:
                if waiting.error is not None:
                    raise waiting.error
                return
            else:
                self._changed.clear()
                await self._changed.wait()


class _StreamCall:
    """The outlet of one call among others on a stream, with its server span."""

    def __init__(self, name: str, header: pb.CallHeader, stream: _ServedStream) -> None:
        self.call_id = header.call_id
        self.waiting = _Waiting()
        self._context = CallContext(header)
        self._span = start_server_span(name, self._context)
        self._stream = stream
        self._cancel: Callable[[], None] | None = None

    def start(self, start: Start, request: Any) -> None:
        try:
            with trace.use_span(self._span, end_on_exit=False, record_exception=False):
                cancel = start(request, self._context, self)
        except CallError as error:
            self.end(error)
        except Exception:
            log.exception("a call failed to start")
            self.end(CallError(grpc.StatusCode.INTERNAL, "the service failed; see its log"))
        else:
            if self.waiting.ended:
                cancel()
            else:
                self._cancel = cancel

    def send(self, response: Any) -> None:
        """See `Outlet`."""
        if not self.waiting.send(response):
            self.waiting.overflow()
            self._stop()
        self._stream.changed(self)

    def end(self, error: CallError | None = None) -> None:
        """See `Outlet`."""
        self._cancel = None
        self.waiting.end(error)
        self._stream.changed(self)

    def close(self) -> None:
        """The call is over, or nobody waits for it any more: its work ends, and its span."""
        self._stop()
        error = self.waiting.error
        code = grpc.StatusCode.OK if error is None else error.code
        end_server_span(self._span, code if self.waiting.ended else grpc.StatusCode.CANCELLED)

    def _stop(self) -> None:
        cancel, self._cancel = self._cancel, None
        if cancel is not None:
            cancel()


class _ServedStream:
    """One stream: its open calls, and those of them that have news."""

    def __init__(self, context: Any, message: Callable[[], Any]) -> None:
        self.calls: dict[int, _StreamCall] = {}
        self._context = context
        self._message = message
        self._news: dict[int, _StreamCall] = {}
        self._wake = asyncio.Event()
        self._ended = asyncio.Event()
        self._last = False
        self._closed = False

    def changed(self, call: _StreamCall) -> None:
        """The call has news."""
        if self.calls.get(call.call_id) is call:
            self._news[call.call_id] = call
            self._wake.set()

    def cancel(self, call_id: int) -> None:
        """Nobody waits for the call any more."""
        call = self.calls.pop(call_id, None)
        if call is not None:
            self._news.pop(call_id, None)
            call.close()
            self._wake.set()
            self._ended.set()

    def finish(self) -> None:
        """Lets `write` return once all calls have ended."""
        self._last = True
        self._wake.set()

    def close(self) -> None:
        """Lets `write` return as soon as it is not writing, whatever is left."""
        self._closed = True
        self._wake.set()

    async def idle(self) -> None:
        """Returns once all calls have ended and all is sent."""
        while self.calls:
            self._ended.clear()
            await self._ended.wait()

    async def write(self) -> None:
        """Sends news. While a write waits for a slow reader, further news are merged."""
        while not (self._last and not self.calls):
            await self._wake.wait()
            self._wake.clear()
            if self._closed:
                return
            message, over = self._message(), []
            news, self._news = self._news, {}
            for call in news.values():
                waiting = call.waiting
                update = message.updates.add(call_id=call.call_id)
                if waiting.response is not None:
                    update.response.CopyFrom(waiting.response)
                    waiting.response, waiting.count = None, 0
                if waiting.ended:
                    update.ended.call_id = call.call_id
                    if waiting.error is not None:
                        update.ended.code = waiting.error.code.value[0]
                        update.ended.message = waiting.error.details
                    over.append(call)
            try:
                if news:
                    await self._context.write(message)
            except (aio.BaseError, asyncio.InvalidStateError):
                log.debug("the caller was gone before its answers")
                return
            for call in over:
                # Not before the write: draining waits for what is still to be sent.
                if self.calls.get(call.call_id) is call:
                    del self.calls[call.call_id]
                call.close()
                self._ended.set()


class StreamedCallServer:
    """Serves streams of server-streaming calls.

    `name`: the plain method's "package.Service/Method", which spans bear. `message` makes an
    empty response message of the stream.
    """

    def __init__(self, name: str, start: Start, message: Callable[[], Any]) -> None:
        self._name = name
        self._start = start
        self._message = message
        self._streams: dict[asyncio.Task[Any], _ServedStream] = {}
        self._draining = False

    async def serve(self, frames: AsyncIterator[CallFrame], context: Any) -> None:
        """One stream, for as long as the client keeps it."""
        task = asyncio.current_task()
        assert task is not None
        stream = self._streams[task] = _ServedStream(context, self._message)
        writer = asyncio.create_task(stream.write())
        refused = ""
        try:
            async for frame in frames:
                call_id = frame.call.call_id
                if frame.call.cancel:
                    stream.cancel(call_id)
                    continue
                if call_id in stream.calls or len(stream.calls) >= MAX_OPEN_CALLS:
                    refused = NOT_UNIQUE
                    break
                call = stream.calls[call_id] = _StreamCall(self._name, frame.call, stream)
                if self._draining:
                    call.end(
                        CallError(grpc.StatusCode.UNAVAILABLE, "shutting down; try again elsewhere")
                    )
                else:
                    call.start(self._start, frame.request)
            else:
                stream.finish()
                await asyncio.shield(writer)
        finally:
            del self._streams[task]
            for call_id in list(stream.calls):
                stream.cancel(call_id)
            # Never cancelled: gRPC would still be writing, and could not end the stream.
            stream.close()
            await asyncio.wait((writer,))
        if refused:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, refused)

    async def drain(self, seconds: float) -> None:
        """Refuses new calls, lets open ones finish for `seconds`, then ends the streams."""
        self._draining = True
        idle = [asyncio.create_task(stream.idle()) for stream in self._streams.values()]
        if idle:
            _, late = await asyncio.wait(idle, timeout=seconds)
            for waiting in late:
                waiting.cancel()
        for task in list(self._streams):
            task.cancel()
