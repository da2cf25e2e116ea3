"""Compressions on Dask's workers: what this process finds, and nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from miaotui.compression import CompressionError, compress_model
from miaotui.compression.budget import Found, compress_within
from miaotui.models.fingerprint import model_fingerprint
from tests.processes import clean_environment, free_port

METHODS = ("int8", "prune-neurons=0.5,int8-static", "prune-layers=9")


def found_by(model: Path, questions: Path, out: Path, dask: str | None) -> Found:
    return compress_within(
        model,
        out,
        max_loss=100.0,
        evaluate=[questions],
        calibrate=[questions],
        methods=METHODS,
        dask=dask,
    )


def scores(found: Found) -> list[Any]:
    """All that does not depend on time."""
    return [
        (one.method, one.refused, one.f1_loss)
        if one.measured is None
        else (
            one.method,
            one.f1_loss,
            one.measured.em,
            one.measured.f1,
            one.measured.memory_bytes,
            one.measured.questions,
        )
        for one in found.tried
    ]


@pytest.fixture(scope="module")
def here(model: Path, questions: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    return found_by(model, questions, tmp_path_factory.mktemp("here") / "out", None)


@dataclass
class Scheduler:
    address: str
    folder: Path


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scheduler]:
    """Dask's own scheduler and a worker, as they run on a cluster: with other folders."""
    folder = tmp_path_factory.mktemp("dask")
    address = f"tcp://127.0.0.1:{free_port()}"
    commands = (
        ["distributed.cli.dask_scheduler", "--host", address, "--no-dashboard"],
        ["distributed.cli.dask_worker", address, "--no-nanny", "--no-dashboard", "--nthreads", "2"],
    )
    environment = clean_environment()
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    log = folder / "log"
    with log.open("wb") as output:
        started = [
            subprocess.Popen(
                [sys.executable, "-m", *command],
                cwd=folder,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            for command in commands
        ]
    try:
        yield Scheduler(address, folder)
    finally:
        for process in reversed(started):
            process.terminate()
        # Dask's own processes: how long they take to leave on a busy machine is not the test.
        for process in reversed(started):
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.mark.skipif(
    os.environ.get("MIAOTUI_FULL") != "1",
    reason="each local worker imports torch: half a minute; MIAOTUI_FULL=1 runs it",
)
def test_local_workers_find_the_same(
    model: Path, questions: Path, here: Found, tmp_path: Path
) -> None:
    found = found_by(model, questions, tmp_path / "out", "local")
    assert scores(found) == scores(here)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not _workers(os.getpid())


def test_a_cluster_finds_the_same(
    model: Path,
    questions: Path,
    here: Found,
    scheduler: Scheduler,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _wait_for_scheduler(scheduler)
    found = found_by(model, questions, tmp_path / "out", scheduler.address)
    assert scores(found) == scores(here)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    # By paths relative to here, which is no worker's folder.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "squad.json").write_bytes(questions.read_bytes())
    seen: list[tuple[int, int]] = []
    report = compress_model(
        model,
        "one",
        method="int8-static",
        calibrate=["squad.json"],
        dask=scheduler.address,
        advance=lambda done, total: seen.append((done, total)),
    )
    assert seen[-1] == (3, 3)
    assert report.after.memory_bytes < report.before.memory_bytes
    compress_model(model, "other", method="int8-static", calibrate=["squad.json"])
    assert model_fingerprint("one") == model_fingerprint("other")


def test_refused_workers(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CompressionError, match="no Dask scheduler answers"):
        compress_model(model, tmp_path / "out", dask="nonsense://x")
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(CompressionError, match=r"miaotui\[compress\]"):
        compress_model(model, tmp_path / "out", dask="local")
    assert not list(tmp_path.iterdir())


def _workers(pid: int) -> list[psutil.Process]:
    """Processes that Dask started under one; multiprocessing's own helper may stay."""
    return [
        child
        for child in psutil.Process(pid).children(recursive=True)
        if "spawn_main" in " ".join(child.cmdline())
    ]


def _wait_for_scheduler(scheduler: Scheduler) -> None:
    deadline = time.monotonic() + 180
    log = scheduler.folder / "log"
    while "Registered to:" not in (told := log.read_text(encoding="utf-8")):
        assert time.monotonic() < deadline, told
        time.sleep(0.1)
