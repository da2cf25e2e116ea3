"""Streams of server-sent events, one write an update."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import Generic, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gateway.errors import GatewayError
from gateway.generation.request import News
from gateway.http.exchange import SSE, unless_gone
from gateway.http.openai.frames import DONE, Frames, error_event

T = TypeVar("T")


async def first_of(receive: Receive, news: AsyncGenerator[T]) -> T:
    """Awaits the first of the news: what fails before it fails with a status of its own.

    `news` is closed then. Raises `GatewayError`.
    """

    async def first() -> T:
        return await anext(news)

    try:
        return await unless_gone(receive, first())
    except BaseException:
        await news.aclose()
        raise


class EventStream(Response, Generic[T]):
    """Sends events that are made of news as they come, and ends the work when the caller goes."""

    def __init__(self, first: T, news: AsyncGenerator[T]) -> None:
        """`first` came before `news`; see `first_of`."""
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(headers=headers, media_type=SSE)
        del self.headers["content-length"]
        self._first = first
        self._news = news

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._news):
            with suppress(GatewayError):
                await unless_gone(receive, self._all(send))

    async def _all(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        await self._stream(send)

    async def _stream(self, send: Send) -> None:
        """Sends the body."""
        raise NotImplementedError


class NewsStream(EventStream[News]):
    """Sends a text's news."""

    def __init__(
        self,
        frames: Frames,
        begin: bytes,
        first: News,
        news: AsyncGenerator[News],
        with_usage: bool,
    ) -> None:
        """`begin` goes out together with `first`, which came before `news`."""
        super().__init__(first, news)
        self._frames = frames
        self._begin = begin
        self._with_usage = with_usage

    async def _stream(self, send: Send) -> None:
        await self._send(send, self._begin, self._first)
        try:
            async for news in self._news:
                await self._send(send, b"", news)
        except GatewayError as error:
            body = error_event(error)
            await send({"type": "http.response.body", "body": body, "more_body": False})

    async def _send(self, send: Send, before: bytes, news: News) -> None:
        body = before + b"".join([self._frames.text(text) for text in news.texts])
        last = news.usage is not None
        if news.usage is not None:
            if self._with_usage:
                body += self._frames.usage(news.usage)
            body += DONE
        await send({"type": "http.response.body", "body": body, "more_body": not last})
