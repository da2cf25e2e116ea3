"""The judge of `make soak` sees what must not happen, and nothing else."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from io import StringIO
from itertools import islice

import pytest
from rich.console import Console

from tests.soak.faults import FREEZE, KILL, LOSS, PARTITION, SLOW, Draw, deck, draws
from tests.soak.judge import (
    CONNECTION,
    OK,
    REFUSED,
    WRONG,
    Fault,
    Life,
    Outcome,
    Rules,
    Sample,
    judge_faults,
    judge_lives,
    judge_requests,
)
from tests.soak.report import make_report, show

RULES = Rules(grace=2.0, recovery=30.0)
# From 100 s to 103 s; all was well at 105 s.
CUT = Fault("partition", "a – b", 100.0, 103.0, 105.0)
KILLED = Fault("kill -9", "gateway", 200.0, 201.0, 205.0, gateway_killed=True)
FROZEN = Fault("freeze", "gateway", 300.0, 306.0, 307.0, gateway_frozen=6.0)
ENCODER = Fault("kill -9", "encoder", 400.0, 401.0, 405.0, harmless=True)
FAULTS = [CUT, KILLED, FROZEN, ENCODER]


def asked(began: float, seconds: float, status: str, timeout: float = 10.0) -> Outcome:
    return Outcome("question", began, began + seconds, timeout, status, "detail")


@pytest.mark.parametrize(
    "outcome",
    [
        asked(50, 1, OK),
        asked(50, 11.9, OK),  # within the grace
        asked(99, 2, "503 unavailable"),  # begun before the fault
        asked(104.9, 11, "504 timeout"),  # begun before all was well again
        asked(101, 5, "DEADLINE_EXCEEDED"),
        asked(201, 0.1, CONNECTION),
        asked(204, 0.1, REFUSED),
        asked(299, 17, "504 timeout"),  # a gateway that stands still cannot tell the time
        asked(306.5, 94, "503 unavailable", timeout=100),  # under way since another fault
        asked(402, 11, "504 timeout"),  # a new start takes time from all
    ],
)
def test_what_may_happen(outcome: Outcome) -> None:
    assert judge_requests([outcome], FAULTS, RULES) == []


@pytest.mark.parametrize(
    ("outcome", "found"),
    [
        (asked(101, 1, WRONG), "wrong answer: detail (during partition a – b)"),
        (asked(50, 12.1, OK), "ok after 12.1 s, and it had 10 s"),
        (asked(101, 12.1, "504 timeout"), "504 timeout after 12.1 s"),
        (asked(299, 18.1, "504 timeout"), "504 timeout after 18.1 s"),
        (asked(50, 1, "503 unavailable"), "503 unavailable without any fault"),
        (asked(105.1, 1, "UNAVAILABLE"), "UNAVAILABLE without any fault"),
        (asked(101, 1, "503 unavailable without Retry-After"), "no clear status"),
        (asked(101, 1, "502 service-failed"), "no clear status: 502 service-failed"),
        (asked(101, 1, "cut off"), "no clear status: cut off"),
        (asked(101, 1, CONNECTION), "the gateway was not killed"),
        (asked(206, 1, REFUSED), "connection refused, and the gateway was not killed"),
        (asked(402, 1, "503 unavailable"), "nothing waits for what was disturbed"),
        (asked(101, 40, "no answer at all"), "no answer at all after 40.0 s"),
    ],
)
def test_what_may_not_happen(outcome: Outcome, found: str) -> None:
    (violation,) = judge_requests([outcome], FAULTS, RULES)
    assert found in violation


def test_services_that_do_not_come_back() -> None:
    late = Fault("slow", "a – b", 0.0, 5.0, 36.0)
    never = Fault("kill -9", "qa-0", 50.0, 51.0)
    assert judge_faults([CUT, late, never], RULES) == [
        "slow a – b: recovered only after 31 s",
        "kill -9 qa-0: never recovered",
    ]
    # Then everything later was under its influence.
    assert judge_requests([asked(500, 1, "503 unavailable")], [never], RULES) == []


def life(
    memory: float = 0.0, files: float = 0.0, threads: float = 0.0, *, seconds: int = 300
) -> Life:
    """A process that grows by so many MiB, descriptors and threads a minute after a start-up."""
    chance = random.Random(1)
    samples = [
        Sample(
            at,
            int((min(at, 30) * 10 + 100 + chance.uniform(-4, 4) + memory * at / 60) * 2**20),
            0,
            int(20 + files * at / 60) + chance.randint(0, 3),
            int(10 + threads * at / 60),
        )
        for at in range(0, seconds, 2)
    ]
    return Life("qa-0", 1, 0.0, samples)


def test_growth_is_seen_and_noise_is_not() -> None:
    assert judge_lives([life()], RULES) == []
    (leak,) = judge_lives([life(memory=25)], RULES)
    assert leak.startswith("qa-0: bytes of memory grew from ")
    (leak,) = judge_lives([life(files=6)], RULES)
    assert leak.startswith("qa-0: descriptors grew from ")
    (leak,) = judge_lives([life(threads=5)], RULES)
    assert leak.startswith("qa-0: threads grew from ")
    # What an allocator keeps for some time, and returns, is not lost.
    kept = life()
    kept.samples = [
        replace(one, resident=one.resident + int(one.at % 70) * 2**20) for one in kept.samples
    ]
    assert judge_lives([kept], RULES) == []
    # Too short a life tells nothing.
    assert judge_lives([life(memory=100, seconds=90)], RULES) == []


def test_every_fault_has_its_turn_and_kills_end() -> None:
    services = ["gateway", "qa-0", "redis"]
    links = [("gateway", "qa-0"), ("qa-0", "redis")]
    every = deck(services, links, (KILL, FREEZE, PARTITION, LOSS, SLOW))

    def drawn_first(count: int, *, killing: bool) -> list[Draw]:
        return list(islice(draws(services, links, random.Random(3), lambda: killing), count))

    drawn = drawn_first(len(every), killing=True)
    assert Counter(drawn) == Counter(every)
    places = [place for place, draw in enumerate(drawn) if draw.kind == KILL]
    assert len(places) == len(services)
    assert sum(places) / len(places) < len(drawn) / 2, "kills come early"
    late = drawn_first(40, killing=False)
    assert not [draw for draw in late if draw.kind == KILL]
    assert drawn_first(len(every), killing=True) == drawn


def test_a_report_tells_all_of_it() -> None:
    outcomes = [asked(50, 1, OK), asked(101, 1, WRONG), asked(101, 1, "503 unavailable")]
    report = make_report(
        seed=1,
        seconds=300,
        tls=True,
        outcomes=outcomes,
        faults=FAULTS,
        lives=[life(memory=25)],
        rules=RULES,
        found=["gen-0 still holds 3 KV blocks in use"],
    )
    assert len(report.violations) == 3
    told = json.loads(json.dumps(report.json()))
    assert told["operations"][0] | {"p50_seconds": 1} == {
        "operation": "question", "count": 3, "right": 1, "wrong": 1,
        "failed": {"503 unavailable": 1}, "p50_seconds": 1, "p99_seconds": 1,
        "longest_seconds": 1,
    }  # fmt: skip
    cut = next(row for row in told["faults"] if row["fault"] == CUT.name)
    assert (cut["met"], cut["wrong"], cut["failed"]) == (2, 1, {"503 unavailable": 1})
    assert cut["recovery_max_seconds"] == 2
    console = Console(width=160, record=True, file=StringIO())
    show(report, console)
    text = console.export_text()
    for part in ("1 wrong answers", "3 violations", "KV blocks", "freeze gateway", "qa-0"):
        assert part in text
