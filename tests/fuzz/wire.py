"""A plain HTTP/1.1 client that sends whatever bytes it is given."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from tests.fuzz.cases import HANG_SECONDS, Finding


@dataclass(frozen=True)
class Reply:
    """A response; header names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes


class Connection:
    """One connection at a time, kept as long as the server does."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def send(self, data: bytes, method: str, *, whole: bool = True) -> Reply | None:
        """Sends bytes; returns the response, `None` where the server closed without one.

        Without `whole`, nothing more follows: the sending half is closed.
        """
        try:
            async with asyncio.timeout(HANG_SECONDS):
                kept = self._streams is not None
                reply = await self._exchange(data, method, whole)
                if reply is None and kept and whole:
                    # The server may close a connection that idles just as a request sets out.
                    reply = await self._exchange(data, method, whole)
                return reply
        except TimeoutError:
            self.close()
            raise Finding(f"no response within {HANG_SECONDS:.0f} s") from None

    async def _exchange(self, data: bytes, method: str, whole: bool) -> Reply | None:
        if self._streams is None:
            limit = 256 * 1024
            self._streams = await asyncio.open_connection("127.0.0.1", self._port, limit=limit)
        reader, writer = self._streams
        try:
            writer.write(data)
            await writer.drain()
            if not whole:
                writer.write_eof()
        except (ConnectionError, OSError):
            pass  # it may have answered, and closed, before it had read all
        try:
            reply = await _read(reader, method)
        except (asyncio.IncompleteReadError, ConnectionError):
            self.close()
            return None
        if not whole or reply.headers.get("connection", "").lower() == "close":
            self.close()
        return reply

    def close(self) -> None:
        """Closes it; the next `send` opens another."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


async def _read(reader: asyncio.StreamReader, method: str) -> Reply:
    head = await reader.readuntil(b"\r\n\r\n")
    first, *lines = head[:-4].split(b"\r\n")
    parts = first.split(b" ", 2)
    if len(parts) < 2 or not parts[0].startswith(b"HTTP/1.") or not parts[1].isdigit():
        raise Finding(f"not a status line: {first[:100]!r}")
    status = int(parts[1])
    headers = {}
    for line in lines:
        name, _, value = line.partition(b":")
        headers[name.decode("latin-1").lower()] = value.strip().decode("latin-1")
    if status == 100:
        return await _read(reader, method)
    body = b""
    if method != "HEAD" and status not in (204, 304):
        if headers.get("transfer-encoding") == "chunked":
            while size := int(await reader.readuntil(b"\r\n"), 16):
                body += (await reader.readexactly(size + 2))[:-2]
            await reader.readuntil(b"\r\n")
        elif "content-length" in headers:
            body = await reader.readexactly(int(headers["content-length"]))
        else:
            body = await reader.read()
    return Reply(status, headers, body)
