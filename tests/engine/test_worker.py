"""The compute thread: order, bounds, cancellation, errors, cores."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from miaotui.engine.threads import available_cores, threads_for
from miaotui.engine.worker import ComputeWorker, QueueFullError, WorkerClosedError
from miaotui.models.stage import StageBatch


class Fake:
    """Notes what it is called with; holds while `gate` is closed."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)
        self.seen: list[tuple[int, int, str]] = []

    def run(self, batch: StageBatch) -> torch.Tensor:
        name = threading.current_thread().name
        self.seen.append((batch.lengths[0], torch.get_num_threads(), name))
        self.entered.release()
        assert self.gate.wait(60)
        if batch.lengths[0] < 0:
            raise RuntimeError("broken")
        return torch.tensor([float(batch.lengths[0])])


@pytest.fixture
def fake() -> Fake:
    return Fake()


@pytest.fixture
def make(fake: Fake) -> Iterator[Callable[..., ComputeWorker]]:
    threads = torch.get_num_threads()
    workers: list[ComputeWorker] = []

    def build(**settings: Any) -> ComputeWorker:
        workers.append(ComputeWorker(fake, **settings))
        return workers[-1]

    yield build
    fake.gate.set()
    for worker in workers:
        assert worker.close(timeout=60)
    torch.set_num_threads(threads)


def test_in_order_on_one_other_thread(fake: Fake, make: Callable[..., ComputeWorker]) -> None:
    worker = make()
    futures = [worker.submit(StageBatch([n])) for n in range(1, 30)]
    assert [future.result(60).output.item() for future in futures] == list(range(1, 30))
    assert [entry[0] for entry in fake.seen] == list(range(1, 30))
    assert {entry[2] for entry in fake.seen} == {"compute"}


def test_times_are_kept_apart(fake: Fake, make: Callable[..., ComputeWorker]) -> None:
    worker = make()
    fake.gate.clear()
    first, second = worker.submit(StageBatch([1])), worker.submit(StageBatch([2]))
    assert fake.entered.acquire(timeout=60)
    time.sleep(0.05)
    fake.gate.set()
    one, two = first.result(60), second.result(60)
    assert one.finished - one.started >= 0.05
    assert two.started - two.submitted >= 0.05
    assert one.submitted <= one.started <= one.finished <= two.started <= two.finished


def test_a_full_queue_refuses_and_cancelled_batches_make_room(
    fake: Fake, make: Callable[..., ComputeWorker]
) -> None:
    worker = make(capacity=2)
    fake.gate.clear()
    running = worker.submit(StageBatch([1]))
    assert fake.entered.acquire(timeout=60)
    assert worker.busy
    waiting = [worker.submit(StageBatch([n])) for n in (2, 3)]
    assert worker.waiting == 2
    with pytest.raises(QueueFullError, match="try again later"):
        worker.submit(StageBatch([4]))
    assert waiting[0].cancel()
    assert worker.waiting == 1
    last = worker.submit(StageBatch([5]))
    assert not running.cancel()
    fake.gate.set()
    assert last.result(60).output.item() == 5
    assert [entry[0] for entry in fake.seen] == [1, 3, 5]


def test_a_batch_cancelled_in_its_place_is_skipped(
    fake: Fake, make: Callable[..., ComputeWorker]
) -> None:
    worker = make()
    fake.gate.clear()
    worker.submit(StageBatch([1]))
    skipped, last = worker.submit(StageBatch([2])), worker.submit(StageBatch([3]))
    skipped.cancel()
    fake.gate.set()
    last.result(60)
    assert [entry[0] for entry in fake.seen] == [1, 3]


def test_an_error_belongs_to_its_batch_alone(make: Callable[..., ComputeWorker]) -> None:
    worker = make()
    bad, good = worker.submit(StageBatch([-1])), worker.submit(StageBatch([1]))
    with pytest.raises(RuntimeError, match="broken"):
        bad.result(60)
    assert good.result(60).output.item() == 1


def test_cores_are_shared_by_what_is_in_flight(
    fake: Fake, make: Callable[..., ComputeWorker]
) -> None:
    worker = make(cores=4, colocated_stages=2)
    done = [worker.submit(StageBatch([1]), in_flight=n).result(60).threads for n in (1, 2, 3, 1)]
    assert done == [4, 2, 2, 4]
    assert [entry[1] for entry in fake.seen] == done


