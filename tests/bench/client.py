"""`python -m tests.bench.client URL`: a lean HTTP client, as a child process.

Plain sockets kept alive: httpx takes longer over a request than the gateway does, and its time
is not the product's.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tests.bench.child import answer_lines


class Connection:
    """One connection; HTTP/1.1 as the gateway speaks it, with Content-Length."""

    def __init__(self, url: str) -> None:
        self._host, _, port = url.removeprefix("http://").rpartition(":")
        self._socket = socket.create_connection((self._host, int(port)))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def request(self, method: str, path: str, body: Any = None) -> Any:
        """The response's JSON; `RuntimeError` where the status is not 200."""
        data = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: {self._host}\r\n"
        if data:
            head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n"
        self._socket.sendall(f"{head}\r\n".encode() + data)
        received = b""
        while b"\r\n\r\n" not in received:
            received += self._receive()
        header, _, rest = received.partition(b"\r\n\r\n")
        status, *lines = header.decode("latin-1").lower().split("\r\n")
        length = next(int(line[15:]) for line in lines if line.startswith("content-length:"))
        while len(rest) < length:
            rest += self._receive()
        if " 200 " not in status:
            raise RuntimeError(f"{status}: {rest[:2000]!r}")
        return json.loads(rest)

    def _receive(self) -> bytes:
        data = self._socket.recv(65536)
        if not data:
            raise RuntimeError("the gateway closed the connection")
        return data


class Client:
    """What the child answers; times in seconds, JSON included."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._connection = Connection(url)

    def ask(self, body: Mapping[str, Any]) -> tuple[float, dict[str, float]]:
        """One question: seconds, and the milliseconds that the answer gives each hop."""
        started = time.perf_counter()
        answer = self._connection.request("POST", "/v1/qa", body)
        seconds = time.perf_counter() - started
        return seconds, {hop["hop"]: hop["milliseconds"] for hop in answer["timings"]}

    def healthz(self) -> float:
        """The least that the gateway can be asked for."""
        started = time.perf_counter()
        self._connection.request("GET", "/healthz")
        return time.perf_counter() - started

    def load(self, bodies: Sequence[Mapping[str, Any]], concurrency: int) -> float:
        """Questions a second, so many at a time."""
        return self.run(bodies, concurrency)[0]

    def run(
        self, bodies: Sequence[Mapping[str, Any]], concurrency: int, path: str = "/v1/qa"
    ) -> tuple[float, list[float], list[str]]:
        """Questions a second; each one's seconds, and its best answer, in the order given."""
        waiting = iter(enumerate(bodies))
        seconds, texts = [0.0] * len(bodies), [""] * len(bodies)
        taking = threading.Lock()
        failures: list[BaseException] = []

        def ask_on() -> None:
            try:
                connection = Connection(self._url)
                while True:
                    with taking:
                        item = next(waiting, None)
                    if item is None:
                        return
                    began = time.perf_counter()
                    answer = connection.request("POST", path, item[1])
                    seconds[item[0]] = time.perf_counter() - began
                    texts[item[0]] = answer["answers"][0]["text"] if answer["answers"] else ""
            except BaseException as error:  # noqa: BLE001 - the main thread raises it
                failures.append(error)

        threads = [threading.Thread(target=ask_on) for _ in range(concurrency)]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        return len(bodies) / (time.perf_counter() - started), seconds, texts


if __name__ == "__main__":
    client = Client(sys.argv[1])
    answer_lines(ask=client.ask, healthz=client.healthz, load=client.load, run=client.run)
