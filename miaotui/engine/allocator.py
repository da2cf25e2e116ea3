"""How this process's C allocator treats the large, short-lived tensors of a forward pass."""

from __future__ import annotations

import ctypes

# From glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGEST = 1 << 30


def keep_freed_memory() -> bool:
    """Lets malloc reuse the pages of freed tensors instead of returning them at once.

    By default glibc maps each allocation above a threshold anew, and every layer's
    intermediate tensors are page-faulted in again for every batch: about an eighth of a small
    batch's time. The process keeps its peak afterwards, which the batch size bounds.

    Returns whether the allocator took the setting; only glibc has it.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST) and mallopt(_M_TRIM_THRESHOLD, _LARGEST))
