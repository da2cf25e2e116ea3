"""`make soak` in short: a few faults of every kind, tiny models, real services."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.namespaces import missing
from tests.soak.faults import FREEZE, KILL, LOSS, PARTITION, SLOW, Draw
from tests.soak.judge import Rules
from tests.soak.latency import measure_links
from tests.soak.run import Options, run

pytestmark = [
    pytest.mark.skipif(bool(missing()), reason=missing()),
    pytest.mark.skipif(
        not os.environ.get("MIAOTUI_FULL"), reason="takes a minute: MIAOTUI_FULL=1 runs it"
    ),
    pytest.mark.timeout(600),
]
SCRIPT = (
    Draw(KILL, "qa-1"),
    Draw(PARTITION, ("gen-0", "gen-1")),
    Draw(KILL, "gateway"),
    Draw(FREEZE, "gen-0"),
    Draw(LOSS, ("gateway", "qa-0")),
    Draw(SLOW, ("qa-0", "qa-1")),
    Draw(KILL, "redis"),
    Draw(KILL, "encoder"),
    Draw(PARTITION, ("gateway", "encoder")),
)


@pytest.fixture(autouse=True)
def same_priority() -> Iterator[None]:
    """What a test does to this process's priority is undone."""
    before = os.getpriority(os.PRIO_PROCESS, 0)
    yield
    os.setpriority(os.PRIO_PROCESS, 0, before)


async def test_nothing_is_lost(tmp_path: Path) -> None:
    rules = Rules(grace=15.0, recovery=120.0)
    options = Options(tiny=True, clients=4, questions=16, script=SCRIPT, rules=rules)
    report = await run(options, tmp_path, print)
    assert report.violations == []
    assert sum(row["count"] for row in report.faults) == len(SCRIPT)
    assert {row["service"] for row in report.services if row["lives"] == 2} == {
        draw.target for draw in SCRIPT if draw.kind == KILL
    }
    for row in report.operations:
        assert row["right"] > 0, row
    assert sum(row["count"] for row in report.operations) > 100


async def test_latency_is_what_the_links_predict(tmp_path: Path) -> None:
    report = await measure_links(tmp_path, print, tiny=True, count=12)
    assert report.violations == []
    plain, tls = report.captures
    assert plain.readable == plain.texts == tls.texts == 24
    assert tls.bytes > 50_000
