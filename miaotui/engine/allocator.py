"""How this process's C allocator treats large, short-lived buffers: tensors, bodies, messages."""

from __future__ import annotations

import ctypes

# From glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
_LARGEST = 1 << 30
_BUFFER = 128 << 10


def keep_freed_memory() -> bool:
    """Lets malloc reuse the pages of freed tensors instead of returning them at once.

    By default glibc maps each allocation above a threshold anew, and every layer's
    intermediate tensors are page-faulted in again for every batch: about an eighth of a small
    batch's time. The process keeps its peak afterwards, which the batch size bounds.

    Returns whether the allocator took the setting; only glibc has it.
    """
    return _set((_M_MMAP_THRESHOLD, _LARGEST), (_M_TRIM_THRESHOLD, _LARGEST))


def return_freed_memory() -> bool:
    """Lets malloc return large buffers to the operating system as soon as they are freed.

    By default glibc takes buffers from a heap of each thread's own, once one as large has been
    freed, and what a cache keeps lies between them: a service of large bodies and long-lived
    caches holds on to holes as large as what it uses. To be called before threads start.

    Returns whether the allocator took the setting; only glibc has it.
    """
    return _set((_M_ARENA_MAX, 2), (_M_MMAP_THRESHOLD, _BUFFER))


def _set(*options: tuple[int, int]) -> bool:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all(mallopt(name, value) for name, value in options)