def test_closing_cancels_or_drains(fake: Fake, make: Callable[..., ComputeWorker]) -> None:
    for drain in (False, True):
        worker = make()
        fake.gate.clear()
        running = worker.submit(StageBatch([1]))
        assert fake.entered.acquire(timeout=60)
        waiting = worker.submit(StageBatch([2]))
        closer = threading.Thread(target=worker.close, kwargs={"drain": drain})
        closer.start()
        with pytest.raises(WorkerClosedError):
            while True:  # until the closer has come that far
                worker.submit(StageBatch([3])).cancel()
                time.sleep(0.01)
        fake.gate.set()
        closer.join(60)
        assert running.result(60).output.item() == 1
        assert waiting.cancelled() != drain
        assert not drain or waiting.result(60).output.item() == 2
        while fake.entered.acquire(blocking=False):
            pass


def test_an_event_loop_waits_without_blocking(
    fake: Fake, make: Callable[..., ComputeWorker]
) -> None:
    worker = make()
    fake.gate.clear()

    async def ask() -> float:
        future = asyncio.wrap_future(worker.submit(StageBatch([7])))
        await asyncio.sleep(0.01)  # the loop runs on while the batch is held up
        assert not future.done()
        fake.gate.set()
        return float((await future).output.item())

    assert asyncio.run(ask()) == 7


def test_idle_threads_keep_no_tensors_alive(make: Callable[..., ComputeWorker]) -> None:
    worker = make()
    future = worker.submit(StageBatch([1]))
    output = weakref.ref(future.result(60).output)
    del future
    for _ in range(3000):
        gc.collect()
        if output() is None:
            return
        time.sleep(0.01)
    pytest.fail("the worker still holds the last output")


def test_preparation_comes_first_and_may_fail(fake: Fake) -> None:
    def prepare() -> None:
        fake.run(StageBatch([100]))
        raise RuntimeError("cold")

    worker = ComputeWorker(fake, prepare=prepare)
    assert worker.submit(StageBatch([1])).result(60).output.item() == 1
    assert [entry[0] for entry in fake.seen] == [100, 1]
    assert worker.close(timeout=60)


def test_numbers_below_one_are_refused(fake: Fake) -> None:
    for name in ("capacity", "colocated_stages", "cores"):
        below: Any = {name: 0}
        with pytest.raises(ValueError, match="at least 1"):
            ComputeWorker(fake, **below)


@pytest.mark.parametrize(
    ("in_flight", "stages", "cores", "threads"),
    [(1, 3, 8, 8), (2, 3, 8, 4), (3, 3, 8, 2), (9, 3, 8, 2), (9, 3, 2, 1), (0, 0, 2, 2)],
)
def test_threads_for(in_flight: int, stages: int, cores: int, threads: int) -> None:
    assert threads_for(in_flight, stages, cores) == threads


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000"}, 2),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000"}, None),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/cpu.max": "max 100000",
                "sys/fs/cgroup/a/cpu.max": "50000 100000",
            },
            1,
        ),
        # Seen from inside a container, the path is the host's.
        ({"proc/self/cgroup": "0::/docker/x\n", "sys/fs/cgroup/cpu.max": "100000 100000"}, 1),
        (
            {
                "proc/self/cgroup": "2:cpuacct,cpu:/g\n1:memory:/\n",
                "sys/fs/cgroup/cpu/g/cpu.cfs_quota_us": "100000",
                "sys/fs/cgroup/cpu/g/cpu.cfs_period_us": "100000",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            1,
        ),
        ({"proc/self/cgroup": "garbage\n0::/\n", "sys/fs/cgroup/cpu.max": "what"}, None),
    ],
)
def test_available_cores_heed_quotas(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    files: dict[str, str],
    limit: int | None,
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))
    for name, content in files.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    assert available_cores(str(tmp_path)) == (limit or 16)


