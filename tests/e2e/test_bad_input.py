"""What is wrong gets a clear refusal over HTTP and gRPC, and leaves nothing behind."""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator
from typing import Any

import grpc
import httpx
import pytest
from grpc import aio

from miaotui.v1 import (
    gateway_pb2,
    gateway_pb2_grpc,
    shard_pb2,
    shard_pb2_grpc,
    tokenizer_pb2,
    tokenizer_pb2_grpc,
)
from services.rpc.channel import open_channel
from tests.e2e.asking import Question, ask_grpc, ask_http, http_client
from tests.e2e.conftest import Checkpoints
from tests.processes import Cluster

# In everything that is sent here; must be in no log.
MARK = "quixotrump"
GOOD = Question(f"Who is {MARK}?", f"This is {MARK}, who writes bad requests.")
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
async def cluster(checkpoint: Checkpoints) -> AsyncIterator[Cluster]:
    async with Cluster(checkpoint("bert"), stages=2) as cluster:
        yield cluster


def _with(**fields: Any) -> bytes:
    return json.dumps({**GOOD.body, **fields}).encode()


BODIES: dict[str, tuple[bytes, set[int]]] = {
    "nothing": (b"", {400}),
    "empty object": (b"{}", {422}),
    "not JSON": (f"question={MARK}".encode(), {400}),
    "a list": (json.dumps([GOOD.body]).encode(), {400, 422}),
    "null": (b"null", {400, 422}),
    "cut off": (_with()[:-9], {400}),
    "nested too deep": (b"[" * 100_000, {400}),
    "twice the same field": (b'{"question": "a", ' + _with()[1:], {400, 422}),
    "empty question": (_with(question=""), {422}),
    "blank question": (_with(question=" \n\t\u3000"), {422}),
    "empty passage": (_with(context=""), {422}),
    "no passage": (json.dumps({"question": MARK}).encode(), {422}),
    "NUL in the question": (_with(question=f"{MARK}\0"), {422}),
    "NUL in the passage": (_with(context=f"\0{MARK}"), {422}),
    "invisible question": (_with(question="\u200b\u200d"), {200, 422}),
    "control characters alone": (_with(question="\x01\x02"), {422}),
    "invalid UTF-8": (_with().replace(MARK.encode(), b"\xff\xfe\x80"), {400}),
    "overlong UTF-8": (_with().replace(MARK.encode(), b"\xc0\xaf"), {400}),
    "a lone surrogate": (_with(question="\ud800"), {400, 422}),
    "number for a question": (_with(question=12345), {422}),
    "list for a passage": (_with(context=[MARK]), {422}),
    "object for a passage": (_with(context={"text": MARK}), {422}),
    "null for a passage": (_with(context=None), {422}),
    "text for top_k": (_with(top_k=MARK), {422}),
    "fraction for top_k": (_with(top_k=1.5), {422}),
    "true for top_k": (_with(top_k=True), {422}),
    "negative top_k": (_with(top_k=-1), {422}),
    "zero top_k": (_with(top_k=0), {422}),
    "huge top_k": (_with(top_k=10**30), {422}),
    "negative length": (_with(max_answer_length=-3), {422}),
    "NaN threshold": (_with().replace(b"}", b', "no_answer_threshold": NaN}'), {400, 422}),
    "infinite threshold": (_with().replace(b"}", b', "no_answer_threshold": 1e999}'), {400, 422}),
    "unknown field": (_with(**{MARK: 1}), {422}),
    "unknown normalization": (_with(normalization=MARK), {422}),
    "10 MB": (_with(context=f"{MARK} " * 950_000), {413}),
    "passage above the limit": (_with(context="长" * 600_000), {413, 422}),
    "question above the limit": (_with(question=MARK * 1_000), {422}),
}


@pytest.mark.parametrize("name", BODIES)
async def test_bad_bodies_over_http(name: str, cluster: Cluster) -> None:
    body, statuses = BODIES[name]
    async with http_client(cluster.url) as client:
        response = await client.post("/v1/qa", content=body, headers=JSON)
        assert response.status_code in statuses, response.text
        if response.status_code != 200:
            problem = _problem(response)
            assert MARK not in response.text, "a refusal does not repeat what was sent"
            assert problem["status"] == response.status_code
        assert (await ask_http(client, GOOD))["answers"]


