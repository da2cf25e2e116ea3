"""Runs cases against running services, watches the services, and reports."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial

from rich.console import Console
from rich.progress import Progress

from tests.fuzz.cases import Entry, Finding, Tally, case_random
from tests.fuzz.contract import NAME, PHASES, check
from tests.fuzz.services import Services

# Moderate: overload is not what is looked for.
WORKERS = 8
_WATCH_SECONDS = 2.0
_MOST_FINDINGS = 300


class Run:
    """One run of many cases."""

    def __init__(self, services: Services, entries: Sequence[Entry], seed: int) -> None:
        self._services = services
        self._entries = entries
        self._seed = seed
        self.tallies = {entry.name: Tally() for entry in entries}
        self.trouble: list[str] = []
        self.checks = 0
        self.seconds = 0.0
        self._until = math.inf

    def plan(self, cases: int) -> list[tuple[Entry, int]]:
        """So many cases, spread over the entries by their shares, each with its number."""
        whole = sum(entry.share for entry in self._entries)
        made = [
            (entry, number)
            for entry in self._entries
            for number in range(max(1, round(cases * entry.share / whole)))
        ]
        # In turn, so that a process's trouble is not the last entry's alone.
        case_random(self._seed, "order", 0).shuffle(made)
        return made

    async def run(self, plan: Sequence[tuple[Entry, int]], seconds: float = math.inf) -> None:
        """Runs the cases, some at a time, for so many seconds at most."""
        started = time.monotonic()
        self._until = started + seconds
        console = Console(stderr=True)
        watch = asyncio.create_task(self._watch())
        with Progress(console=console, disable=not console.is_terminal) as progress:
            waiting = iter(progress.track(plan, description="cases"))
            await asyncio.gather(*(self._work(waiting) for _ in range(WORKERS)))
        watch.cancel()
        with suppress(asyncio.CancelledError):
            await watch
        await self._check()
        self.trouble += self._services.check_processes()
        self.seconds = time.monotonic() - started

    async def check_contract(
        self, examples: int, phases: Sequence[str] = PHASES, only: str = ""
    ) -> None:
        """Lets Schemathesis make its cases, see `check`; they count as the others do."""
        started = time.monotonic()
        work = partial(check, self._services.url, self._seed, examples, phases, only)
        self.tallies |= await asyncio.to_thread(work)
        self.trouble += self._services.check_processes()
        self.seconds += time.monotonic() - started

    async def _work(self, waiting: Iterable[tuple[Entry, int]]) -> None:
        for entry, number in waiting:
            if self.findings > _MOST_FINDINGS or time.monotonic() > self._until:
                return
            tally = self.tallies[entry.name]
            began = time.monotonic()
            try:
                outcome = await entry.run(case_random(self._seed, entry.name, number))
            except Finding as finding:
                outcome = "FOUND"
                tally.findings.append((number, str(finding)))
            except Exception as error:  # noqa: BLE001 - the cases' own mistakes are findings too
                outcome = "FOUND"
                tally.findings.append((number, f"{type(error).__name__}: {error}"))
            tally.outcomes[outcome] += 1
            tally.seconds += time.monotonic() - began

    async def _watch(self) -> None:
        while True:
            await self._check()
            await asyncio.sleep(_WATCH_SECONDS)

    async def _check(self) -> None:
        self.checks += 1
        try:
            await self._services.check_answer()
        except Finding as finding:
            self.trouble.append(str(finding))

    @property
    def findings(self) -> int:
        """Cases that came out as they must not."""
        return sum(len(tally.findings) for tally in self.tallies.values())

    def report(self) -> str:
        """All that came, as Markdown."""
        cases = sum(tally.outcomes.total() for tally in self.tallies.values())
        lines = [
            f"{cases:,} cases over {len(self.tallies)} entry points in {self.seconds:.0f} s, "
            f"seed {self._seed}; {self.findings} findings. A right question was asked "
            f"{self.checks} times meanwhile and after; {len(self.trouble)} troubles.",
            "",
            "| Entry point | Cases | Outcomes | Seconds |",
            "|---|---:|---|---:|",
        ]
        for name, tally in self.tallies.items():
            outcomes = ", ".join(f"{what} {n}" for what, n in tally.outcomes.most_common())
            count = tally.outcomes.total()
            lines.append(f"| `{name}` | {count:,} | {outcomes} | {tally.seconds:.0f} |")
        lines += ["", "| Process | Memory before, MB | After |", "|---|---:|---:|"]
        for name, (before, after) in self._services.memory().items():
            lines.append(f"| {name} | {before / 1e6:.0f} | {after / 1e6:.0f} |")
        for name, tally in self.tallies.items():
            for number, what in tally.findings:
                # Schemathesis runs an operation's cases all or none.
                entry = name if name.startswith(NAME) else f"{name}:{number}"
                lines += ["", f"FOUND by `--seed {self._seed} --only '{entry}'`: {what}"]
        return "\n".join([*lines, *(f"\nTROUBLE: {what}" for what in self.trouble)])

    @property
    def failed(self) -> bool:
        """Whether anything came that must not."""
        return bool(self.findings or self.trouble)
