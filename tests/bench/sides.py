"""The sides of the comparison: processes that answer, and what a round of questions tells.

A side that is not being measured takes no cores: a bare engine waits for its next line, Miaotui's
services block, and LitServe's, which look for work all the time, are stopped (SIGSTOP).
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from tests.bench.child import Child
from tests.bench.workload import Body, Workload
from tests.processes import Cluster, free_port

BATCH = 16
NO_CACHES = {
    "MIAOTUI_GATEWAY_ANSWER_CACHE_BYTES": "1",
    "MIAOTUI_GATEWAY_PROMPT_CACHE_BYTES": "1",
    # 32 passages of 4,096 tokens at once take longer than the usual limit on a slow machine.
    "MIAOTUI_GATEWAY_REQUEST_TIMEOUT": "120",
    "MIAOTUI_GATEWAY_MAX_REQUEST_TIMEOUT": "120",
}
Answered = tuple[float, list[float], list[str]]
"""Questions a second, each one's seconds (empty: not told), the answers."""


class SideError(Exception):
    """A side that cannot run here; says why."""


@dataclass
class Measured:
    """What the rounds at one concurrency told."""

    rates: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    cores: list[float] = field(default_factory=list)
    memory: int = 0
    asked: int = 0
    parts: dict[str, float] = field(default_factory=dict)
    """CPU seconds of each of the side's services."""


@dataclass
class Side:
    """Something that answers."""

    name: str
    kind: str
    """"bare", "served" or "miaotui"."""
    ask: Callable[[Sequence[Body], int], Answered]
    roots: list[psutil.Process]
    polls: bool = False
    services: dict[str, psutil.Process] = field(default_factory=dict)
    measured: dict[int, Measured] = field(default_factory=dict)
    """By requests in flight; 0: batches in process."""
    scored: list[str] = field(default_factory=list)
    """Its answers to the questions by which answers are judged."""

    def signal(self, number: signal.Signals) -> None:
        """Stops or continues a side that takes CPU time while it waits."""
        if self.polls:
            for process in family(self.roots):
                with suppress(psutil.NoSuchProcess):  # a server's own helper, which may end
                    process.send_signal(number)

    def round(self, bodies: Sequence[Body], at_once: int) -> Answered:
        """Asks; the side runs only meanwhile."""
        self.signal(signal.SIGCONT)
        try:
            return self.ask(bodies, at_once)
        finally:
            self.signal(signal.SIGSTOP)

    def measure(self, bodies: Sequence[Body], at_once: int) -> None:
        """A round that counts."""
        into = self.measured.setdefault(at_once, Measured())
        of_each = {name: cpu_seconds([process]) for name, process in self.services.items()}
        before, began = cpu_seconds(self.roots), time.perf_counter()
        rate, seconds, _ = self.round(bodies, at_once)
        into.cores.append((cpu_seconds(self.roots) - before) / (time.perf_counter() - began))
        into.rates.append(rate)
        into.seconds += seconds
        into.asked += len(bodies)
        for name, process in self.services.items():
            spent = cpu_seconds([process]) - of_each[name]
            into.parts[name] = into.parts.get(name, 0.0) + spent
        into.memory = sum(p.memory_full_info().pss for p in family(self.roots))


@dataclass(frozen=True)
class Row:
    """A line in the report. Times in milliseconds, memory in megabytes (PSS)."""

    name: str
    kind: str
    at_once: int
    questions_a_second: float
    p50: float | None
    p99: float | None
    cores: float
    memory: float
    equal: float
    f1: float | None
    parts: dict[str, float] = field(default_factory=dict)
    """CPU milliseconds a question of each of Miaotui's services."""
    f1_error: float | None = None
    """The standard error of how the F1 differs from the reference's."""


def family(roots: Sequence[psutil.Process]) -> list[psutil.Process]:
    """The processes and all that they have started."""
    return [p for root in roots for p in (root, *root.children(recursive=True))]


def cpu_seconds(roots: Sequence[psutil.Process]) -> float:
    """User and system time so far."""
    spent = 0.0
    for process in family(roots):
        with suppress(psutil.NoSuchProcess):
            spent += sum(process.cpu_times()[:2])
    return spent


def percentile(seconds: Sequence[float], share: float) -> float | None:
    """In milliseconds; `None` of nothing."""
    ordered = sorted(seconds)
    return 1e3 * ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else None


