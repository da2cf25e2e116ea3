"""A caller that hears nothing: it speaks HTTP/2 on a socket that it never reads from."""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import Self

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _SETTINGS = 0, 1, 4
_END_STREAM, _END_HEADERS = 1, 4
_MAX_HEADER_LIST_SIZE = 6


class DeafCaller:
    """Calls methods of a gRPC server. What is answered fills the socket's buffers, and waits."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._streams = 0

    @classmethod
    async def connect(cls, port: int) -> Self:
        """Connects to a port of this machine."""
        connection = socket.socket()
        # Little of what is answered is to be under way.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", port))
        caller = cls(connection)
        # Takes headers of any size.
        settings = struct.pack(">HI", _MAX_HEADER_LIST_SIZE, 2**31 - 1)
        await caller._send(_PREFACE + _frame(_SETTINGS, 0, 0, settings))
        return caller

    async def call(self, path: str, message: bytes = b"") -> None:
        """Sends a unary request; `path` is "/package.Service/Method"."""
        stream = 2 * self._streams + 1
        self._streams += 1
        headers = (
            (":method", "POST"),
            (":scheme", "http"),
            (":path", path),
            (":authority", "localhost"),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
        )
        block = b"".join(b"\0" + _text(name) + _text(value) for name, value in headers)
        body = struct.pack(">BI", 0, len(message)) + message
        await self._send(
            _frame(_HEADERS, _END_HEADERS, stream, block) + _frame(_DATA, _END_STREAM, stream, body)
        )

    def vanish(self) -> None:
        """Closes the connection."""
        self._socket.close()

    async def _send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self._socket, data)


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    head = struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream)
    return head + payload


def _text(text: str) -> bytes:
    """A string of HPACK, neither compressed nor long."""
    data = text.encode()
    assert len(data) < 127
    return bytes([len(data)]) + data
