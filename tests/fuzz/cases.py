"""What a case is: an entry point, a number, and what may come of it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

# A word that occurs nowhere else: where it is found in a log, content has leaked.
MARK = "zanzibarquartz"
# Services have deadlines of 10 s here; more than this is a hang, also on a slow machine.
HANG_SECONDS = 60.0
# What the gateway says of a service that a busy machine keeps from answering for seconds.
LATE = "does not answer in time"


class Finding(Exception):
    """A case that came out as it must not."""


@dataclass(frozen=True)
class Entry:
    """One entry point: `run` makes the case of a random source, sends it, and says what came.

    `run` raises `Finding` where that must not be. `share`: of all cases, relative to the others.
    """

    name: str
    run: Callable[[random.Random], Awaitable[str]]
    share: float = 1.0


@dataclass
class Tally:
    """What came of an entry point's cases."""

    outcomes: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    findings: list[tuple[int, str]] = field(default_factory=list)


def case_random(seed: int, entry: str, number: int) -> random.Random:
    """The random source of one case: the same for the same seed, entry and number."""
    return random.Random(f"{seed}/{entry}/{number}")
