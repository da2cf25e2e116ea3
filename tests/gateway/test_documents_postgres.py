"""Documents over HTTP in a PostgreSQL database: the whole way, two gateways, kill -9, and a server
that goes away and comes back."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx

from tests.gateway.conftest import Gateway, run_gateway
from tests.gateway.fakes import Fakes
from tests.postgres import PASSWORD, PostgresServer

TOWER = "The Eiffel Tower was finished in 1889. It stands in Paris."
MUSEUM = "故宫博物院位于北京，成立于1925年，藏品很多。"
LEAST_ADDED = 5


async def add(gateway: Gateway, source: str, text: str) -> httpx.Response:
    """POST /v1/documents."""
    return await gateway.http.post("/v1/documents", json={"text": text, "source": source})


async def answer(gateway: Gateway, question: str) -> tuple[str, str]:
    """The best answer and its source."""
    response = await gateway.http.post("/v1/qa", json={"question": question})
    assert response.status_code == 200, response.text
    [best, *_] = response.json()["answers"]
    return best["text"], best["source"]


async def listed(gateway: Gateway) -> list[str]:
    """All documents' sources."""
    response = await gateway.http.get("/v1/documents?limit=1000")
    assert response.status_code == 200, response.text
    return [document["source"] for document in response.json()["documents"]]


async def test_the_way_of_documents_in_postgresql(
    all_fakes: Fakes, postgres: PostgresServer, tmp_path: Path
) -> None:
    all_fakes.reset()
    url = await asyncio.to_thread(postgres.make, f"d{uuid4().hex}")
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    acknowledged: list[str] = []

    async def add_many(gateway: Gateway) -> None:
        for number in range(10_000):
            name = f"bridge-{number}.txt"
            try:
                response = await add(gateway, name, f"A bridge of {number} arches. " * 40)
            except httpx.TransportError:
                return
            assert response.status_code == 200, response.text
            acknowledged.append(name)

    async with AsyncExitStack() as stack:
        one, two = [
            await stack.enter_async_context(run_gateway(all_fakes, folder, DOCUMENTS=url))
            for folder in folders
        ]
        added = (await add(one, "tower.txt", TOWER)).json()["documents"][0]
        assert added["outcome"] == "added"
        # What one gateway adds, the other knows.
        assert (await add(two, "tower.txt", TOWER)).json()["documents"] == [
            {**added, "outcome": "unchanged"}
        ]
        assert (await add(two, "museum.txt", MUSEUM)).status_code == 200
        tower = ("1889", "tower.txt")
        assert await answer(two, "When was the Eiffel Tower finished?") == tower
        assert await answer(one, "故宮博物院成立於哪一年？") == ("1925", "museum.txt")
        found = await one.http.post("/v1/search", json={"query": "北京的博物院"})
        assert found.json()["passages"][0]["text"] == MUSEUM

        adding = asyncio.create_task(add_many(one))
        while len(acknowledged) < LEAST_ADDED:
            assert not adding.done()
            await asyncio.sleep(0.01)
        one.process.kill()
        await adding
        assert set(await listed(two)) >= {"tower.txt", "museum.txt", *acknowledged}

        await asyncio.to_thread(postgres.stop)
        try:
            refused = await two.http.post("/v1/search", json={"query": "tower"})
        finally:
            await asyncio.to_thread(postgres.start)
        problem: dict[str, Any] = refused.json()
        assert refused.status_code == 503
        assert "The documents' store (PostgreSQL) cannot be used now." in problem["detail"]
        assert await answer(two, "When was the Eiffel Tower finished?") == tower
        gone = await two.http.delete(f"/v1/documents/{added['id']}")
        assert gone.status_code == 204

    async with run_gateway(all_fakes, folders[0], DOCUMENTS=url) as again:
        assert set(await listed(again)) >= {"museum.txt", *acknowledged}
        assert "tower.txt" not in await listed(again)
        repeated = await add(again, acknowledged[0], "A bridge of 0 arches. " * 40)
        assert repeated.json()["documents"][0]["outcome"] == "unchanged"
    logs = "".join((folder / "gateway.log").read_text() for folder in folders)
    assert "the documents' store failed: PostgreSQL at " in logs
    assert PASSWORD not in logs
