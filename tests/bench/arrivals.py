"""`python -m tests.bench.arrivals URL`: requests that come at a rate, whether answered or not.

An open loop: users do not wait for each other, and neither do these requests (Schroeder et al.,
"Open versus closed", NSDI 2006). One thread and prepared bytes, so that the client takes little
of the cores that it measures.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import select
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from tests.bench.child import answer_lines


@dataclass
class Told:
    """What came back, in seconds, by what it was."""

    answered: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    failed: int = 0


class Arrivals:
    """Requests over kept connections, opened as needed."""

    def __init__(self, url: str) -> None:
        self._host, _, port = url.removeprefix("http://").rpartition(":")
        self._port = int(port)
        self._free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._came: list[tuple[float, int]] = []  # when, and the status

    def offer(
        self, bodies: Sequence[Mapping[str, Any]], rate: float, seconds: float, path: str
    ) -> dict[str, Any]:
        """Poisson arrivals of `rate` a second; waits for all of them.

        Those of the first fifth of the time fill the queues and are not counted. Refused are
        those answered 429 or 503.
        """
        return asyncio.run(self._offer([self._bytes(body, path) for body in bodies], rate, seconds))

    def flood(self, body: Mapping[str, Any], count: int, at_once: int, path: str) -> float:
        """Requests a second, all of them equal, so many at a time.

        Raises `RuntimeError` where one is not answered with 200.
        """
        return _flood((self._host, self._port), self._bytes(body, path), count, at_once)

    def _bytes(self, body: Mapping[str, Any], path: str) -> bytes:
        data = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {self._host}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(data)}\r\n\r\n"
        )
        return head.encode() + data

    async def _offer(
        self, requests: Sequence[bytes], rate: float, seconds: float
    ) -> dict[str, Any]:
        self._free, self._came = [], []
        rng = random.Random(int(rate * 1000))
        began = time.perf_counter()
        counted, told, at, number = began + seconds / 5, Told(), began, 0
        tasks: list[asyncio.Task[None]] = []
        while at < began + seconds:
            await asyncio.sleep(max(0.0, at - time.perf_counter()))
            into = told if at >= counted else Told()
            tasks.append(asyncio.create_task(self._ask(requests[number % len(requests)], into)))
            number += 1
            at += rng.expovariate(rate)
        end = time.perf_counter()
        await asyncio.gather(*tasks)
        for _, writer in self._free:
            writer.close()
        return {
            "answered_a_second": self._rate(200, counted, end),
            "refused_a_second": self._rate(429, counted, end) + self._rate(503, counted, end),
            "answered": told.answered,
            "refused": told.refused,
            "failed": told.failed,
        }

    def _rate(self, status: int, since: float, until: float) -> float:
        # By when the answers came, not the requests: what is queued at the end is not capacity.
        came = sum(since <= at <= until for at, what in self._came if what == status)
        return came / (until - since)

    async def _ask(self, request: bytes, told: Told) -> None:
        began = time.perf_counter()
        try:
            if self._free:
                reader, writer = self._free.pop()
            else:
                reader, writer = await asyncio.open_connection(self._host, self._port)
            writer.write(request)
            status, _, kept = await _response(reader)
        except (OSError, asyncio.IncompleteReadError):
            told.failed += 1
            return
        if kept:
            self._free.append((reader, writer))
        else:
            writer.close()
        now = time.perf_counter()
        self._came.append((now, status))
        seconds = now - began
        if status == 200:
            told.answered.append(seconds)
        elif status in (429, 503):
            told.refused.append(seconds)
        else:
            told.failed += 1


def _flood(address: tuple[str, int], request: bytes, count: int, at_once: int) -> float:
    """Without asyncio: its streams take longer over a request than a bare handler does."""
    poll = select.epoll()
    with ExitStack() as stack:
        stack.callback(poll.close)
        sockets = {}
        for _ in range(min(at_once, count)):
            one = stack.enter_context(socket.create_connection(address))
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sockets[one.fileno()] = one
            poll.register(one, select.EPOLLIN)
        held = dict.fromkeys(sockets, b"")
        began = time.perf_counter()
        for one in sockets.values():
            one.sendall(request)
        sent, done = len(sockets), 0
        while done < count:
            for file, _ in poll.poll():
                received = sockets[file].recv(65536)
                held[file] += received
                if not received:
                    raise RuntimeError("the server closed the connection")
                if not _whole(held[file]):
                    continue
                if held[file][9:12] != b"200":
                    raise RuntimeError(f"answered with {held[file][:500]!r}")
                held[file] = b""
                done += 1
                if sent < count:
                    sent += 1
                    sockets[file].sendall(request)
        return count / (time.perf_counter() - began)


_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)


def _whole(response: bytes) -> bool:
    head = response.find(b"\r\n\r\n")
    length = _LENGTH.search(response, 0, head) if head > 0 else None
    return length is not None and len(response) >= head + 4 + int(length[1])


async def _response(reader: asyncio.StreamReader) -> tuple[int, bytes, bool]:
    """Status, body, and whether the connection is kept."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    at = head.index(b"content-length:") + 15
    length = int(head[at : head.index(b"\r", at)])
    return int(head[9:12]), await reader.readexactly(length), b"connection: close" not in head


if __name__ == "__main__":
    arrivals = Arrivals(sys.argv[1])
    answer_lines(offer=arrivals.offer, flood=arrivals.flood)
