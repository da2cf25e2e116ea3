"""How many requests are worked on at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from gateway.errors import GatewayError


class Slots:
    """Requests of one kind, those that wait for a model's return among them."""

    def __init__(self, most: int, changed: Callable[[int], None] = lambda _: None) -> None:
        """`changed` (by 1 or -1) is told of for metrics."""
        self._most, self._changed = most, changed
        self._taken = 0

    @contextmanager
    def one(self, refused: Callable[[], None]) -> Iterator[None]:
        """Holds one. Raises `GatewayError` (overloaded) at once where all are taken.

        `refused` is told of that, for metrics.
        """
        if self._taken >= self._most:
            refused()
            raise GatewayError("overloaded", "The gateway works on as many requests as it may.")
        self._taken += 1
        self._changed(1)
        try:
            yield
        finally:
            self._taken -= 1
            self._changed(-1)
