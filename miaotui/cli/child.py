"""Becomes a supervised service that cannot outlive its supervisor.

`python child.py PARENT_PID PROGRAM ARGUMENT…`. On Linux the kernel kills this process as
soon as the parent is gone, `kill -9` included. A program of its own rather than a
`preexec_fn`, which may deadlock in a process that has threads (gRPC's).
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Asks the kernel for SIGKILL at the parent's death; does nothing outside of Linux."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl(PR_SET_PDEATHSIG): {os.strerror(error)}")
    if os.getppid() != parent:  # it died before the request took effect
        os._exit(1)


def main(argv: list[str]) -> None:
    """Replaces this process by the program; the death signal survives that."""
    die_with_parent(int(argv[1]))
    try:
        os.execv(argv[2], argv[2:])
    except OSError as error:
        sys.exit(f"cannot run {argv[2]}: {error.strerror}")


if __name__ == "__main__":
    main(sys.argv)
