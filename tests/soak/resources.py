"""What each process holds over its life: memory, file descriptors, threads."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress

import psutil

from tests.processes import ServiceProcess
from tests.soak.judge import Life, Sample

EVERY_SECONDS = 2.0


class Sampler:
    """Looks at all processes every few seconds."""

    def __init__(self, services: dict[str, ServiceProcess]) -> None:
        self._services = services
        self.lives: list[Life] = []

    async def run(self) -> None:
        """Goes on until it is cancelled."""
        while True:
            self.look()
            await asyncio.sleep(EVERY_SECONDS)

    def look(self) -> None:
        """Takes one sample of each process that is alive."""
        for name, service in self._services.items():
            if not service.alive:
                continue
            with suppress(psutil.Error):
                self._life(name, service.pid).samples.append(_sample(service.pid))

    def _life(self, service: str, pid: int) -> Life:
        for life in self.lives:
            if life.pid == pid:
                return life
        self.lives.append(Life(service, pid, time.monotonic()))
        return self.lives[-1]


def _sample(pid: int) -> Sample:
    process = psutil.Process(pid)
    with process.oneshot():
        memory = process.memory_full_info()
        return Sample(
            time.monotonic(), memory.rss, memory.pss, process.num_fds(), process.num_threads()
        )