def row(side: Side, at_once: int, reference: Sequence[str], scored: Workload) -> Row:
    """The medians of the rounds. `reference`: the answers of float32 to what is scored."""
    of = side.measured[at_once]
    return Row(
        side.name,
        side.kind,
        at_once,
        statistics.median(of.rates),
        percentile(of.seconds, 0.5),
        percentile(of.seconds, 0.99),
        statistics.median(of.cores),
        of.memory / 1e6,
        100 * statistics.fmean(a == b for a, b in zip(side.scored, reference, strict=True)),
        scored.f1(side.scored),
        {name: 1e3 * spent / of.asked for name, spent in of.parts.items()},
        scored.f1_error(side.scored, reference),
    )


def bare(stack: ExitStack, engine: str, model: Path, kept: Path, probe: Sequence[Body]) -> Side:
    """An engine in a process of its own, in its fastest way. Raises `SideError`."""
    child = stack.enter_context(Child("tests.bench.answering", engine, str(model), str(kept)))
    try:
        told = child("tune", bodies=list(probe), batch=BATCH)
    except RuntimeError as error:
        raise SideError(str(error)) from None
    if "error" in told:
        raise SideError(told["error"])

    def ask(bodies: Sequence[Body], at_once: int) -> Answered:
        began = time.perf_counter()
        texts = child("answers", bodies=list(bodies), batch=BATCH)
        return len(bodies) / (time.perf_counter() - began), [], texts

    return Side(f"{engine} ({told['way']})", "bare", ask, [psutil.Process(child.pid)])


def _asked(
    stack: ExitStack, name: str, kind: str, url: str, path: str, pids: Sequence[int]
) -> Side:
    client = stack.enter_context(Child("tests.bench.client", url))

    def ask(bodies: Sequence[Body], at_once: int) -> Answered:
        rate, seconds, texts = client("run", bodies=list(bodies), concurrency=at_once, path=path)
        return rate, seconds, texts

    return Side(name, kind, ask, [psutil.Process(pid) for pid in pids], kind == "served")


async def miaotui(
    stack: ExitStack,
    name: str,
    model: Path,
    stages: int,
    env: dict[str, str] | None = None,
    dtype: str = "auto",
) -> tuple[Side, Cluster]:
    """Miaotui over HTTP. By default every answer is computed: nothing is kept between rounds."""
    kept = NO_CACHES if env is None else env
    cluster = Cluster(model, stages=stages, dtype=dtype, gateway_env=kept)
    cluster.start()
    stack.callback(cluster.stop)
    await cluster.ready()
    pids = [process.pid for process in cluster.processes]
    side = _asked(stack, name, "miaotui", cluster.url, "/v1/qa", pids)
    names = (process.name for process in cluster.processes)
    side.services = dict(zip(names, side.roots, strict=True))
    return side, cluster


def litserve(stack: ExitStack, engine: str, model: Path, kept: Path, probe: Sequence[Body]) -> Side:
    """An engine behind LitServe, with the better way of sharing the cores. Raises `SideError`."""
    cores = os.cpu_count() or 1
    why = SideError("")
    tried: list[tuple[float, Side, ExitStack]] = []
    for workers, threads in ((1, 0), (cores, 1)) if cores > 1 else ((1, 0),):
        own = stack.enter_context(ExitStack())
        options = ("--workers", str(workers), "--threads", str(threads))
        try:
            url, pid = own.enter_context(_serving(engine, model, kept, *options))
        except SideError as error:
            why = error
            continue
        name = f"{engine} behind LitServe ({workers} workers)"
        side = _asked(own, name, "served", url, "/predict", [pid])
        side.round(probe, 32)  # warms it up
        tried.append((side.round(probe, 32)[0], side, own))
    if not tried:
        raise why
    best = max(tried, key=lambda one: one[0])
    for one in tried:
        if one is not best:
            one[1].signal(signal.SIGCONT)
            one[2].close()
    return best[1]


@contextmanager
def _serving(engine: str, model: Path, kept: Path, *options: str) -> Iterator[tuple[str, int]]:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-W", "ignore", "-m", "tests.bench.served", engine]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [*command, str(model), str(kept), str(port), *options], stdout=log, stderr=log
        )
        root = psutil.Process(process.pid)
        try:
            deadline = time.monotonic() + 120
            while True:
                try:
                    if httpx.get(f"{url}/health", trust_env=False).status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    last = log.read().decode().strip().splitlines()[-1:]
                    raise SideError(f"LitServe does not serve: {' '.join(last)}")
                time.sleep(0.2)
            yield url, process.pid
        finally:
            left = family([root]) if process.poll() is None else []
            for one in left:
                one.send_signal(signal.SIGCONT)
                one.terminate()
            for one in psutil.wait_procs(left, 10)[1]:
                one.kill()
            process.wait()
