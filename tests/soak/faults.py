"""What goes wrong, drawn by a seed: processes die and stand still, links break and slow down."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tests.soak.deployment import ENCODER, Deployment
from tests.soak.judge import Fault, Rules
from tests.soak.load import Load

KILL, FREEZE, PARTITION, LOSS, SLOW = "kill -9", "freeze", "partition", "loss", "slow"
# What every link is like all the time: a data centre's, not a perfect one.
DELAY, JITTER, LOST = 0.001, 0.001, 0.0005
_SECONDS = {KILL: (0.5, 2.0), FREEZE: (1.0, 6.0), PARTITION: (1.0, 9.0),
            LOSS: (3.0, 8.0), SLOW: (3.0, 8.0)}  # fmt: skip
# Shares of a run: kills end early enough for what is left to show that nothing grows.
KILLING = 0.7
# Seconds without any fault, between two.
_QUIET = (1.0, 3.0)


@dataclass(frozen=True)
class Draw:
    """A kind of fault and what it hits."""

    kind: str
    target: str | tuple[str, str]

    @property
    def name(self) -> str:
        """The target's, for people."""
        return self.target if isinstance(self.target, str) else " – ".join(self.target)


Ends = tuple[str, str]


def deck(services: list[str], links: list[Ends], kinds: tuple[str, ...]) -> list[Draw]:
    """Every kind of fault with everything that it can hit."""
    hits = [Draw(kind, name) for kind in (KILL, FREEZE) for name in services]
    hits += [Draw(kind, ends) for kind in (PARTITION, LOSS, SLOW) for ends in links]
    return [draw for draw in hits if draw.kind in kinds]


def draws(
    services: list[str], links: list[Ends], chance: random.Random, killing: Callable[[], bool]
) -> Iterator[Draw]:
    """Without end; all faults once before any comes again, kills only while `killing()`."""
    while True:
        kills = deck(services, links, (KILL,))
        others = deck(services, links, (FREEZE, PARTITION, LOSS, SLOW))
        chance.shuffle(kills)
        chance.shuffle(others)
        # Kills stand closer together, so that each has its turn before they end.
        while kills or others:
            if kills and not killing():
                kills.clear()
            if kills and (not others or chance.random() < 0.5):
                yield kills.pop()
            elif others:
                yield others.pop()


class Injector:
    """Disturbs one thing after another, and waits each time until all is well again."""

    def __init__(self, deployment: Deployment, load: Load, rules: Rules, seed: int) -> None:
        self._deployment = deployment
        self._load = load
        self._rules = rules
        self._chance = random.Random(seed)
        self.faults: list[Fault] = []
        self.now = ""
        # Which processes are dead because they were killed here.
        self.killed: set[str] = set()
        for ends in deployment.links:
            self._base(ends)

    async def run(self, until: float) -> None:
        """Goes on until so late on the monotonic clock."""
        began = time.monotonic()
        last_kill = began + KILLING * (until - began)
        services, links = list(self._deployment.services), self._deployment.links
        killing = lambda: time.monotonic() < last_kill  # noqa: E731
        for draw in draws(services, links, self._chance, killing):
            if time.monotonic() >= until:
                return
            await self.inject(draw)
            await asyncio.sleep(self._chance.uniform(*_QUIET))

    async def inject(self, draw: Draw) -> Fault:
        """One fault, from its beginning until all is well."""
        seconds = self._chance.uniform(*_SECONDS[draw.kind])
        # Without the encoder, words find documents.
        harmless = ENCODER in ((draw.target,) if isinstance(draw.target, str) else draw.target)
        now, in_flight = time.monotonic(), self._load.in_flight
        fault = Fault(draw.kind, draw.name, now, in_flight=in_flight, harmless=harmless)
        self.faults.append(fault)
        self.now = fault.name
        try:
            await self._disturb(draw, fault, seconds)
        finally:
            fault.ended = time.monotonic()
        self.now = f"{fault.name}, recovering"
        # Longer than the rules allow, to tell how long it did take.
        fault.recovered = await self._load.recovered(self._rules.recovery * 1.5)
        self.now = ""
        return fault

    async def _disturb(self, draw: Draw, fault: Fault, seconds: float) -> None:
        if isinstance(draw.target, str):
            process = self._deployment.services[draw.target]
            if draw.kind == KILL:
                fault.gateway_killed = draw.target == "gateway"
                self.killed.add(draw.target)
                process.kill()
                await asyncio.sleep(seconds)
                process.start()
                self.killed.discard(draw.target)
                return
            process.signal(signal.SIGSTOP)
            try:
                await asyncio.sleep(seconds)
            finally:
                process.signal(signal.SIGCONT)
            if draw.target == "gateway":
                fault.gateway_frozen = time.monotonic() - fault.began
            return
        link = self._deployment.link(draw.target)
        if draw.kind == PARTITION:
            link.cut()
        elif draw.kind == LOSS:
            link.loss(self._chance.uniform(0.05, 0.3))
        else:
            link.delay(self._chance.uniform(0.05, 0.4))
            link.jitter(self._chance.uniform(0.0, 0.2))
            link.rate(self._chance.uniform(5e5, 4e6))
        try:
            await asyncio.sleep(seconds)
        finally:
            link.reset()
            self._base(draw.target)

    def _base(self, ends: tuple[str, str]) -> None:
        link = self._deployment.link(ends)
        link.delay(DELAY)
        link.jitter(JITTER)
        link.loss(LOST)
