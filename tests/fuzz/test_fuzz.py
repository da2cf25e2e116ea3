"""A quick run of the fuzzing (`make fuzz` runs it at length), and that it finds what is wrong."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import httpx
import pytest

from miaotui.v1 import gateway_pb2
from tests.fuzz.cases import Entry, Finding, case_random
from tests.fuzz.contract import NAME, check
from tests.fuzz.http import judge
from tests.fuzz.messages import random_message
from tests.fuzz.run import Run
from tests.fuzz.services import Services, running_services
from tests.fuzz.wire import Reply

CASES = 600


@pytest.fixture(scope="module")
async def fuzzed(
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[tuple[Services, list[Entry]]]:
    """Services and their entry points."""
    async with running_services(tmp_path_factory.mktemp("fuzz"), writes=False) as running:
        yield running


async def test_no_entry_point_falls_over(fuzzed: tuple[Services, list[Entry]]) -> None:
    services, entries = fuzzed
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


async def test_the_api_keeps_to_its_description(fuzzed: tuple[Services, list[Entry]]) -> None:
    services, _ = fuzzed
    run = Run(services, [], seed=5)
    await run.check_contract(4, ("examples", "fuzzing"))
    assert not run.failed, run.report()
    async with httpx.AsyncClient(base_url=services.url, trust_env=False) as http:
        paths = (await http.get("/openapi.json")).json()["paths"]
    described = {f"{method.upper()} {path}" for path, item in paths.items() for method in item}
    # It leaves out where the description itself is.
    assert set(run.tallies) == {f"{NAME}, {label}" for label in described - {"GET /openapi.json"}}
    assert run.tallies[f"{NAME}, POST /v1/qa"].outcomes["200"] > 0, "nothing was right"


async def test_a_description_that_is_wrong_is_found(
    fuzzed: tuple[Services, list[Entry]], tmp_path: Path
) -> None:
    services, _ = fuzzed
    async with httpx.AsyncClient(base_url=services.url, trust_env=False) as http:
        document = (await http.get("/openapi.json")).json()
    document["paths"] = {"/healthz": document["paths"]["/healthz"]}
    document["components"]["schemas"]["Alive"]["properties"]["status"] = {"type": "integer"}
    file = tmp_path / "openapi.json"
    file.write_text(json.dumps(document), "utf-8")
    told = await asyncio.to_thread(
        partial(check, services.url, 1, 2, ("fuzzing",), description=file)
    )
    ((_, what),) = told[f"{NAME}, GET /healthz"].findings[:1]
    assert "response_schema_conformance" in what


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
