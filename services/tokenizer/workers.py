"""Where work runs: short work at once, long work on a thread."""

from __future__ import annotations

import asyncio
import contextvars
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from opentelemetry import metrics, trace

from miaotui.text.tokenizer import LONG_TEXT

T = TypeVar("T")


class BusyError(Exception):
    """More long texts wait than the service takes."""


class Workers:
    """Keeps the event loop responsive without making short requests wait for a thread.

    Up to `LONG_TEXT` characters take about a millisecond, and a hop to a thread and back
    a tenth of one; from there on, tokenisation releases the GIL.
    """

    def __init__(self, threads: int, max_waiting: int) -> None:
        """`threads` 0: one a core, four at most."""
        threads = threads or min(os.cpu_count() or 1, 4)
        self._pool = ThreadPoolExecutor(threads, "tokenizer")
        self._limit = threads + max_waiting
        self._held = 0
        self._queue = metrics.get_meter("miaotui.tokenizer").create_histogram(
            "miaotui.tokenizer.queue.duration", "s", "From a long text's arrival to its thread"
        )

    async def run(self, size: int, work: Callable[[], T]) -> T:
        """Does `work` on `size` characters or tokens. Raises `BusyError` and what it raises."""
        if size < LONG_TEXT:
            return work()
        if self._held >= self._limit:
            raise BusyError(f"{self._held} long texts are being tokenised; try again later")
        arrived = time.monotonic()
        started = arrived

        def timed() -> T:
            nonlocal started
            started = time.monotonic()
            return work()

        self._held += 1
        job = self._pool.submit(contextvars.copy_context().run, timed)
        # Counted down when the work ends: a caller that leaves does not stop its thread.
        loop = asyncio.get_running_loop()
        job.add_done_callback(lambda _: loop.call_soon_threadsafe(self._release))
        result = await asyncio.wrap_future(job)
        waited = started - arrived
        self._queue.record(waited)
        trace.get_current_span().set_attribute("miaotui.queue.seconds", waited)
        return result

    def _release(self) -> None:
        self._held -= 1

    def close(self) -> None:
        """Drops what waits; returns when what runs has ended."""
        self._pool.shutdown(cancel_futures=True)
