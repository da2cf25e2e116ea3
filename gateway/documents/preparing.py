"""Reading documents in a process of its own: it takes long, and files may be hostile."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import resource
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from typing import Any, NoReturn

from miaotui.retrieval.errors import UnreadableError
from miaotui.retrieval.prepare import Prepared, prepare_file, prepare_text
from miaotui.retrieval.reading import Limits

log = logging.getLogger(__name__)

_MEMORY_BYTES = 4 * 1024**3


class Preparer:
    """Turns files and texts into what a collection keeps, one after the other."""

    def __init__(self, limits: Limits, seconds: float) -> None:
        """`seconds`: what one document may take."""
        self._limits = limits
        self._seconds = seconds
        self._pool: ProcessPoolExecutor | None = None

    async def file(self, source: str, data: bytes) -> Prepared:
        """Reads a file. Raises `UnreadableError`."""
        return await self._run(prepare_file, source, data, self._limits)

    async def text(self, source: str, text: str, title: str) -> Prepared:
        """Takes a text as it is. Raises `UnreadableError` where it takes too long."""
        return await self._run(prepare_text, source, text, title)

    async def _run(self, work: Callable[..., Prepared], *arguments: Any) -> Prepared:
        if self._pool is None:
            # "spawn": a fork would take the parent's threads' locks along.
            self._pool = ProcessPoolExecutor(
                1, multiprocessing.get_context("spawn"), initializer=_begin
            )
        loop = asyncio.get_running_loop()
        pool = self._pool
        try:
            return await loop.run_in_executor(pool, _bounded, self._seconds, work, arguments)
        except BrokenProcessPool:
            log.error("the process that reads documents died; it is started again when needed")
            if self._pool is pool:
                self._pool = None
            raise UnreadableError("reading it brought its process down") from None

    def close(self) -> None:
        """Ends the process; what it works on is not finished."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None


def _begin() -> None:
    """Sets up the process: it ends with its parent, and takes no more memory than it should."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> NoReturn:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _bounded(seconds: float, work: Callable[..., Prepared], arguments: Any) -> Prepared:
    def stop(*_: object) -> NoReturn:
        raise UnreadableError(f"reading it takes more than {seconds:g} s; split it")

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return work(*arguments)
    except MemoryError:
        raise UnreadableError("reading it takes too much memory; split it") from None
    finally:
        with suppress(UnreadableError):
            signal.setitimer(signal.ITIMER_REAL, 0)
