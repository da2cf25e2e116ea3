"""How many cores there are to compute on, and how the stages on one machine share them.

This module imports no torch: `configure_threads` has to run before torch is first imported.
"""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path


def configure_threads() -> None:
    """Set up OpenMP for stages that share cores; call before torch is first imported.

    Variables that the user has set are left as they are.

    Raises:
        RuntimeError: torch is imported already, so that OpenMP would not see the settings.
    """
    if "torch" in sys.modules:
        raise RuntimeError(
            "configure_threads() came after torch was imported; call it first in the service's "
            "main module, before any import that leads to torch"
        )
    if "OMP_WAIT_POLICY" not in os.environ:
        for name, value in openmp_environment().items():
            os.environ.setdefault(name, value)


def leave_other_cores() -> None:
    """Have numpy multiply on one thread; call before numpy is first imported.

    For services that compute little: after a product OpenBLAS's threads turn on their cores for
    a tenth of a second, in case there is another, and whatever stage has the request by then
    computes beside them. Measured on two cores: a question's vector after a search took 115 ms
    instead of 23. A number that the user has set is left as it is.

    Raises:
        RuntimeError: numpy is imported already, so that OpenBLAS would not see the setting.
    """
    if "OPENBLAS_NUM_THREADS" in os.environ:
        return
    if "numpy" in sys.modules:
        raise RuntimeError(
            "leave_other_cores() came after numpy was imported; call it first in the service's "
            "main module, before any import that leads to numpy"
        )
    os.environ["OPENBLAS_NUM_THREADS"] = "1"


def openmp_environment() -> dict[str, str]:
    """Return the environment variables that a process with a stage should run under.

    A layer is a dozen parallel loops with next to nothing between them. An OpenMP thread that
    sleeps there has to be woken for every one (OMP_WAIT_POLICY=passive), which costs as much
    as a second core gains: measured on two, 56 ms a small batch instead of 33. One that spins
    for long takes its core from the next stage, where the request is by then (libgomp's default
    is 300,000 turns: several milliseconds). So threads spin for under a millisecond, which
    covers a layer's gaps, and then sleep.

    libgomp keeps a team of threads for every thread that ever ran a parallel loop, and gives
    up spinning once a process has more of them than there are cores. So only the compute
    thread may have one; all others of a service must be told to use one thread.
    """
    return {
        "GOMP_SPINCOUNT": "40000",  # libgomp: turns of a loop of 10 to 40 ns
        "KMP_BLOCKTIME": "1",  # LLVM's and Intel's: milliseconds
    }


def available_cores(root: str = "/") -> int:
    """Return the cores that this process may use: its affinity, capped by its CPU quota.

    The quota is the tightest of this process's cgroup (v2 or v1) and those above it; a
    fraction counts as a whole core.

    Args:
        root: where `proc` and `sys` are looked for; for tests.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    quota = _cpu_quota(Path(root))
    return max(1, cores if quota is None else min(cores, math.ceil(quota)))


def threads_for(batches_in_flight: int, colocated_stages: int, cores: int) -> int:
    """Return the threads to compute one batch with: an equal share of the cores.

    As many stages compute at once as there are batches in flight, at most all of them; so a
    lone batch gets all cores, and a full pipeline shares them.
    """
    busy = min(max(1, batches_in_flight), max(1, colocated_stages))
    return max(1, cores // busy)


def _cpu_quota(root: Path) -> float | None:
    """Return the tightest CPU quota in cores, or None where there is none."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    quotas: list[float | None] = []
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if not controllers:
            mount, read = root / "sys/fs/cgroup", _quota_v2
        elif "cpu" in controllers.split(","):
            mount, read = root / "sys/fs/cgroup/cpu", _quota_v1
        else:
            continue
        # In a container the path may be the host's and not exist here; the mount itself
        # then shows the container's own group.
        group = mount / path.strip("/")
        while group != mount and mount in group.parents:
            quotas.append(read(group))
            group = group.parent
        quotas.append(read(mount))
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota_v2(group: Path) -> float | None:
    try:
        quota, period = (group / "cpu.max").read_text(encoding="ascii").split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _quota_v1(group: Path) -> float | None:
    try:
        quota = int((group / "cpu.cfs_quota_us").read_text(encoding="ascii"))
        period = int((group / "cpu.cfs_period_us").read_text(encoding="ascii"))
        return quota / period if quota > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None
