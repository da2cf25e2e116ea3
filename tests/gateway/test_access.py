"""A gateway with API keys, over HTTP and gRPC: who comes in, how often, and what they see."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import openai
import pytest
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped,unused-ignore]
from redis.asyncio import Redis
from typer.testing import CliRunner

from gateway.access.keys import Limits, Scope, make_key, split_key
from gateway.access.store import KeyFile
from miaotui.cli.app import app
from miaotui.client import AsyncClient, MiaotuiError
from miaotui.v1 import gateway_pb2 as pb
from miaotui.v1 import gateway_pb2_grpc
from services.cache.redis import PREFIX
from services.rpc.channel import open_channel
from tests.gateway.conftest import Gateway, run_gateway, until
from tests.gateway.fakes import Fakes
from tests.processes import RedisServer

PASSAGE = "It was built in 1925."


@dataclass
class Guarded:
    """A gateway and the keys that it knows."""

    gateway: Gateway
    file: KeyFile
    keys: dict[str, str]

    def add(self, name: str, scopes: tuple[Scope, ...] | None = None, **limits: Any) -> str:
        """Makes a key and returns it."""
        key, text = make_key(
            name,
            scopes=scopes or ("ask", "write", "documents"),
            limits=Limits.model_validate(limits),
        )
        self.file.add(key)
        self.keys[name] = text
        return text

    def bearer(self, name: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.keys[name]}"}

    async def ask(self, name: str, question: str = "When?", **more: Any) -> Any:
        body = {"question": question, "context": PASSAGE, **more}
        return await self.gateway.http.post("/v1/qa", json=body, headers=self.bearer(name))


@pytest.fixture(scope="module")
async def guarded(
    all_fakes: Fakes, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Guarded]:
    all_fakes.reset()
    directory = tmp_path_factory.mktemp("guarded")
    file = KeyFile(directory / "keys.json")
    made = Guarded(None, file, {})  # type: ignore[arg-type]
    for name in ("alice", "bob"):
        made.add(name)
    made.add("reader", ("ask",))
    made.add("operator", ("observe",))
    made.add("few", rate={"count": 3, "seconds": 3600})
    made.add("batches", rate={"count": 3, "seconds": 3600})
    made.add("daily", requests_per_day=4)
    made.add("talker", tokens_per_day=20)
    made.add("single", concurrency=1)
    made.add("rpc", rate={"count": 2, "seconds": 3600})
    settings = {"KEYS": str(directory / "keys.json"), "LOG_LEVEL": "debug"}
    async with run_gateway(
        all_fakes, directory, models="extractive generative", **settings
    ) as running:
        made.gateway = running
        yield made


@pytest.fixture(autouse=True)
def _without_faults(all_fakes: Fakes) -> None:
    all_fakes.reset()


PATHS = [
    ("POST", "/v1/qa"),
    ("POST", "/v1/qa/batch"),
    ("GET", "/v1/documents"),
    ("POST", "/v1/documents"),
    ("DELETE", "/v1/documents/1"),
    ("GET", "/v1/collections"),
    ("POST", "/v1/search"),
    ("GET", "/v1/models"),
    ("GET", "/v1/pipeline"),
    ("GET", "/v1/live"),
    ("GET", "/v1/traces"),
    ("GET", "/v1/no-such-path"),
    ("GET", "/metrics"),
]


@pytest.mark.parametrize("key", [None, "", "mt_x", "wrong", "of a foreign gateway"])
async def test_without_a_valid_key_nothing_is_told(guarded: Guarded, key: str | None) -> None:
    if key == "wrong":
        right = guarded.keys["alice"]
        key = right[:-1] + ("0" if right[-1] != "0" else "1")
    elif key == "of a foreign gateway":
        key = make_key("foreign")[1]
    headers = {} if key is None else {"X-API-Key": key}
    for method, path in PATHS:
        response = await guarded.gateway.http.request(method, path, headers=headers)
        assert response.status_code == 401, path
        assert response.headers["www-authenticate"] == 'Bearer realm="miaotui"'
        assert response.headers["content-type"] == "application/problem+json"
        assert response.json()["type"] == "/problems/unauthenticated"
        assert not key or key not in response.text
        assert response.headers["x-request-id"]
    for path in ("/", "/docs", "/healthz", "/readyz", "/openapi.json", "/problems/unauthenticated"):
        assert (await guarded.gateway.http.get(path)).status_code == 200


async def test_both_headers_serve_and_openai_clients_work(guarded: Guarded) -> None:
    key = guarded.keys["alice"]
    body = {"question": "When?", "context": PASSAGE}
    for headers in ({"Authorization": f"bearer {key}"}, {"X-API-Key": key}):
        response = await guarded.gateway.http.post("/v1/qa", json=body, headers=headers)
        assert response.json()["answers"][0]["text"] == "1925"
    base = f"{guarded.gateway.url}/v1"
    async with openai.AsyncOpenAI(base_url=base, api_key=key, max_retries=0) as client:
        model = (await client.models.list()).data[-1].id
        written = await client.completions.create(model=model, prompt="Say:", max_tokens=5)
        assert written.choices[0].text
    async with openai.AsyncOpenAI(base_url=base, api_key="mt_no", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError) as refused:
            await client.completions.create(model=model, prompt="Say:", max_tokens=5)
        assert refused.value.code == "invalid_api_key"
    reader = guarded.keys["reader"]
    async with openai.AsyncOpenAI(base_url=base, api_key=reader, max_retries=0) as client:
        with pytest.raises(openai.PermissionDeniedError):
            await client.completions.create(model=model, prompt="Say:", max_tokens=5)


async def test_a_key_does_what_its_scopes_say(guarded: Guarded) -> None:
    http = guarded.gateway.http
    assert (await guarded.ask("reader")).status_code == 200
    response = await guarded.ask("reader", mode="generative")
    assert (response.status_code, response.json()["type"]) == (403, "/problems/forbidden")
    assert '"write"' in response.json()["detail"]
    text = {"text": "The tower is 330 m high."}
    response = await http.post("/v1/documents", json=text, headers=guarded.bearer("reader"))
    assert response.status_code == 403
    assert (await guarded.ask("operator")).status_code == 403
    for path in ("/v1/live", "/v1/traces", "/metrics"):
        assert (await http.get(path, headers=guarded.bearer("alice"))).status_code == 403
        assert (await http.get(path, headers=guarded.bearer("operator"))).status_code == 200
    for name in ("reader", "operator", "alice"):
        assert (await http.get("/v1/models", headers=guarded.bearer(name))).status_code == 200


async def test_rates_and_quotas_are_told_with_when_to_come_again(guarded: Guarded) -> None:
    statuses = [(await guarded.ask("few")).status_code for _ in range(4)]
    assert statuses == [200, 200, 200, 429]
    refused = await guarded.ask("few")
    assert refused.json()["type"] == "/problems/rate-limited"
    assert 1100 <= int(refused.headers["retry-after"]) <= 1200
    statuses = [(await guarded.ask("daily")).status_code for _ in range(3)]
    assert statuses == [200, 200, 200]
    http, bearer = guarded.gateway.http, guarded.bearer("daily")
    questions = [{"question": f"{n}?", "context": PASSAGE} for n in range(2)]
    refused = await http.post("/v1/qa/batch", json={"requests": questions}, headers=bearer)
    assert refused.json()["type"] == "/problems/quota-exceeded"
    assert 0 < int(refused.headers["retry-after"]) <= 86_400
    # Looking is not asking.
    assert (await http.get("/v1/models", headers=bearer)).status_code == 200


async def test_a_batch_counts_as_its_questions(guarded: Guarded) -> None:
    questions = [{"question": f"{n}?", "context": PASSAGE} for n in range(8)]
    http, bearer = guarded.gateway.http, guarded.bearer("batches")
    response = await http.post("/v1/qa/batch", json={"requests": questions}, headers=bearer)
    assert response.status_code == 200
    assert len(response.text.splitlines()) == 8
    refused = await guarded.ask("batches")
    # Eight of three an hour: the next place is free after six intervals.
    assert refused.status_code == 429
    assert 7000 < int(refused.headers["retry-after"]) <= 7200


async def test_one_at_once_and_the_place_is_given_back(guarded: Guarded, all_fakes: Fakes) -> None:
    gate = all_fakes.shard.faults.hold()
    first = asyncio.create_task(guarded.ask("single", "first"))
    await until(lambda: all_fakes.shard.faults.running == 1)
    assert (await guarded.ask("single", "second")).status_code == 429
    gate.set()
    assert (await first).status_code == 200
    all_fakes.shard.faults.hold()
    # A caller that goes away gives its place back, too.
    leaving = asyncio.create_task(guarded.ask("single", "third"))
    await until(lambda: all_fakes.shard.faults.running == 1)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    await until(lambda: all_fakes.shard.faults.running == 0)
    all_fakes.reset()
    assert (await guarded.ask("single", "fourth")).status_code == 200


async def test_generated_tokens_use_up_their_quota(guarded: Guarded) -> None:
    http, bearer = guarded.gateway.http, guarded.bearer("talker")
    body = {"prompt": "Say:", "max_tokens": 15, "ignore_eos": True, "temperature": 0}

    async def write() -> Any:
        return await http.post("/v1/completions", json=body, headers=bearer)

    first = await write()
    tokens = first.json()["usage"]["completion_tokens"]
    assert 0 < tokens < 20
    again = await write()
    assert again.headers["x-miaotui-cache"] == "hit"  # which generates nothing, and is free
    number = 0
    while (response := await write()).status_code == 200:
        number += 1
        body["prompt"] = f"Say {number}:"
        assert number <= 20 / tokens + 3
    assert response.status_code == 429
    error = response.json()["error"]
    assert (error["code"], error["type"]) == ("insufficient_quota", "rate_limit_error")


async def test_what_one_asked_another_cannot_learn(guarded: Guarded, all_fakes: Fakes) -> None:
    question = "A question of alice's?"
    assert (await guarded.ask("alice", question)).json()["cache"] == "miss"
    assert (await guarded.ask("alice", question)).json()["cache"] == "hit"
    assert (await guarded.ask("bob", question)).json()["cache"] == "miss"
    assert all_fakes.shard.faults.calls == 2
    # At once: each has it computed, and neither waits for the other's.
    gate = all_fakes.shard.faults.hold()
    names = ("alice", "alice", "bob", "bob")
    asked = [asyncio.create_task(guarded.ask(name, "At once?")) for name in names]
    await guarded.gateway.until_asked(4, guarded.keys["operator"])
    gate.set()
    statuses = [(await task).json()["cache"] for task in asked]
    assert sorted(statuses[:2]) == sorted(statuses[2:]) == ["miss", "shared"]
    assert all_fakes.shard.faults.calls == 4
    for name, expected in (("alice", "miss"), ("alice", "hit"), ("bob", "miss")):
        written = await guarded.ask(name, "Written?", mode="generative")
        assert written.json()["cache"] == expected


async def test_documents_belong_to_the_key_that_added_them(guarded: Guarded) -> None:
    http = guarded.gateway.http
    text = {"text": "The lighthouse was built in 1771.", "source": "lighthouse"}
    added = await http.post("/v1/documents", json=text, headers=guarded.bearer("alice"))
    identifier = added.json()["documents"][0]["id"]
    for name, there in (("alice", True), ("bob", False)):
        bearer = guarded.bearer(name)
        listed = await http.get("/v1/documents", headers=bearer)
        assert listed.status_code == (200 if there else 404)
        collections = (await http.get("/v1/collections", headers=bearer)).json()["collections"]
        assert [one["name"] for one in collections] == (["default"] if there else [])
        one = await http.get(f"/v1/documents/{identifier}", headers=bearer)
        assert one.status_code == (200 if there else 404)
        query = {"query": "lighthouse"}
        found = await http.post("/v1/search", json=query, headers=bearer)
        assert found.status_code == (200 if there else 404)
        asked = await http.post("/v1/qa", json={"question": "When built?"}, headers=bearer)
        assert asked.status_code == (200 if there else 422)
    foreign = await http.delete(f"/v1/documents/{identifier}", headers=guarded.bearer("bob"))
    assert foreign.status_code == 404
    own = await http.delete(f"/v1/documents/{identifier}", headers=guarded.bearer("alice"))
    assert own.status_code == 204


async def test_keys_come_and_go_without_a_restart(guarded: Guarded) -> None:
    text = guarded.add("new")
    parts = split_key(text)
    assert parts is not None
    for change, status in ((None, 200), (guarded.file.revoke, 401)):
        if change is not None:
            change(parts[0])
        deadline = time.monotonic() + 30
        while (await guarded.ask("new")).status_code != status:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)


def call(guarded: Guarded, stub: Any, name: str, method: str, request: Any) -> Any:
    key = guarded.keys.get(name, name)
    metadata = (("authorization", f"Bearer {key}"),) if key else ()
    return getattr(stub, method)(request, metadata=metadata, timeout=60)


async def test_grpc_asks_for_the_same_keys(guarded: Guarded) -> None:
    question = pb.AnswerRequest(question="When?", context=PASSAGE)
    prompt = pb.WriteRequest(text="Say:", options=pb.WriteOptions(max_tokens=3))
    async with open_channel(guarded.gateway.grpc_target) as channel:
        stub = gateway_pb2_grpc.GatewayServiceStub(channel)
        for key in ("", "mt_wrong"):
            for method, request in (("Answer", question), ("ListModels", pb.ListModelsRequest())):
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await call(guarded, stub, key, method, request)
                assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                async for _ in call(guarded, stub, key, "Write", prompt):
                    pass
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            async for _ in call(guarded, stub, "reader", "Write", prompt):
                pass
        assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
        generative = pb.AnswerRequest(question="When?", context=PASSAGE, generative=True)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call(guarded, stub, "reader", "Answer", generative)
        assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
        assert [u async for u in call(guarded, stub, "alice", "Write", prompt)]
        assert (await call(guarded, stub, "rpc", "Answer", question)).answers[0].text == "1925"
        batch = pb.AnswerBatchRequest(requests=[question] * 3)
        assert len([r async for r in call(guarded, stub, "rpc", "AnswerBatch", batch)]) == 3
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call(guarded, stub, "rpc", "Answer", question)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        trailing = dict(refused.value.trailing_metadata() or ())
        assert trailing["grpc-retry-pushback-ms"] == "-1"
        details = trailing["grpc-status-details-bin"]
        assert isinstance(details, bytes)
        (packed,) = status_pb2.Status.FromString(details).details
        retry = error_details_pb2.RetryInfo()
        assert packed.Unpack(retry)
        assert 3000 < retry.retry_delay.seconds <= 5400
        # Of what tenants do, gRPC keeps apart the same.
        answers = [
            await call(
                guarded,
                stub,
                name,
                "Answer",
                pb.AnswerRequest(question="By gRPC?", context=PASSAGE),
            )
            for name in ("alice", "alice", "bob")
        ]
        statuses = [pb.CacheStatus.Name(answer.cache) for answer in answers]
        assert statuses == [f"CACHE_STATUS_{s}" for s in ("MISS", "HIT", "MISS")]


async def test_clients_and_commands_bring_a_key(
    guarded: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, key = guarded.gateway.url, guarded.keys["alice"]
    async with AsyncClient(url, key=key) as client:
        assert (await client.ask("When?", PASSAGE)).text == "1925"
    monkeypatch.delenv("MIAOTUI_KEY", raising=False)
    async with AsyncClient(url) as client:
        with pytest.raises(MiaotuiError) as refused:
            await client.ask("When?", PASSAGE)
        assert refused.value.status == 401
    run = CliRunner()
    grpc_target = guarded.gateway.grpc_target

    async def command(*arguments: str) -> Any:
        return await asyncio.to_thread(run.invoke, app, list(arguments))

    ask = ("ask", "When?", "--context", PASSAGE, "--json")
    refused_command = await command(*ask, "--url", url)
    assert refused_command.exit_code == 1
    assert "mt_…" in refused_command.output
    monkeypatch.setenv("MIAOTUI_KEY", key)
    async with AsyncClient(url) as client:
        assert (await client.ask("When?", PASSAGE)).text == "1925"
    for where in (("--url", url), ("--grpc", grpc_target)):
        answered = await command(*ask, *where)
        assert json.loads(answered.stdout)["answers"][0]["text"] == "1925"
    for arguments in (("write", "Say:", "--max-tokens", "3"), ("models",), ("status",)):
        assert (await command(*arguments, "--url", url)).exit_code == 0
    assert (await command("write", "Say:", "--key", "mt_no", "--url", url)).exit_code == 1


async def test_keys_are_nowhere_but_with_their_owners(guarded: Guarded) -> None:
    """After all of the above; log level debug."""
    bearer = guarded.bearer("operator")
    told = (await guarded.gateway.http.get("/metrics", headers=bearer)).text
    traces = (await guarded.gateway.http.get("/v1/traces", headers=bearer)).json()["traces"]
    for trace in traces[:100]:
        one = await guarded.gateway.http.get(f"/v1/traces/{trace['trace_id']}", headers=bearer)
        told += one.text
    for text in guarded.keys.values():
        parts = split_key(text)
        assert parts is not None
        for secret in (text, parts[1]):
            assert secret not in told
            assert secret not in guarded.gateway.process.log
    alice = split_key(guarded.keys["alice"])
    assert alice is not None
    assert f'key="{alice[0]}"' in told
    assert 'outcome="rate-limited"' in told


async def test_the_document_says_where_a_key_is_needed(guarded: Guarded) -> None:
    document = (await guarded.gateway.http.get("/openapi.json")).json()
    schemes = document["components"]["securitySchemes"]
    assert schemes["bearer"]["scheme"] == "bearer"
    assert schemes["apiKey"]["name"] == "X-API-Key"
    for path, item in document["paths"].items():
        for operation in item.values():
            needs = path.startswith("/v1/") or path == "/metrics"
            assert operation.get("security") == (
                [{"bearer": []}, {"apiKey": []}] if needs else None
            )
            assert {"401", "403", "429"} <= set(operation["responses"]) or not needs


@pytest.mark.parametrize("encrypted", [False, True])
async def test_a_foreign_tenants_entry_is_refused(
    all_fakes: Fakes, redis_server: RedisServer, tmp_path: Path, encrypted: bool
) -> None:
    file = KeyFile(tmp_path / "keys.json")
    texts = []
    for name in ("one", "two"):
        key, text = make_key(name, limits=Limits(requests_per_day=5))
        file.add(key)
        texts.append(text)
    settings = {
        "REDIS_URL": redis_server.url,
        "CACHE_SECRET": "shared",
        "CACHE_TIMEOUT": "1",
        "KEYS": str(tmp_path / "keys.json"),
    }
    if encrypted:
        settings["CACHE_ENCRYPTION_KEY"] = "e" * 64
    async with (
        run_gateway(all_fakes, tmp_path, **settings) as gateway,
        Redis.from_url(redis_server.url) as redis,
    ):

        async def ask(text: str) -> Any:
            body = {"question": "Which year?", "context": PASSAGE}
            headers = {"X-API-Key": text}
            return await gateway.http.post("/v1/qa", json=body, headers=headers)

        async def entries(kind: bytes) -> set[bytes]:
            return {key async for key in redis.scan_iter(PREFIX + kind + b":*")}

        assert (await ask(texts[0])).json()["cache"] == "miss"
        await until_there(entries, b"answer", 1)
        (first,) = await entries(b"answer")
        assert (await ask(texts[1])).json()["cache"] == "miss"
        await until_there(entries, b"answer", 2)
        (second,) = await entries(b"answer") - {first}
        if encrypted:
            assert b"answerable" not in str(await redis.get(first)).encode()
        # The values change places: neither opens, and both are computed anew.
        values = [await redis.get(first), await redis.get(second)]
        await redis.set(first, values[1] or b"", ex=60)
        await redis.set(second, values[0] or b"", ex=60)
        calls = all_fakes.shard.faults.calls
        for text in texts:
            answer = await ask(text)
            assert (answer.status_code, answer.json()["cache"]) == (200, "miss")
            assert answer.json()["answers"][0]["text"] == "1925"
        assert all_fakes.shard.faults.calls == calls + 2
        assert (await ask(texts[0])).json()["cache"] == "hit"
        # The limits are counted in there, too, under the keys' ids.
        counted = [key async for key in redis.scan_iter(PREFIX + b"key:*")]
        requests = [await redis.hget(key, "requests") for key in counted]
        assert sorted(map(str, requests)) == ["b'2'", "b'3'"]
        for key in counted:
            assert 0 < await redis.ttl(key) <= 2 * 86_400
            for text in texts:
                assert text.rsplit("_", 1)[1].encode() not in key

        # Without Redis, keys are still checked and limits still hold.
        redis_server.kill()
        statuses = [(await ask(texts[0])).status_code for _ in range(4)]
        assert statuses == [200, 200, 429, 429]
        assert (await ask("mt_wrong")).status_code == 401


async def until_there(entries: Any, kind: bytes, count: int) -> None:
    """Waits until the cache holds so many entries of a kind."""
    for _ in range(1000):
        if len(await entries(kind)) == count:
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"the cache does not hold {count} entries of {kind!r}")
