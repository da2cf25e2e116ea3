"""A bound on what several threads hold together."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Budget:
    """So many units, of which each thread takes some for a while. Thread-safe."""

    def __init__(self, units: int) -> None:
        self._condition = threading.Condition()
        self._units = self._left = units

    @contextmanager
    def taking(self, units: int) -> Iterator[None]:
        """Waits until there are so many; more than there are at all counts as all."""
        units = min(units, self._units)
        with self._condition:
            self._condition.wait_for(lambda: self._left >= units)
            self._left -= units
        try:
            yield
        finally:
            with self._condition:
                self._left += units
                self._condition.notify_all()
