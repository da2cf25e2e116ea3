"""A quick run of the fuzzing (`make fuzz` runs it at length), and that it finds what is wrong."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from miaotui.v1 import gateway_pb2
from tests.fuzz.cases import Entry, Finding, case_random
from tests.fuzz.http import judge
from tests.fuzz.messages import random_message
from tests.fuzz.run import Run
from tests.fuzz.services import running_services
from tests.fuzz.wire import Reply

CASES = 600


async def test_no_entry_point_falls_over(tmp_path: Path) -> None:
    async with running_services(tmp_path, writes=False) as (services, entries):
        run = Run(services, entries, seed=3)
        await run.run(run.plan(CASES))
        assert not run.failed, run.report()
        assert {tally.outcomes.total() > 0 for tally in run.tallies.values()} == {True}
        asked = run.tallies["HTTP POST /v1/qa"].outcomes
        assert asked["422"] > 0, "nothing was nearly right"

        async def broken(chance: random.Random) -> str:
            raise Finding("it fell over")

        # What a case comes out as is a finding, with all that replays it.
        bad = Run(services, [Entry("broken", broken)], seed=9)
        await bad.run(bad.plan(1))
        assert bad.failed
        assert "--seed 9 --only 'broken:0'`: it fell over" in bad.report()


def test_a_case_is_the_same_for_the_same_seed() -> None:
    made = [
        random_message(case_random(1, "x", number), gateway_pb2.ChatRequest.DESCRIPTOR)
        for number in (5, 5, 6)
    ]
    assert made[0].SerializeToString() == made[1].SerializeToString()
    assert made[0].SerializeToString() != made[2].SerializeToString()


@pytest.mark.parametrize(
    "reply",
    [
        None,
        Reply(500, {"content-type": "application/problem+json"}, b'{"type": "x"}'),
        Reply(502, {"content-type": "application/problem+json"}, b'{"type": "x"}'),
        Reply(503, {"content-type": "application/problem+json"}, b'{"type": "x"}'),
        Reply(200, {"content-type": "application/json"}, b"{"),
        Reply(400, {"content-type": "text/plain"}, b"no"),
        Reply(422, {"content-type": "application/json"}, b"{}"),
    ],
)
def test_what_must_not_come_is_found(reply: Reply | None) -> None:
    with pytest.raises(Finding):
        judge(reply, "POST")
