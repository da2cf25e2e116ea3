"""Documents over HTTP: adding, listing, removing, searching, and answers with their sources.

The model is a fake that finds digits; everything else is real, in a gateway process.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.encoder import EncoderStage
from tests.gateway.conftest import Gateway, run_gateway
from tests.gateway.fakes import Fakes
from tests.gateway.test_contract import validator
from tests.retrieval.files import docx, pdf

TOWER = "The Eiffel Tower was finished in 1889. It stands in Paris."
MUSEUM = "故宫博物院位于北京，成立于1925年，藏品很多。"
SECRET = "sesame"


async def post(gateway: Gateway, path: str, **body: Any) -> httpx.Response:
    headers = {"content-type": "application/json"}
    return await gateway.http.post(path, content=json.dumps(body), headers=headers)


async def upload(
    gateway: Gateway, files: dict[str, bytes], collection: str | None = None
) -> httpx.Response:
    parts = [("file", (name, data)) for name, data in files.items()]
    data = {} if collection is None else {"collection": collection}
    return await gateway.http.post("/v1/documents", files=parts, data=data)


@pytest.fixture(scope="module")
async def running(
    all_fakes: Fakes, encoder_stage: EncoderStage, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Gateway]:
    directory = tmp_path_factory.mktemp("documents")
    async with run_gateway(
        all_fakes,
        directory,
        ENCODER_STAGES=encoder_stage.address,
        MAX_UPLOAD_BYTES="200000",
        MAX_DOCUMENT_CHARACTERS="50000",
    ) as gateway:
        yield gateway


@pytest.fixture
async def schemas(running: Gateway) -> Any:
    return (await running.http.get("/openapi.json")).json()


async def test_the_way_of_a_text(running: Gateway, fakes: Fakes, schemas: Any) -> None:
    text = f"Nothing of interest here.\n\n{TOWER}"
    added = await post(
        running, "/v1/documents", text=text, source="t.txt", title="T", collection="one"
    )
    assert added.status_code == 200
    validator(schemas, "AddResponse").validate(added.json())
    [document] = added.json()["documents"]
    assert (document["source"], document["outcome"]) == ("t.txt", "added")
    again = await post(running, "/v1/documents", text=text, source="t.txt", collection="one")
    assert again.json()["documents"] == [{**document, "outcome": "unchanged"}]

    asked = await post(
        running, "/v1/qa", question="When was the Eiffel Tower finished?", collection="one"
    )
    body = asked.json()
    assert asked.status_code == 200, body
    validator(schemas, "CollectionAnswer").validate(body)
    assert body["answerable"]
    [answer] = body["answers"]
    assert answer["text"] == "1889" == text[answer["start"] : answer["end"]]
    assert (answer["document"], answer["source"]) == (document["id"], "t.txt")
    passage = body["passages"][answer["passage"]]
    assert passage["text"] == text[passage["start"] : passage["end"]]
    assert passage["retrieval"]["lexical_rank"] == 1
    assert body["cache"] == "miss"
    assert body["timings"][0]["hop"] == "retrieval"

    repeated = await post(
        running, "/v1/qa", question="When was the Eiffel Tower finished?", collection="one"
    )
    assert repeated.json()["cache"] == "hit"
    assert repeated.json()["answers"] == body["answers"]

    detail = await running.http.get(f"/v1/documents/{document['id']}?collection=one")
    validator(schemas, "DocumentDetail").validate(detail.json())
    assert (detail.json()["text"], detail.json()["title"]) == (text, "T")
    gone = await running.http.delete(f"/v1/documents/{document['id']}?collection=one")
    assert (gone.status_code, gone.content) == (204, b"")
    assert (await running.http.get(f"/v1/documents/{document['id']}")).status_code == 404
    nothing = await post(
        running, "/v1/qa", question="When was the Eiffel Tower finished?", collection="one"
    )
    assert (nothing.json()["answerable"], nothing.json()["answers"]) == (False, [])


async def test_files_of_all_kinds_with_pages_and_headings(running: Gateway, fakes: Fakes) -> None:
    files = {
        "dir/tower.md": f"# Buildings\n\n## Towers\n\n{TOWER}".encode(),
        "museum.txt": MUSEUM.encode("gb18030"),
        "bridge.html": b"<title>B</title><p>The Golden Gate Bridge was opened in 1937.</p>",
        "canal.pdf": pdf([["About canals."], ["The Suez Canal was opened in 1869."]]),
        "dam.docx": docx([("Heading1", "Dams"), ("", "The Hoover Dam was finished in 1936.")]),
        "picture.png": b"\x89PNG",
        "broken.pdf": b"%PDF-1.4 nothing",
    }
    added = (await upload(running, files, "files")).json()
    assert [d["source"] for d in added["documents"]] == list(files)[:5]
    assert [s["source"] for s in added["skipped"]] == ["picture.png", "broken.pdf"]
    assert "of this kind" in added["skipped"][0]["reason"]
    assert "damaged" in added["skipped"][1]["reason"]
    for question, text, source, page, heading in (
        ("When was the Eiffel Tower finished?", "1889", "dir/tower.md", None, "Buildings › Towers"),
        ("故宫博物院成立于哪一年？", "1925", "museum.txt", None, ""),
        ("When was the Golden Gate Bridge opened?", "1937", "bridge.html", None, ""),
        ("When was the Suez Canal opened?", "1869", "canal.pdf", 2, ""),
        ("When was the Hoover Dam finished?", "1936", "dam.docx", None, "Dams"),
    ):
        body = (await post(running, "/v1/qa", question=question, collection="files")).json()
        [answer] = body["answers"]
        assert answer["text"] == text
        assert (answer["source"], answer["page"], answer["heading"]) == (source, page, heading)
    assert len({a["id"] for a in added["documents"]}) == 5


async def test_all_passages_are_read_in_one_batch(running: Gateway, fakes: Fakes) -> None:
    for number in range(6):
        text = f"Bridge number {number} over the Wolga was built in {1900 + number}."
        await post(running, "/v1/documents", text=text, source=f"b{number}", collection="many")
    before = fakes.shard.faults.calls
    body = (
        await post(
            *(running, "/v1/qa"),
            question="When was the bridge over the Wolga built?",
            collection="many",
            passages=4,
            top_k=8,
        )
    ).json()
    assert fakes.shard.faults.calls == before + 1
    assert len(body["passages"]) == 4
    assert {a["passage"] for a in body["answers"]} == {0, 1, 2, 3}
    scores = [a["score"] for a in body["answers"]]
    assert scores == sorted(scores, reverse=True)
    assert sum(scores) <= 1


async def test_no_answer_where_the_documents_have_none(running: Gateway, fakes: Fakes) -> None:
    await post(running, "/v1/documents", text=TOWER, source="t", collection="none")
    await post(
        running, "/v1/documents", text="A text without digits.", source="d", collection="none"
    )
    for question in (
        "Which digits are here?",  # no span beats "no answer"
        "When was the first human footprint on the surface of planet Mars finished?",
        "水星上有多少居民？",
    ):
        body = (await post(running, "/v1/qa", question=question, collection="none")).json()
        assert (body["answerable"], body["answers"]) == (False, []), question


async def test_search(running: Gateway, schemas: Any) -> None:
    await post(running, "/v1/documents", text=TOWER, source="t", collection="search")
    await post(running, "/v1/documents", text=MUSEUM, source="m", collection="search")
    found = await post(running, "/v1/search", query="towers in Paris", collection="search")
    validator(schemas, "SearchResponse").validate(found.json())
    assert [p["source"] for p in found.json()["passages"]] == ["t"]
    # Traditional characters find simplified ones.
    found = await post(running, "/v1/search", query="國立故宮", collection="search", limit=1)
    assert [p["source"] for p in found.json()["passages"]] == ["m"]


async def test_lists(running: Gateway, schemas: Any) -> None:
    for name in "cab":
        await post(running, "/v1/documents", text=f"{TOWER} {name}", source=name, collection="l")
    first = (await running.http.get("/v1/documents?collection=l&limit=2")).json()
    validator(schemas, "DocumentList").validate(first)
    assert [d["source"] for d in first["documents"]] == ["a", "b"]
    rest = await running.http.get(f"/v1/documents?collection=l&limit=2&after={first['next']}")
    assert [d["source"] for d in rest.json()["documents"]] == ["c"]
    assert rest.json()["next"] is None
    collections = (await running.http.get("/v1/collections")).json()
    validator(schemas, "CollectionList").validate(collections)
    assert {"name": "l", "documents": 3, "passages": 3} in [
        {key: one[key] for key in ("name", "documents", "passages")}
        for one in collections["collections"]
    ]


async def vectors_of(gateway: Gateway, name: str, count: int) -> None:
    """Waits until so many passages of a collection have vectors."""
    for _ in range(2400):
        listed = (await gateway.http.get("/v1/collections")).json()["collections"]
        if [one["vectors"] for one in listed if one["name"] == name] == [count]:
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"no vectors came\n{gateway.process.tail()}")


async def found_by_meaning(
    gateway: Gateway, collection: str, dense: str, seen: Counter[str] | None = None
) -> list[str]:
    """The sources found for a query that has no word in common with them, once it goes so.

    `seen` counts how it went each time: a busy encoder may give a question no vector in time.
    """
    query = "A French landmark made of metal, with a great view"
    for _ in range(60):
        found = (await post(gateway, "/v1/search", query=query, collection=collection)).json()
        assert all(p["retrieval"]["lexical_rank"] is None for p in found["passages"])
        if seen is not None:
            seen[found["dense"]] += 1
        if found["dense"] == dense:
            return [p["source"] for p in found["passages"]]
        await asyncio.sleep(0.2)
    raise AssertionError(f"it went otherwise each time: {found['dense']}")


async def test_vectors_follow(running: Gateway) -> None:
    await post(running, "/v1/documents", text=TOWER, source="t", collection="vectors")
    await vectors_of(running, "vectors", 1)
    assert await found_by_meaning(running, "vectors", "used") == ["t"]
    await post(running, "/v1/documents", text=MUSEUM, source="m", collection="unencoded")
    for query, dense in (("museum", "no-vectors"), ("故宫博物院位于哪里", "language")):
        found = await post(running, "/v1/search", query=query, collection="unencoded")
        assert found.json()["dense"] == dense
    pipeline = (await running.http.get("/v1/pipeline")).json()
    assert [one["kind"] for one in pipeline["others"]] == ["embedding"]
    assert pipeline["others"][0]["stages"][0]["replicas"][0]["state"] == "serving"


async def test_without_the_encoders_stages(all_fakes: Fakes, tmp_path: Path) -> None:
    """Words find documents; vectors are made once the stages are there, and none is lost."""
    stage = EncoderStage(tmp_path)
    seen: Counter[str] = Counter()
    async with run_gateway(all_fakes, tmp_path, ENCODER_STAGES=stage.address) as gateway:
        await post(gateway, "/v1/documents", text=TOWER, source="t", collection="c")
        listed = (await gateway.http.get("/v1/collections")).json()
        counts = {"documents": 1, "passages": 1, "vectors": 0, "waiting": 1}
        assert listed == {"collections": [{"name": "c", **counts}], "encoder": "away"}
        assert await found_by_meaning(gateway, "c", "away", seen) == []
        question = {"question": "When was the Eiffel Tower finished?", "collection": "c"}
        answer = (await post(gateway, "/v1/qa", **question)).json()
        assert (answer["answers"][0]["text"], answer["dense"]) == ("1889", "away")
        seen["away"] += 1
        stage.start()
        try:
            await vectors_of(gateway, "c", 1)
            (one,) = (await gateway.http.get("/v1/collections")).json()["collections"]
            assert one["waiting"] == 0
            assert await found_by_meaning(gateway, "c", "used", seen) == ["t"]
            stage.kill()
            assert await found_by_meaning(gateway, "c", "away", seen) == []
            await post(gateway, "/v1/documents", text=TOWER, source="u", collection="c")
            stage.start()
            await vectors_of(gateway, "c", 2)
            assert sorted(await found_by_meaning(gateway, "c", "used", seen)) == ["t", "u"]
        finally:
            stage.stop()
        counted = "miaotui_gateway_retrievals_total"
        for dense in ("away", "used"):
            assert await gateway.metric(counted, dense=dense) == seen[dense]


@pytest.mark.parametrize(
    ("path", "body", "status", "pointer"),
    [
        ("/v1/qa", {"question": SECRET}, 422, "/context"),
        ("/v1/qa", {"question": SECRET, "collection": "nix"}, 404, None),
        ("/v1/qa", {"question": SECRET, "collection": "../x"}, 422, "/collection"),
        ("/v1/qa", {"question": SECRET, "collection": 5}, 422, "/collection"),
        ("/v1/qa", {"question": SECRET, "passages": 51}, 422, "/passages"),
        ("/v1/qa", {"question": SECRET, SECRET: 1}, 422, ""),
        ("/v1/search", {"query": ""}, 422, "/query"),
        ("/v1/search", {"query": SECRET, "limit": 0}, 422, "/limit"),
        ("/v1/search", {"query": SECRET, "collection": "nix"}, 404, None),
        ("/v1/search", {"query": SECRET * 1000}, 422, "/query"),
        ("/v1/documents", {"text": " "}, 422, "/text"),
        ("/v1/documents", {"text": SECRET * 9000}, 422, "/text"),
        ("/v1/documents", {"text": f"{SECRET}\ud800"}, 422, "/text"),
        ("/v1/documents", {"text": SECRET, "collection": "a/b"}, 422, "/collection"),
        ("/v1/documents", {"text": SECRET, "source": "x" * 1025}, 422, "/source"),
        ("/v1/documents", {"text": "x" * 300_000}, 413, None),
    ],
)
async def test_what_is_wrong_is_named(
    running: Gateway, path: str, body: dict[str, Any], status: int, pointer: str | None
) -> None:
    response = await post(running, path, **body)
    assert response.status_code == status, response.text
    assert SECRET not in response.text
    problem = response.json()
    assert response.headers["content-type"] == "application/problem+json"
    assert [e["pointer"] for e in problem["errors"]] == ([] if pointer is None else [pointer])


async def test_uploads_that_are_wrong(running: Gateway) -> None:
    too_large = await upload(running, {"a.txt": b"x" * 300_000})
    assert too_large.status_code == 413
    chunked = await running.http.post(
        "/v1/documents",
        content=_endless(),
        headers={"content-type": "multipart/form-data; boundary=x"},
    )
    assert chunked.status_code == 413
    no_file = await running.http.post("/v1/documents", files={"a": (None, "text")})
    assert no_file.status_code == 422
    unreadable = await running.http.post(
        "/v1/documents", content=b"zzz", headers={"content-type": "multipart/form-data"}
    )
    assert unreadable.status_code == 400
    text = await running.http.post("/v1/documents", content=b"zzz")
    assert text.status_code == 415
    for query in ("limit=0", "limit=x", "limit=1001", f"limit=00000000{10**30}", "collection=a/b"):
        assert (await running.http.get(f"/v1/documents?{query}")).status_code == 422
    assert (await running.http.get("/v1/documents?collection=nix")).status_code == 404
    assert (await running.http.delete("/v1/documents/nix?collection=nix")).status_code == 404


async def _endless() -> AsyncIterator[bytes]:
    yield b'--x\r\nContent-Disposition: form-data; name="f"; filename="a.txt"\r\n\r\n'
    for _ in range(100):
        yield b"y" * 10_000


async def test_questions_and_documents_at_once(running: Gateway, fakes: Fakes) -> None:
    await post(running, "/v1/documents", text=TOWER, source="t", collection="busy")

    async def add(number: int) -> None:
        text = f"River {number} is long. " * 100
        response = await post(
            running, "/v1/documents", text=text, source=f"r{number}", collection="busy"
        )
        assert response.json()["documents"][0]["outcome"] == "added"

    async def ask() -> None:
        for _ in range(5):
            body = (
                await post(running, "/v1/qa", question="Eiffel Tower finished?", collection="busy")
            ).json()
            assert body["answers"][0]["text"] == "1889"

    await asyncio.gather(*(add(number) for number in range(20)), *(ask() for _ in range(4)))


def _name(number: int) -> str:
    """A name without digits, which the fake would take for the answer."""
    return "".join(chr(ord("k") + int(digit)) for digit in f"{number:04}")


async def test_kill_9_in_the_middle_loses_nothing_acknowledged(
    all_fakes: Fakes, tmp_path: Path
) -> None:
    all_fakes.reset()
    acknowledged: list[str] = []

    async def add_many(gateway: Gateway) -> None:
        for number in range(10_000):
            name = f"d{number}.txt"
            text = f"Bridge {_name(number)} was opened in {1000 + number}.\n" * 50
            try:
                response = await upload(gateway, {name: text.encode()})
            except httpx.TransportError:
                return
            if response.status_code == 200:
                acknowledged.append(name)

    async with run_gateway(all_fakes, tmp_path) as gateway:
        adding = asyncio.create_task(add_many(gateway))
        while len(acknowledged) < 15:
            assert not adding.done()
            await asyncio.sleep(0.01)
        gateway.process.kill()
        await adding
    async with run_gateway(all_fakes, tmp_path) as gateway:
        listed = (await gateway.http.get("/v1/documents?limit=1000")).json()["documents"]
        assert {d["source"] for d in listed} >= set(acknowledged)
        last = len(acknowledged) - 1
        question = f"When was the bridge {_name(last)} opened?"
        body = (await post(gateway, "/v1/qa", question=question)).json()
        assert body["answers"][0]["text"] == str(1000 + last)
        assert body["answers"][0]["source"] == acknowledged[-1]
        # Going on where it stopped: what was acknowledged is there, unchanged.
        text = f"Bridge {_name(0)} was opened in 1000.\n" * 50
        again = (await upload(gateway, {"d0.txt": text.encode()})).json()
        assert again["documents"][0]["outcome"] == "unchanged"
