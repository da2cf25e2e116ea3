"""Memory of the process that loads a stage."""

from __future__ import annotations

import ctypes
import sys


def trim_heap() -> None:
    """Return what loading has freed to the operating system.

    Tensors that were joined or packed leave holes in the heap of glibc's allocator, which keeps
    them: up to some 25 MB a stage. Does nothing with other allocators.
    """
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
