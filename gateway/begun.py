"""Work that mostly has nothing to wait for: what guards it costs something only where it waits.

A timer, or a task that watches a connection, takes longer to set up and to take down than a
look into this process's memory takes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Generator
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Begun(Generator[Any, Any, T], Generic[T]):
    """A coroutine that has run in the current task until it first had to wait, or to its end.

    What it raises before that is raised here. If it is not `done`, await it in the same task.
    """

    __slots__ = ("_passed_on", "_waits_for", "_work", "done", "result")

    result: T
    """What it returned, where it is `done`."""

    def __init__(self, work: Coroutine[Any, Any, T]) -> None:
        self._work = work
        self._passed_on = False
        self.done = False
        try:
            self._waits_for = work.send(None)
        except StopIteration as ended:
            self.done, self.result = True, ended.value

    def __await__(self) -> Generator[Any, Any, T]:
        return self

    def send(self, value: Any) -> Any:
        """Goes on; the first time, passes on to the event loop what is waited for."""
        if not self._passed_on:
            self._passed_on = True
            return self._waits_for
        return self._work.send(value)

    def throw(self, *error: Any) -> Any:
        """Goes on with an error, such as a cancellation."""
        return self._work.throw(*error)

    def close(self) -> None:
        """Ends it where it waits."""
        self._work.close()


async def within(seconds: float, work: Coroutine[Any, Any, T]) -> T:
    """Awaits `work` for so long from its first wait. Raises `TimeoutError`, having cancelled it."""
    begun = Begun(work)
    if begun.done:
        return begun.result
    async with asyncio.timeout(seconds):
        return await begun
