"""Many server-streaming calls on one long-lived stream: the client's side.

As `services.rpc.calls` for calls that are answered bit by bit. A server's answers to all calls
of a stream within one turn of its event loop go out in one message: with many calls that each
get something at the same moment, a message costs once what it would cost every one of them.

A request message has `call` (`CallHeader`) and `request`; an answer has `updates`, at most one
a call, each with `call_id`, `response` (mergeable: two responses merged say the same as both)
and, where the call has ended, `ended` (`CallStatus`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Generic, Self

import grpc
from grpc import aio

from services.rpc.calls import (
    LinkedCalls,
    RequestIn,
    ResponseOut,
    StreamLink,
    rpc_error,
    status_error,
)

# What may wait for a reader that is slower than the work, in responses a call.
MAX_WAITING = 4096


class StreamedCall(Generic[ResponseOut]):
    """The responses of one call, as they come. Iterate over it, and close it.

    Responses that came while the reader was busy are one, merged: a reader that makes a call of
    its own for each falls behind no further than by one.
    `aclose`, the end of an `async with` block, or a cancelled wait for the next response end
    the call at the server.
    """

    def __init__(self, give_up: Callable[[], None]) -> None:
        self._give_up = give_up
        self._responses: list[ResponseOut] = []
        self._changed = asyncio.Event()
        self._error: aio.AioRpcError | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.ended = False
        """Whether the server has sent the last response, or the call has failed."""

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> ResponseOut:
        while not self._responses:
            if self.ended:
                if self._error is not None:
                    raise self._error
                raise StopAsyncIteration
            self._changed.clear()
            try:
                await self._changed.wait()
            except asyncio.CancelledError:
                self.cancel()
                raise
        response, others = self._responses[0], self._responses[1:]
        self._responses = []
        for other in others:
            response.MergeFrom(other)  # type: ignore[attr-defined]
        return response

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()

    async def aclose(self) -> None:
        """As `cancel`."""
        self.cancel()

    def cancel(self) -> None:
        """Ends the call at the server; nothing happens where it has ended."""
        if not self.ended:
            self._responses.clear()
            self.fail(rpc_error(grpc.StatusCode.CANCELLED, "cancelled by the caller"))

    def fail(self, error: aio.AioRpcError, *, tell: bool = True) -> None:
        """Ends the call with an error, which comes after the responses that are here."""
        if self.ended:
            return
        self._error = error
        self._finish()
        if tell:
            self._give_up()

    def expire_in(self, seconds: float) -> None:
        """Sets the call's deadline."""
        error = rpc_error(grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline passed")
        self._timer = asyncio.get_running_loop().call_later(max(0.0, seconds), self.fail, error)

    def take(self, update: Any) -> None:
        """Takes news from the server."""
        if self.ended:
            return
        if update.HasField("response"):
            if len(self._responses) >= MAX_WAITING:
                self.fail(too_slow())
                return
            self._responses.append(update.response)
            self._changed.set()
        if update.HasField("ended"):
            if update.ended.code:
                self._error = status_error(update.ended)
            self._finish()

    def _finish(self) -> None:
        self.ended = True
        if self._timer is not None:
            self._timer.cancel()
        self._changed.set()


def too_slow() -> aio.AioRpcError:
    """The error of a call whose reader does not keep up."""
    return rpc_error(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        f"{MAX_WAITING} responses wait to be read; the reader is too slow",
    )


class _Link(StreamLink):
    def __init__(self, call: aio.StreamStreamCall[Any, Any]) -> None:
        self.open: dict[int, StreamedCall[Any]] = {}
        super().__init__(call)

    def deliver(self, answer: Any) -> None:
        for update in answer.updates:
            known = self.open.get(update.call_id)
            if known is not None:
                known.take(update)
                if known.ended:
                    self.open.pop(update.call_id, None)

    def fail_all(self, error: aio.AioRpcError) -> None:
        for known in list(self.open.values()):
            known.fail(error, tell=False)
        self.open.clear()


class ServerStreamCalls(LinkedCalls[_Link], Generic[RequestIn, ResponseOut]):
    """Calls a server-streaming method over a stream."""

    def _made(self, call: aio.StreamStreamCall[Any, Any]) -> _Link:
        return _Link(call)

    def __call__(
        self, request: RequestIn, /, *, timeout: float | None = None, metadata: Any = None
    ) -> StreamedCall[ResponseOut]:
        """Starts a call at once; iterating over it raises `grpc.aio.AioRpcError`.

        `timeout` in seconds, of the whole call.
        """
        link, header = self._opened(), self._header(timeout, metadata)
        call_id = header.call_id

        def give_up() -> None:
            if link.open.pop(call_id, None) is not None:
                self._give_up(link, call_id)

        call: StreamedCall[ResponseOut] = StreamedCall(give_up)
        link.open[call_id] = call
        if timeout is not None:
            call.expire_in(timeout)
        link.send(self._frame(header, request))
        return call

    @property
    def outstanding(self) -> int:
        """Calls that have not ended."""
        return 0 if self._link is None else len(self._link.open)