def test_threads_are_configured_before_torch_or_not_at_all() -> None:
    code = (
        "import os, sys; e = os.environ; e.pop('GOMP_SPINCOUNT', None)\n"
        "from miaotui.engine.threads import configure_threads as c\n"
        "assert 'torch' not in sys.modules\n"
        "e['OMP_WAIT_POLICY'] = 'active'; c(); print('GOMP_SPINCOUNT' in e)\n"
        "del e['OMP_WAIT_POLICY']; c(); print(int(e['GOMP_SPINCOUNT']) > 0)\n"
        "e['GOMP_SPINCOUNT'] = '7'; c(); print(e['GOMP_SPINCOUNT']); sys.modules['torch'] = sys\n"
        "try: c()\n"
        "except RuntimeError as e: print('before any import' in str(e))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "7", "True"]


def test_numpy_multiplies_on_one_thread_or_says_that_it_is_too_late() -> None:
    code = (
        "import os, sys; e = os.environ; e.pop('OPENBLAS_NUM_THREADS', None)\n"
        "from miaotui.engine.threads import leave_other_cores as c\n"
        "assert 'numpy' not in sys.modules\n"
        "e['OPENBLAS_NUM_THREADS'] = '3'; c(); print(e.pop('OPENBLAS_NUM_THREADS')); c()\n"
        "import numpy as np; a = np.ones((800, 800)); a @ a\n"
        "print(len(os.listdir('/proc/self/task')))\n"
        "del e['OPENBLAS_NUM_THREADS']\n"
        "try: c()\n"
        "except RuntimeError as e: print('before any import' in str(e))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3", "1", "True"]


def test_an_event_loop_does_not_start_a_team_of_its_own() -> None:
    code = (
        "import os, torch\n"
        "from miaotui.engine.worker import ComputeWorker, stay_on_one_thread\n"
        "stay_on_one_thread()\n"
        "class Model:\n"
        "    def run(self, batch): return torch.randn(400, 400) @ torch.randn(400, 400)\n"
        "worker = ComputeWorker(Model(), cores=2)\n"
        "print(worker.submit(None).result().threads)\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "torch.randn(400, 400).clone()\n"
        "print(len(os.listdir('/proc/self/task')) - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "0"]


def test_rehearsals_wait_for_work(fake: Fake, make: Callable[..., ComputeWorker]) -> None:
    computed: list[int] = []
    going, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def rehearse() -> Iterator[int]:
        for step in range(3):
            going.set()
            assert go_on.wait(60)
            computed.append(len(fake.seen))
            yield step
        ended.set()

    worker = make(rehearse=rehearse, cores=1)
    assert going.wait(60)
    done = worker.submit(StageBatch([7]))
    assert not done.done()
    go_on.set()
    assert done.result(60).output.item() == 7
    assert ended.wait(60)
    # The batch waited for the step that was going on, and no other.
    assert computed == [0, 1, 1]


def test_nothing_is_rehearsed_between_one_batch_and_the_next(
    make: Callable[..., ComputeWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    ended = threading.Event()

    def rehearse() -> Iterator[int]:
        steps.append(0)
        yield 0
        ended.set()

    monkeypatch.setattr("miaotui.engine.worker._QUIET_SECONDS", 60.0)
    worker = make(rehearse=rehearse, cores=1)
    for _ in range(3):
        assert worker.submit(StageBatch([7])).result(60).output.item() == 7
        time.sleep(0.1)
    assert not steps
    assert not worker.busy
    monkeypatch.setattr("miaotui.engine.worker._QUIET_SECONDS", 0.0)
    worker.submit(StageBatch([7])).result(60)
    assert ended.wait(60)


def test_every_number_of_threads_is_rehearsed(make: Callable[..., ComputeWorker]) -> None:
    steps: list[tuple[int, int]] = []
    ended = threading.Event()

    def rehearse() -> Iterator[int]:
        for step in range(2):
            steps.append((step, torch.get_num_threads()))
            yield step
        if steps[-1] == (1, 1):
            ended.set()

    worker = make(rehearse=rehearse, cores=2, colocated_stages=3)
    assert ended.wait(60)
    assert steps == [(0, 2), (1, 2), (0, 1), (1, 1)]
    assert worker.submit(StageBatch([5])).result(60).output.item() == 5


def test_a_failed_rehearsal_leaves_the_worker_alive(make: Callable[..., ComputeWorker]) -> None:
    def rehearse() -> Iterator[int]:
        yield 0
        raise RuntimeError("broken")

    worker = make(rehearse=rehearse)
    assert worker.submit(StageBatch([5])).result(60).output.item() == 5
