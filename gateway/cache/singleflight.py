"""Equal requests in flight cost one computation."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, Generic, TypeVar

from opentelemetry import trace
from opentelemetry.trace import SpanContext

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class Flight(Generic[T]):
    """A computation and how many wait for it."""

    __slots__ = ("context", "task", "waiters")

    def __init__(self, task: asyncio.Task[T]) -> None:
        self.task = task
        self.waiters = 0
        self.context: SpanContext = trace.get_current_span().get_span_context()


class SingleFlight(Generic[K, T]):
    """Runs one computation a key at a time; whoever asks meanwhile waits for it.

    A waiter that is cancelled only stops waiting. When the last one has gone, the
    computation is cancelled.
    """

    def __init__(self) -> None:
        self._flights: dict[K, Flight[T]] = {}

    def __len__(self) -> int:
        return len(self._flights)

    def join(self, key: K) -> Flight[T] | None:
        """The flight for `key` that can be waited for; `None` where there is none."""
        return self._flights.get(key)

    def start(self, key: K, compute: Callable[[], Coroutine[Any, Any, T]]) -> Flight[T]:
        """Starts the computation for `key`; none may be in flight."""
        task = asyncio.get_running_loop().create_task(compute())
        flight = self._flights[key] = Flight(task)
        task.add_done_callback(lambda _: self._forget(key, flight))
        return flight

    def _forget(self, key: K, flight: Flight[T]) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]
        if not flight.task.cancelled():
            flight.task.exception()  # seen, even if nobody waits any more

    async def wait(self, key: K, flight: Flight[T]) -> T:
        """Waits for a flight and returns, or raises, what its computation does."""
        flight.waiters += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.waiters -= 1
            if not flight.waiters and not flight.task.done():
                # Nobody may join a computation that is on its way out.
                if self._flights.get(key) is flight:
                    del self._flights[key]
                flight.task.cancel()
