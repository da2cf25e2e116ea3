"""Batches that are computed side by side are sent one after another, in the order they set out."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self


class Turn:
    """A batch's turn to be sent. As a context manager: when it is left, the next one's comes."""

    __slots__ = ("_before", "_over")

    def __init__(self, before: asyncio.Event | None, over: asyncio.Event) -> None:
        self._before = before
        self._over = over

    async def comes(self) -> None:
        """Waits until the batch before has been sent, or never will be."""
        if self._before is not None:
            await self._before.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()


class SendOrder:
    """Hands out turns."""

    def __init__(self) -> None:
        self._last: asyncio.Event | None = None

    def next(self) -> Turn:
        """The turn after those handed out before."""
        before, self._last = self._last, asyncio.Event()
        return Turn(before, self._last)

    def forget(self) -> None:
        """Begins anew: a send that hangs on an old link must not hold up the new one."""
        self._last = None
