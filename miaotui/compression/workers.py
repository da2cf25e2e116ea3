"""Where the tasks of a compression run: in this process, or on Dask's workers."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Executor, Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import miaotui
from miaotui.compression import tasks
from miaotui.compression.errors import CompressionError

LOCAL = "local"
_P = ParamSpec("_P")
_T = TypeVar("_T")
_CONNECT_SECONDS = 30
_WORKERS_SECONDS = 30


class InProcess(Executor):
    """Runs each task as it is submitted."""

    def submit(self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        """Return a future that is done."""
        future: Future[_T] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 - the future raises it
            future.set_exception(error)
        return future


@contextmanager
def open_executor(
    dask: str | None, *, most: int, reads: Sequence[Path], writes: Path
) -> Iterator[Executor]:
    """Give what runs tasks; on leaving, what is not done is given up.

    Args:
        dask: None: this process. "local": a worker process for each core. Else a scheduler's
            address, such as "tcp://10.0.0.5:8786".
        most: tasks that there are at one time; no more local workers are started.
        reads, writes: files that all workers must see as this process sees them, and the folder
            that they write to.

    Raises:
        CompressionError: `distributed` is not installed, nothing answers at the address, it has
            no workers, they do not see the files, or they were lost.
    """
    if dask is None:
        try:
            yield InProcess()
        finally:
            tasks.forget()
        return
    try:
        import distributed
    except ImportError as error:
        raise CompressionError(
            "Dask is not installed, which runs tasks in parallel: pip install 'miaotui[compress]'"
        ) from error
    with _client(distributed, dask, most) as client:
        _check_workers(client, dask, reads, writes)
        executor: Executor = client.get_executor(pure=False)
        try:
            yield executor
        except distributed.KilledWorker as error:
            raise CompressionError(
                f"a task's worker was lost again and again; was its memory too small? {error}"
            ) from error
        except CancelledError as error:
            raise CompressionError(f"{dask}: the scheduler gave the tasks up") from error
        finally:
            executor.shutdown(wait=False)
            if dask != LOCAL and client.status == "running":
                client.run(tasks.forget, on_error="ignore")


@contextmanager
def _client(distributed: Any, dask: str, most: int) -> Iterator[Any]:
    if dask == LOCAL:
        # Workers that end while they compute say so; their end is wanted.
        with (
            distributed.LocalCluster(
                n_workers=max(1, min(len(os.sched_getaffinity(0)), most)),
                threads_per_worker=1,
                processes=True,
                dashboard_address=None,
                memory_limit=None,
                silence_logs=logging.CRITICAL,
            ) as cluster,
            distributed.Client(cluster) as client,
        ):
            yield client
        return
    try:
        client = distributed.Client(dask, timeout=_CONNECT_SECONDS)
    except (OSError, ValueError) as error:
        raise CompressionError(
            f"{dask}: no Dask scheduler answers there ({error}); give an address such as "
            "tcp://10.0.0.5:8786"
        ) from error
    with client:
        yield client


def _check_workers(client: Any, dask: str, reads: Sequence[Path], writes: Path) -> None:
    """Refuse workers that would fail later, or compute something else."""
    try:
        client.wait_for_workers(1, timeout=_WORKERS_SECONDS)
    except TimeoutError as error:
        raise CompressionError(
            f"{dask}: the scheduler has had no worker for {_WORKERS_SECONDS} seconds; start some "
            f"with: dask worker {dask}"
        ) from error
    try:
        found = client.run(_look, [str(path) for path in reads], str(writes))
    except Exception as error:  # whatever unpickling raises on a worker without the package
        raise CompressionError(
            f"{dask}: its workers cannot run Miaotui's code ({error!r}); install the same version "
            "of it there"
        ) from error
    version, sizes, _ = _look([str(path) for path in reads], str(writes))
    for worker, (its_version, its_sizes, writable) in found.items():
        if its_version != version:
            raise CompressionError(
                f"worker {worker} has Miaotui {its_version}, and this is {version}"
            )
        for path, here, there in zip(reads, sizes, its_sizes, strict=True):
            if here != there:
                raise CompressionError(
                    f"worker {worker} does not see {path}, or another file there; the model and "
                    "the questions must lie on a file system that all workers share"
                )
        if not writable:
            raise CompressionError(
                f"worker {worker} cannot write to {writes.parent}; the new directory must lie on "
                "a file system that all workers share"
            )


def _look(reads: Sequence[str], writes: str) -> tuple[str, list[int | None], bool]:
    """Miaotui's version here, files' sizes in bytes (None: not there), whether it can write."""
    sizes = [os.path.getsize(path) if os.path.exists(path) else None for path in reads]
    return miaotui.__version__, sizes, os.access(writes, os.W_OK)
