"""Clients that ask all the time, and the probes that tell when all is well again."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable

from tests.soak.cases import MEANING, Cases
from tests.soak.client import Client
from tests.soak.judge import OK, REFUSED, WRONG, Outcome

BATCH = 6
PROBE_SECONDS = 6.0


class Load:
    """`clients` at a time, drawing what they ask by a seed."""

    def __init__(
        self,
        client: Client,
        cases: Cases,
        *,
        clients: int,
        seed: int,
        timeout: float,
        text_timeout: float,
    ) -> None:
        """`timeout`, `text_timeout`: seconds that a question and a text get."""
        self._client = client
        self._cases = cases
        self._timeout = timeout
        self._text_timeout = text_timeout
        self._chance = random.Random(seed)
        self._stop = False
        self.outcomes: list[Outcome] = []
        self._tasks = [asyncio.create_task(self._ask()) for _ in range(clients)]

    @property
    def in_flight(self) -> int:
        """Requests under way."""
        return self._client.in_flight

    def check(self) -> None:
        """Raises what ended a client: it should never end by itself."""
        for task in self._tasks:
            if task.done():
                task.result()

    async def finish(self) -> None:
        """Ends when all that is under way has been answered."""
        self._stop = True
        await asyncio.gather(*self._tasks)

    async def stop(self) -> None:
        """Gives up what is still under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _ask(self) -> None:
        while not self._stop:
            outcomes = await self._one()
            self.outcomes += outcomes
            # As a caller would: soon again, and a little later where nobody was there.
            refused = outcomes[0].status in (REFUSED, "UNAVAILABLE", "503 unavailable")
            await asyncio.sleep(1.0 if refused else self._chance.uniform(0.02, 0.3))

    async def _one(self) -> list[Outcome]:
        chance, client = self._chance, self._client
        case = chance.choice(self._cases.questions)
        way = chance.random()
        if way < 0.4:
            cached = chance.random() < 0.5
            return [await client.question(case, self._timeout, cached=cached)]
        if way < 0.55:
            return [await client.grpc_question(case, self._timeout)]
        if way < 0.65:
            cases = chance.sample(list(self._cases.questions), BATCH)
            return await client.batch(cases, self._timeout)
        if way < 0.85:
            text = chance.choice(self._cases.texts)
            cached = chance.random() < 0.2
            return [await client.text(text, self._text_timeout, cached=cached)]
        document = chance.choice(self._cases.documents)
        return [await client.documents(document, self._timeout)]

    # -- probes ---------------------------------------------------------------------------

    async def recovered(self, timeout: float) -> float | None:
        """When a new request of every kind had been answered; None: not within `timeout`.

        The documents' are found by their meaning again. A wrong answer to a probe counts as one
        to anybody.
        """
        chance, client = self._chance, self._client
        # Short ones: what takes long on a busy machine tells nothing of the fault.
        case = min(self._cases.questions, key=lambda one: len(one.asked.context))
        text = min(self._cases.texts, key=lambda one: int(one.body["max_tokens"]))
        meant = [one for one in self._cases.documents if MEANING in one.expected]
        document = chance.choice(meant or self._cases.documents)
        probes: list[Callable[[], Awaitable[Outcome]]] = [
            lambda: client.question(case, PROBE_SECONDS, cached=False),
            lambda: client.grpc_question(case, PROBE_SECONDS),
            lambda: client.text(text, PROBE_SECONDS, cached=False),
            lambda: client.documents(document, PROBE_SECONDS, meaning=bool(meant)),
        ]
        deadline = time.monotonic() + timeout
        while probes:
            outcomes = await asyncio.gather(*(probe() for probe in probes))
            self.outcomes += [one for one in outcomes if one.status == WRONG]
            pairs = zip(probes, outcomes, strict=True)
            probes = [probe for probe, one in pairs if one.status != OK]
            if probes:
                if time.monotonic() > deadline:
                    return None
                await asyncio.sleep(0.2)
        return time.monotonic()
