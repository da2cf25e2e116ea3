"""Text that comes from a gateway bit by bit: server-sent events as OpenAI's API has them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Mapping
from types import TracebackType
from typing import Any, Self

import httpx


class MiaotuiError(Exception):
    """No answer. `status`: HTTP status, 0 where no gateway was reached."""

    def __init__(self, message: str, status: int = 0, problem: Mapping[str, Any] | None = None):
        super().__init__(message)
        self.status = status
        self.problem = dict(problem or {})


def read_error(body: Any, status: int) -> MiaotuiError:
    """The error of a body in OpenAI's shape."""
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict):
        return MiaotuiError("the gateway gave no text and no reason", status)
    return MiaotuiError(str(error.get("message", "no text")), status, error)


class ClosedOnExit:
    """A context manager that closes itself when it is left."""

    def close(self) -> None:
        """Closes it."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class AsyncClosedOnExit:
    """The same for asyncio."""

    async def close(self) -> None:
        """Closes it."""
        raise NotImplementedError

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()


class _Reading:
    """What has come so far."""

    def __init__(self) -> None:
        self.text = ""
        """All pieces so far."""
        self.finish_reason: str | None = None
        """After the last piece: "stop" or "length"."""
        self.usage: dict[str, Any] = {}
        """After the last piece: the usage figures."""
        self._whole = False

    def _take(self, line: str) -> str:
        """The piece of one line of the stream; empty where it holds none."""
        if not line.startswith("data: "):
            return ""
        data = line[6:]
        if data == "[DONE]":
            self._whole = True
            return ""
        chunk = json.loads(data)
        if "error" in chunk:
            raise read_error(chunk, 200)
        self.usage = chunk.get("usage") or self.usage
        piece = ""
        for choice in chunk["choices"]:
            piece += choice["delta"].get("content", "") if "delta" in choice else choice["text"]
            self.finish_reason = choice["finish_reason"] or self.finish_reason
        self.text += piece
        return piece

    def _check_whole(self) -> None:
        if not self._whole:
            raise MiaotuiError("the gateway ended the text too early")


class TextStream(_Reading, ClosedOnExit):
    """Iterate over it for the pieces. As a context manager it ends the work when left."""

    def __init__(self, response: httpx.Response) -> None:
        super().__init__()
        self._response = response
        self._pieces = self._read()

    def _read(self) -> Iterator[str]:
        try:
            for line in self._response.iter_lines():
                if piece := self._take(line):
                    yield piece
        except httpx.TransportError as error:
            raise MiaotuiError(f"the connection broke ({type(error).__name__})") from error
        finally:
            self._response.close()
        self._check_whole()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Closes the connection, which ends the work at the gateway."""
        self._response.close()


class AsyncTextStream(_Reading, AsyncClosedOnExit):
    """The same for asyncio."""

    def __init__(self, response: httpx.Response) -> None:
        super().__init__()
        self._response = response
        self._pieces = self._read()

    async def _read(self) -> AsyncIterator[str]:
        try:
            async for line in self._response.aiter_lines():
                if piece := self._take(line):
                    yield piece
        except httpx.TransportError as error:
            raise MiaotuiError(f"the connection broke ({type(error).__name__})") from error
        finally:
            await self._response.aclose()
        self._check_whole()

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    async def __anext__(self) -> str:
        return await anext(self._pieces)

    async def close(self) -> None:
        """Closes the connection, which ends the work at the gateway."""
        await self._response.aclose()