async def test_other_bad_requests_over_http(cluster: Cluster) -> None:
    async with http_client(cluster.url) as client:
        for request, status in (
            (client.get("/v1/qa"), 405),
            (client.get(f"/{MARK}"), 404),
            (client.post("/v1/qa", content=_with(), headers={"content-type": "text/plain"}), 415),
            (
                client.post(
                    "/v1/qa", content=_with(), headers={**JSON, "content-encoding": "gzip"}
                ),
                415,
            ),
            (
                client.post("/v1/qa", content=_with(), headers={**JSON, "x-request-timeout": MARK}),
                400,
            ),
            (client.post("/v1/qa/batch", content=b'{"requests": []}', headers=JSON), 422),
            (client.post("/v1/qa/batch", content=_with(), headers=JSON), 422),
        ):
            response = await request
            assert response.status_code == status, response.text
            assert MARK not in json.dumps(_problem(response))
        assert (await ask_http(client, GOOD))["answers"]


async def test_a_bad_item_does_not_spoil_its_batch(cluster: Cluster) -> None:
    items = [GOOD.body, {**GOOD.body, "top_k": -1}, GOOD.body]
    async with http_client(cluster.url) as client:
        response = await client.post("/v1/qa/batch", json={"requests": items})
    lines = sorted(
        (json.loads(line) for line in response.text.splitlines()), key=lambda x: x["index"]
    )
    assert [line["index"] for line in lines] == [0, 1, 2]
    assert lines[1]["error"]["status"] == 422
    assert lines[0]["response"]["answers"] == lines[2]["response"]["answers"]


@pytest.mark.parametrize(
    "data",
    [
        b"\x00" * 4096,
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/qa HTTP/1.1\r\nContent-Length: x\r\n\r\n",
    ],
    ids=["zeros", "no such version", "no such length"],
)
@pytest.mark.parametrize("where", ["http", "gateway", "tokenizer", "stage 0", "stage 1"])
async def test_bytes_that_are_no_protocol(where: str, data: bytes, cluster: Cluster) -> None:
    address = {
        "http": cluster.url.removeprefix("http://"),
        "gateway": cluster.grpc_target,
        "tokenizer": cluster.tokenizer_target,
        "stage 0": cluster.stage_targets[0],
        "stage 1": cluster.stage_targets[1],
    }[where]
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(data + MARK.encode())
        connection.shutdown(socket.SHUT_WR)
        with connection.makefile("rb") as reader:
            reader.read(65536)
    async with http_client(cluster.url) as client:
        assert (await ask_http(client, GOOD))["answers"]
    assert all(process.alive for process in cluster.processes)


GRPC: dict[str, dict[str, Any]] = {
    "nothing": {},
    "empty question": {"question": "", "context": MARK},
    "blank passage": {"question": MARK, "context": " \n"},
    "NUL": {"question": f"{MARK}\0", "context": MARK},
    "huge top_k": {**GOOD.body, "top_k": 2**32 - 1},
    "huge length": {**GOOD.body, "max_answer_length": 2**31},
    "NaN threshold": {**GOOD.body, "no_answer_threshold": float("nan")},
    "unknown normalization": {
        **GOOD.body,
        "text_options": tokenizer_pb2.TextOptions(normalization=77),  # type: ignore[arg-type]
    },
    "10 MB": {"question": MARK, "context": f"{MARK} " * 950_000},
}


@pytest.mark.parametrize("name", GRPC)
async def test_bad_requests_over_grpc(name: str, cluster: Cluster) -> None:
    async with open_channel(cluster.grpc_target) as channel:
        stub = gateway_pb2_grpc.GatewayServiceStub(channel)
        with pytest.raises(aio.AioRpcError) as caught:
            await stub.Answer(gateway_pb2.AnswerRequest(**GRPC[name]), timeout=60)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        details = caught.value.details() or ""
        assert details
        assert MARK not in details
        assert (await ask_grpc(stub, GOOD))["answers"]


