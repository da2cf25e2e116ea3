"""HTTP/1.1 on the wire, within bounds: uvicorn's own protocol has none for headers.

Without them, one connection could make the gateway hold headers, a path or trailers of any
size, and many could each send a byte a minute and never finish their headers ("Slowloris").
"""

from __future__ import annotations

import asyncio
import uuid
from typing import NoReturn

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from gateway.errors import GatewayError
from gateway.http.problems import problem_response
from gateway.settings import GatewaySettings


class BoundedProtocol(HttpToolsProtocol):  # type: ignore[misc]
    """One connection. What is refused here never becomes a request; the connection closes."""

    max_header_bytes = 32 * 1024
    header_seconds = 10.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop."""
        super().connection_made(transport)
        self._refusal: GatewayError | None = None
        # Of the request that is being read: bytes of path and headers, and trailers.
        self._head_bytes = 0
        # Bytes that came since the parser last made something of them.
        self._unread = 0
        self._in_head = False
        self._timer: asyncio.TimerHandle | None = None
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the event loop."""
        self._head_is_here()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Called by the event loop."""
        self._unread += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._unread > self.max_header_bytes:
            self._refusal = self._too_large()
            self.send_400_response("")
        elif self._in_head and self._timer is None:
            self._wait_for_head()

    def on_message_begin(self) -> None:
        """Called by the parser, as all that follow."""
        super().on_message_begin()
        self._in_head = True
        self._head_bytes = self._unread = 0

    def on_url(self, url: bytes) -> None:
        """A part of the path."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or a trailer after the body."""
        # As `_count`, which would be called for each.
        self._unread = 0
        self._head_bytes += len(name) + len(value) + 4
        if self._head_bytes > self.max_header_bytes:
            self._too_many()
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The request can begin."""
        self._head_is_here()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A part of the body, which has bounds of its own (gateway/http/body.py)."""
        self._unread = 0
        super().on_body(body)

    def send_400_response(self, msg: str) -> None:
        """Refuses what cannot be read, with a problem document like any other."""
        if self.cycle is not None and not self.cycle.response_complete:
            # An earlier request's response is on its way: nothing may get in between.
            self.transport.close()
            return
        error = self._refusal or GatewayError("malformed-http", "This is not HTTP/1.1.")
        identifier = uuid.uuid4().hex
        headers = {"Connection": "close", "X-Request-ID": identifier}
        response = problem_response(error, identifier, headers)
        lines = [b"%s: %s\r\n" % header for header in response.raw_headers]
        head = STATUS_LINE[response.status_code]
        self.transport.write(b"".join([head, *lines, b"\r\n", bytes(response.body)]))
        self.transport.close()

    def _count(self, size: int) -> None:
        self._unread = 0
        self._head_bytes += size
        if self._head_bytes > self.max_header_bytes:
            self._too_many()

    def _too_many(self) -> NoReturn:
        self._refusal = self._too_large()
        # Ends the parser's work; uvicorn then refuses the request.
        raise httptools.HttpParserError("too many bytes of headers")

    def _too_large(self) -> GatewayError:
        detail = f"Path and headers may have {self.max_header_bytes} bytes."
        return GatewayError("headers-too-large", detail)

    def _wait_for_head(self) -> None:
        self._timer = self.loop.call_later(self.header_seconds, self._too_slow)

    def _head_is_here(self) -> None:
        self._in_head = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        self._timer = None
        if self.transport.is_closing():
            return
        if not self._in_head:
            self.transport.close()  # nothing was asked at all
            return
        self._refusal = GatewayError("headers-timeout", "The headers stopped on their way.")
        self.send_400_response("")


def bounded_protocol(settings: GatewaySettings) -> type[BoundedProtocol]:
    """The protocol with the settings' bounds, for uvicorn."""

    class Configured(BoundedProtocol):
        max_header_bytes = settings.max_header_bytes
        header_seconds = settings.header_timeout

    return Configured
