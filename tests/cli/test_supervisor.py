"""The supervisor over small real processes: start, restart, give up, stop in order."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from miaotui.cli.output import Output
from miaotui.cli.probes import Health
from miaotui.cli.supervisor import Service, StartError, Supervisor

# Says that it is up by a file, runs until SIGTERM, and notes when it stopped.
_WELL_BEHAVED = """
import pathlib, signal, sys, time
up, order, name = map(pathlib.Path, sys.argv[1:4])
def stop(*_):
    up.unlink()
    with order.open("a") as log: log.write(f"{name}\\n")
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
up.touch()
print(f"{name} is up", flush=True)
while True: time.sleep(0.05)
"""


class Bench:
    """A supervisor, its printed lines, and services made of Python snippets."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.text = io.StringIO()
        self.order = directory / "order"
        self.supervisor: Supervisor | None = None

    def well_behaved(self, name: str, stop_order: int = 0) -> Service:
        up = self.directory / f"{name}.up"
        argv = (sys.executable, "-c", _WELL_BEHAVED, str(up), str(self.order), name)
        return Service(name, argv, {}, _exists(up), stop_order)

    def script(self, name: str, code: str) -> Service:
        return Service(name, (sys.executable, "-c", code), {}, _exists(self.directory / name), 0)

    def supervise(self, *services: Service, grace: float = 60.0) -> Supervisor:
        console = Console(file=self.text, width=200)
        self.supervisor = Supervisor(services, Output(console), grace=grace)
        return self.supervisor

    @property
    def printed(self) -> str:
        return self.text.getvalue()


def _exists(path: Path) -> Callable[[], Awaitable[Health]]:
    found = path.exists

    async def probe() -> Health:
        return Health(found(), "the file is missing")

    return probe


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    made = Bench(tmp_path)
    yield made
    if made.supervisor is not None:
        made.supervisor.kill()
        await made.supervisor.stop()


async def _until(condition: Callable[[], bool], what: str, timeout: float = 60.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"never came true: {what}"
        await asyncio.sleep(0.02)


async def test_starts_all_names_their_lines_and_stops_in_order(bench: Bench) -> None:
    services = [bench.well_behaved(name, order) for name, order in (("c", 2), ("b", 1), ("a", 0))]
    supervisor = bench.supervise(*services)
    await supervisor.start(timeout=60)
    pids = supervisor.pids
    assert set(pids) == {"a", "b", "c"}
    await supervisor.stop()
    assert bench.order.read_text().split() == ["a", "b", "c"]
    assert not any(psutil.pid_exists(pid) for pid in pids.values())
    for name in "abc":
        assert f"      {name} │ {name} is up" in bench.printed
        assert f"miaotui │ {name} is ready" in bench.printed


async def test_restarts_what_dies_and_says_so(bench: Bench) -> None:
    supervisor = bench.supervise(bench.well_behaved("a"), bench.well_behaved("b"))
    await supervisor.start(timeout=60)
    before = supervisor.pids
    (bench.directory / "a.up").unlink()
    os.kill(before["a"], signal.SIGKILL)
    await _until(lambda: "a is ready again" in bench.printed, "a is ready again")
    after = supervisor.pids
    assert after["a"] != before["a"]
    assert after["b"] == before["b"]
    assert "a was ended by SIGKILL; restarted in 0.5 s" in bench.printed
    assert not supervisor.failed.done()


async def test_configuration_error_stops_at_once_and_shows_why(bench: Bench) -> None:
    wrong = bench.script("wrong", "import sys; print('the model is missing'); sys.exit(2)")
    supervisor = bench.supervise(bench.well_behaved("a"), wrong)
    with pytest.raises(StartError, match="not configured correctly") as caught:
        await supervisor.start(timeout=60)
    assert "the model is missing" in str(caught.value)
    assert "restarted" not in bench.printed


async def test_gives_up_on_what_never_starts(bench: Bench) -> None:
    count = bench.directory / "count"
    code = f"open({str(count)!r}, 'a').write('x'); raise SystemExit(7)"
    supervisor = bench.supervise(bench.script("broken", code))
    with pytest.raises(StartError, match=r"failed to start 4 times \(ended with exit code 7\)"):
        await supervisor.start(timeout=60)
    assert count.read_text() == "xxxx"


async def test_says_what_is_not_ready_in_time(bench: Bench) -> None:
    supervisor = bench.supervise(bench.script("slow", "import time; time.sleep(60)"))
    with pytest.raises(StartError, match="not ready within 1 s: slow: the file is missing"):
        await supervisor.start(timeout=1)


async def test_kills_what_ignores_sigterm(bench: Bench) -> None:
    deaf = (
        "import pathlib, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        f"pathlib.Path({str(bench.directory / 'deaf')!r}).touch(); time.sleep(60)"
    )
    supervisor = bench.supervise(bench.script("deaf", deaf), grace=0.3)
    await supervisor.start(timeout=60)
    pid = supervisor.pids["deaf"]
    await supervisor.stop()
    assert not psutil.pid_exists(pid)
    assert "deaf did not stop within 0 s: killed" in bench.printed


def test_no_child_outlives_a_killed_parent(tmp_path: Path) -> None:
    child = Path(__file__).parents[2] / "miaotui" / "cli" / "child.py"
    parent = (
        "import os, subprocess, sys, time\n"
        f"argv = [sys.executable, '-I', {str(child)!r}, str(os.getpid())]\n"
        "argv += [sys.executable, '-c', 'import time; print(1, flush=True); time.sleep(60)']\n"
        "p = subprocess.Popen(argv, stdout=subprocess.PIPE, start_new_session=True)\n"
        "p.stdout.readline(); print(p.pid, flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    assert psutil.pid_exists(pid)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the child lives on"
        time.sleep(0.02)
