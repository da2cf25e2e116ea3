"""Runs services as child processes: starts, watches, restarts and stops them."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from miaotui.cli.output import Output
from miaotui.cli.probes import Probe

_CHILD = str(Path(__file__).with_name("child.py"))
# The services' exit code for a wrong configuration (services/rpc/server.py).
CONFIGURATION_ERROR = 2
_FIRST_BACKOFF = 0.5
_LONGEST_BACKOFF = 30.0
# A service that ran for this long is healthy: its next failure is a new one.
_STABLE_SECONDS = 60.0
# So often may a service that never became ready die before all is given up.
_START_ATTEMPTS = 4
_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Service:
    """One process to run."""

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    probe: Probe
    # Services stop in the order of this number; equal ones together.
    stop_order: int
    # Whether nothing goes without it; otherwise nothing waits for it at the start.
    needed: bool = True


class StartError(Exception):
    """The services cannot run; the message says which, why, and what to do."""


class _Child:
    def __init__(self, service: Service, output: Output) -> None:
        self.service = service
        self.output = output
        self.process: asyncio.subprocess.Process | None = None
        self.ready = False
        self.was_ready = False
        self.reason = ""
        self.failures = 0

    async def run(self) -> int:
        """Runs the process once and returns its exit code."""
        arguments = (sys.executable, "-I", _CHILD, str(os.getpid()), *self.service.argv)
        self.process = await asyncio.create_subprocess_exec(
            *arguments,
            env={**os.environ, **self.service.env, "PYTHONUNBUFFERED": "1"},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            # Ctrl-C in a terminal goes to the whole process group; the order of
            # stopping is ours to keep.
            start_new_session=True,
        )
        await self._copy_output(self.process)
        code = await self.process.wait()
        self.process = None
        self.ready = False
        return code

    async def _copy_output(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        rest = b""
        while chunk := await process.stdout.read(65536):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                self.output.child(self.service.name, line.decode("utf-8", "replace").rstrip())
        if rest:
            self.output.child(self.service.name, rest.decode("utf-8", "replace").rstrip())

    def send(self, number: signal.Signals) -> None:
        if self.process is not None:
            with suppress(ProcessLookupError):
                self.process.send_signal(number)


class Supervisor:
    """Keeps a set of services running."""

    def __init__(self, services: Sequence[Service], output: Output, *, grace: float = 15.0) -> None:
        """`grace`: seconds that a service gets to stop before it is killed."""
        self._children = [_Child(service, output) for service in services]
        self._output = output
        self._grace = grace
        self._stopping = False
        self.started = False
        self._tasks: dict[_Child, asyncio.Task[None]] = {}
        self._watch: asyncio.Task[None] | None = None
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        for service in services:
            output.register(service.name)

    @property
    def pids(self) -> dict[str, int]:
        """The processes that run now, by service name."""
        return {
            child.service.name: child.process.pid
            for child in self._children
            if child.process is not None
        }

    @property
    def all_ready(self) -> bool:
        """Whether every service serves now."""
        return all(child.ready for child in self._children)

    async def start(self, timeout: float) -> None:
        """Starts all services and returns when all that are needed are ready.

        Raises `StartError` when one cannot start or is not ready within `timeout` seconds.
        """
        for child in self._children:
            self._tasks[child] = asyncio.create_task(self._keep(child))
        self._watch = asyncio.create_task(self._probe_forever())
        began = time.monotonic()
        with self._output.console.status("") as status:
            while waiting := [c for c in self._children if c.service.needed and not c.ready]:
                if self.failed.done():
                    self.failed.result()
                if time.monotonic() - began > timeout:
                    raise StartError(_late(waiting, timeout))
                status.update(f"waiting for {', '.join(c.service.name for c in waiting)} …")
                await asyncio.sleep(_POLL_SECONDS)
        # For good: a service that is away for a moment later is not a failed start.
        self.started = True

    async def stop(self) -> None:
        """Stops all services in order; kills those that do not stop within the grace."""
        self._stopping = True
        if self._watch is not None:
            self._watch.cancel()
        for order in sorted({child.service.stop_order for child in self._children}):
            group = [child for child in self._children if child.service.stop_order == order]
            await asyncio.gather(*(self._stop_one(child) for child in group))

    def kill(self) -> None:
        """Ends all services at once, for the user who will not wait."""
        self._stopping = True
        for child in self._children:
            child.send(signal.SIGKILL)

    async def _stop_one(self, child: _Child) -> None:
        task = self._tasks.get(child)
        if task is None:
            return
        if child.process is None:  # sleeps before a restart
            task.cancel()
        child.send(signal.SIGTERM)
        done, _ = await asyncio.wait([task], timeout=self._grace)
        if not done:
            name = child.service.name
            self._output.say(f"{name} did not stop within {self._grace:.0f} s: killed", "yellow")
            child.send(signal.SIGKILL)
            await asyncio.wait([task])

    async def _keep(self, child: _Child) -> None:
        name = child.service.name
        while not self._stopping:
            began = time.monotonic()
            code = await child.run()
            if self._stopping:
                return
            if time.monotonic() - began > _STABLE_SECONDS:
                child.failures = 0
            child.failures += 1
            if not child.was_ready:
                if code == CONFIGURATION_ERROR:
                    self._give_up(child, "is not configured correctly and stopped")
                    return
                if child.failures >= _START_ATTEMPTS:
                    problem = f"failed to start {child.failures} times ({describe_exit(code)})"
                    self._give_up(child, problem)
                    return
            pause = min(_FIRST_BACKOFF * 2 ** (child.failures - 1), _LONGEST_BACKOFF)
            self._output.say(f"{name} {describe_exit(code)}; restarted in {pause:.1f} s", "red")
            await asyncio.sleep(pause)

    async def _probe_forever(self) -> None:
        began = time.monotonic()
        while True:
            await asyncio.gather(*(self._probe(child, began) for child in self._children))
            await asyncio.sleep(1.0 if self.all_ready else _POLL_SECONDS)

    async def _probe(self, child: _Child, began: float) -> None:
        process = child.process
        health = await child.service.probe()
        if process is None or child.process is not process:
            return  # died or was replaced meanwhile
        name = child.service.name
        if health.ready and not child.ready:
            seconds = time.monotonic() - began
            when = "is ready again" if child.was_ready else f"is ready after {seconds:.1f} s"
            self._output.say(f"{name} {when}", "green")
        elif child.ready and not health.ready:
            self._output.say(f"{name} does not serve: {health.reason or 'no answer'}", "yellow")
        child.ready = health.ready
        child.was_ready |= health.ready
        child.reason = health.reason
        if health.hopeless and not child.was_ready and child.service.needed:
            self._fail(f"{name} refuses to serve: {health.reason}")

    def _give_up(self, child: _Child, problem: str) -> None:
        message = self._death(child.service.name, problem)
        if child.service.needed:
            self._fail(message)
        else:
            self._output.say(f"{message}\nAll else goes on without it.", "red")

    def _death(self, name: str, problem: str) -> str:
        lines = "\n".join(f"    {line}" for line in self._output.tail(name, 12))
        said = f" Its last words:\n{lines}" if lines else " It said nothing."
        return f"{name} {problem}.{said}"

    def _fail(self, message: str) -> None:
        if not self.failed.done():
            self.failed.set_exception(StartError(message))


def describe_exit(code: int) -> str:
    """An exit code in words."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"


def _late(waiting: Sequence[_Child], timeout: float) -> str:
    states = "; ".join(
        f"{child.service.name}: {child.reason or 'does not answer yet'}" for child in waiting
    )
    return (
        f"not ready within {timeout:.0f} s: {states}. On a slow machine give it longer with "
        "--ready-timeout; otherwise see the services' lines above."
    )