async def test_bytes_that_are_no_message_over_grpc(cluster: Cluster) -> None:
    async with open_channel(cluster.grpc_target) as channel:
        method: aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
            "/miaotui.v1.GatewayService/Answer"
        )
        for data in (b"\xff" * 64, b"\x0a\x05ab", f"\x0a\x02\xff\xfe{MARK}".encode("latin-1")):
            with pytest.raises(aio.AioRpcError) as caught:
                await method(data, timeout=60)
            assert MARK not in (caught.value.details() or "")
        assert (await ask_grpc(gateway_pb2_grpc.GatewayServiceStub(channel), GOOD))["answers"]


SEQUENCES: dict[str, shard_pb2.TokenSequence] = {
    "no tokens": shard_pb2.TokenSequence(),
    "half a token": shard_pb2.TokenSequence(input_ids=b"\1\0\0"),
    "an id outside of the vocabulary": shard_pb2.TokenSequence(input_ids=b"\xff\xff\xff\x7f" * 9),
    "a negative id": shard_pb2.TokenSequence(input_ids=b"\xff\xff\xff\xff" * 9),
    "too many tokens": shard_pb2.TokenSequence(input_ids=b"\1\0\0\0" * 9_999),
    "types of another length": shard_pb2.TokenSequence(
        input_ids=b"\1\0\0\0" * 9, token_type_ids=b"\0"
    ),
    "a type that there is not": shard_pb2.TokenSequence(
        input_ids=b"\1\0\0\0" * 9, token_type_ids=b"\xee" * 9
    ),
}


@pytest.mark.parametrize("name", SEQUENCES)
async def test_bad_sequences_at_stage_0(name: str, cluster: Cluster) -> None:
    async with open_channel(cluster.stage_targets[0]) as channel:
        stub = shard_pb2_grpc.ShardServiceStub(channel)
        with pytest.raises(aio.AioRpcError) as caught:
            await stub.Infer(shard_pb2.InferRequest(sequences=[SEQUENCES[name]]), timeout=60)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "sequences[0]" in (caught.value.details() or "")
    async with http_client(cluster.url) as client:
        assert (await ask_http(client, GOOD))["answers"]


async def test_only_stage_0_takes_requests(cluster: Cluster) -> None:
    async with open_channel(cluster.stage_targets[1]) as channel:
        stub = shard_pb2_grpc.ShardServiceStub(channel)
        sequence = shard_pb2.TokenSequence(input_ids=b"\1\0\0\0" * 9)
        with pytest.raises(aio.AioRpcError) as caught:
            await stub.Infer(shard_pb2.InferRequest(sequences=[sequence]), timeout=60)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION


async def test_tokenizer_refuses(cluster: Cluster) -> None:
    async with open_channel(cluster.tokenizer_target) as channel:
        stub = tokenizer_pb2_grpc.TokenizerServiceStub(channel)
        for request in (
            tokenizer_pb2.EncodeRequest(),
            tokenizer_pb2.EncodeRequest(question=MARK, text=""),
            tokenizer_pb2.EncodeRequest(question=f"{MARK} " * 600, text=MARK),
            tokenizer_pb2.EncodeRequest(question=MARK, text=MARK, stride=10_000, max_length=12),
        ):
            with pytest.raises(aio.AioRpcError) as caught:
                await stub.Encode(request, timeout=60)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert MARK not in (caught.value.details() or "")


async def test_no_log_holds_what_was_sent(cluster: Cluster) -> None:
    """The last test of this file: by now every log has seen all of the above."""
    async with http_client(cluster.url) as client:
        await ask_http(client, GOOD)
    logs = cluster.whole_logs()
    assert "listens on" in logs
    assert MARK not in logs
    assert "Traceback" not in logs
    assert all(process.alive for process in cluster.processes)


def _problem(response: httpx.Response) -> dict[str, Any]:
    """The body as RFC 9457 problem details."""
    assert response.headers["content-type"].startswith("application/problem+json")
    problem: dict[str, Any] = response.json()
    assert {"type", "title", "status", "detail"} <= set(problem)
    return problem
