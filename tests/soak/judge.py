"""What a run may show: which outcomes of requests, and which growth of processes, are faults.

Plain data and no clock: times are seconds of one monotonic clock.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

OK = "ok"
WRONG = "wrong"
CONNECTION, REFUSED = "connection lost", "connection refused"
"""The gateway itself went away, or is not there yet; a caller sees that and asks again."""
BY_WORDS = "by words only"
"""Documents were found and answered from, without the encoder; a probe waits for more."""
# Not here: 500 and 502 (nobody knows what happened), 503 that does not say when to come again.
CLEAR = frozenset(
    (
        "503 unavailable",
        "503 overloaded",
        "504 timeout",
        "429 overloaded",
        "UNAVAILABLE",
        "DEADLINE_EXCEEDED",
        "RESOURCE_EXHAUSTED",
    )
)

_LATE = frozenset(("504 timeout", "DEADLINE_EXCEEDED"))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one question or text."""

    operation: str
    began: float
    ended: float
    timeout: float  # seconds that the caller gave it
    status: str  # OK, WRONG, CONNECTION, REFUSED, or the status's name
    detail: str = ""

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.ended - self.began


@dataclass(slots=True)
class Fault:
    """One disturbance: `began` to `ended` it lasted, at `recovered` all was well again."""

    kind: str
    target: str
    began: float
    ended: float = 0.0
    recovered: float | None = None
    in_flight: int = 0
    gateway_frozen: float = 0.0  # seconds in which the gateway could not have answered
    gateway_killed: bool = False
    harmless: bool = False  # of a service that nothing waits for: no request fails for it

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.kind} {self.target}"

    @property
    def recovery_seconds(self) -> float | None:
        """From its end to the first answers of every kind; None: it never came to that."""
        return None if self.recovered is None else max(0.0, self.recovered - self.ended)

    def touches(self, outcome: Outcome) -> bool:
        """Whether a request was under way before all was well again."""
        until = self.recovered if self.recovered is not None else float("inf")
        return outcome.ended >= self.began and outcome.began <= until


@dataclass(frozen=True, slots=True)
class Sample:
    """What a process held at a time."""

    at: float
    resident: int  # bytes
    proportional: int  # bytes, with what is shared divided among those who share it
    descriptors: int
    threads: int


@dataclass(slots=True)
class Life:
    """A process from its start to its end."""

    service: str
    pid: int
    began: float
    samples: list[Sample] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Rules:
    """Where the line is drawn."""

    grace: float = 5.0  # seconds beyond a deadline, for a busy machine and the way back
    recovery: float = 60.0  # seconds after a fault's end
    warm_up: float = 45.0  # seconds of a process's life that are not judged
    judged: float = 60.0  # seconds that a life must have beyond that
    memory: int = 32 * 1024 * 1024  # bytes
    memory_share: float = 0.06  # of what it had; the larger of both counts
    descriptors: int = 12
    threads: int = 8


def judge_requests(outcomes: Iterable[Outcome], faults: Sequence[Fault], rules: Rules) -> list[str]:
    """What went wrong with requests."""
    found = []
    for outcome in outcomes:
        touching = [fault for fault in faults if fault.touches(outcome)]
        if problem := _problem(outcome, touching, rules):
            during = ", ".join(fault.name for fault in touching) or "no fault"
            found.append(f"{outcome.operation}: {problem} (during {during})")
    return found


def _problem(outcome: Outcome, touching: Sequence[Fault], rules: Rules) -> str:
    frozen = sum(fault.gateway_frozen for fault in touching)
    if outcome.status == WRONG:
        return f"wrong answer: {outcome.detail}"
    if outcome.seconds > outcome.timeout + rules.grace + frozen:
        return (
            f"{outcome.status} after {outcome.seconds:.1f} s, and it had {outcome.timeout:g} s; "
            f"{outcome.detail}"
        )
    if outcome.status == OK:
        return ""
    if outcome.status in (CONNECTION, REFUSED):
        if any(fault.gateway_killed for fault in touching):
            return ""
        return f"{outcome.status}, and the gateway was not killed: {outcome.detail}"
    if outcome.status not in CLEAR:
        return f"no clear status: {outcome.status} {outcome.detail}"
    if not touching:
        return f"{outcome.status} without any fault: {outcome.detail}"
    # Its new start takes time from all on this machine, and so may their deadlines pass.
    if all(fault.harmless for fault in touching) and outcome.status not in _LATE:
        return f"{outcome.status}, and nothing waits for what was disturbed: {outcome.detail}"
    return ""


def judge_faults(faults: Iterable[Fault], rules: Rules) -> list[str]:
    """Those after which the services did not come back in time."""
    found = []
    for fault in faults:
        seconds = fault.recovery_seconds
        if seconds is None:
            found.append(f"{fault.name}: never recovered")
        elif seconds > rules.recovery:
            found.append(f"{fault.name}: recovered only after {seconds:.0f} s")
    return found


@dataclass(frozen=True, slots=True)
class Growth:
    """How a life went on after its warm-up.

    Descriptors and threads: medians of the first and the last quarter. Memory: the least of the
    first and of the second half, because an allocator keeps what was freed and returns it later,
    in large pieces; only what is never freed lifts the floor.
    """

    service: str
    seconds: float
    first: Sample
    last: Sample
    memory_slope: float  # bytes a minute, by least squares

    def leaks(self, rules: Rules) -> list[str]:
        """What grew more than the rules allow."""
        found = []
        allowed = max(rules.memory, int(self.first.resident * rules.memory_share))
        for what, before, after, most in (
            ("bytes of memory", self.first.resident, self.last.resident, allowed),
            ("descriptors", self.first.descriptors, self.last.descriptors, rules.descriptors),
            ("threads", self.first.threads, self.last.threads, rules.threads),
        ):
            if after - before > most:
                span = f"in {self.seconds:.0f} s"
                found.append(f"{self.service}: {what} grew from {before:,} to {after:,} {span}")
        return found


def growth(life: Life, rules: Rules) -> Growth | None:
    """How a process grew; None where it did not live long enough to tell."""
    samples = [one for one in life.samples if one.at >= life.began + rules.warm_up]
    if len(samples) < 8 or samples[-1].at - samples[0].at < rules.judged:
        return None
    quarter, half = len(samples) // 4, len(samples) // 2
    times = [one.at / 60 for one in samples]
    slope = statistics.linear_regression(times, [one.resident for one in samples]).slope
    return Growth(
        life.service,
        samples[-1].at - samples[0].at,
        _held(samples[:half], samples[:quarter]),
        _held(samples[half:], samples[-quarter:]),
        slope,
    )


def _held(half: Sequence[Sample], quarter: Sequence[Sample]) -> Sample:
    return Sample(
        half[0].at,
        min(one.resident for one in half),
        min(one.proportional for one in half),
        int(statistics.median(one.descriptors for one in quarter)),
        int(statistics.median(one.threads for one in quarter)),
    )


def judge_lives(lives: Iterable[Life], rules: Rules) -> list[str]:
    """What grew without end."""
    grown = (growth(life, rules) for life in lives)
    return [leak for one in grown if one is not None for leak in one.leaks(rules)]
