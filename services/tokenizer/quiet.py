"""Native decoders tell standard error what they stumble over: of a caller's file, which is no
business of a log. While one runs, nothing that native code writes there gets through.

Their libraries have switches for it, but none that reaches through libsndfile. What Python
writes is never lost: it has a descriptor of its own (miaotui/telemetry.py).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_STDERR = 2


class _Silence:
    """Descriptor 2 leads nowhere from the first decoder's begin to the last one's end."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._decoding = 0
        self._kept = -1

    def begin(self) -> None:
        with self._lock:
            if not self._decoding:
                self._kept = os.dup(_STDERR)
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, _STDERR)
                os.close(nowhere)
            self._decoding += 1

    def end(self) -> None:
        with self._lock:
            self._decoding -= 1
            if not self._decoding:
                os.dup2(self._kept, _STDERR)
                os.close(self._kept)


_silence = _Silence()


@contextmanager
def native_silence() -> Iterator[None]:
    """Leaves out what native code writes to standard error, from whatever thread, meanwhile."""
    _silence.begin()
    try:
        yield
    finally:
        _silence.end()
