"""Explanations through the running services: bundled model, two stages, HTTP and gRPC."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import torch
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from typer.testing import CliRunner, Result

from miaotui.cli.app import app
from miaotui.v1 import explain_pb2, explain_pb2_grpc, gateway_pb2, gateway_pb2_grpc
from services.rpc.channel import open_channel
from tests.explain import reference
from tests.processes import Cluster

MODEL = Path("miaotui/bundled/qa")
SERVICE = "miaotui.v1.ExplainService"
ENGLISH = ("When was the museum founded?", "The Palace Museum in Beijing was founded in 1925.")
CHINESE = ("故宫博物院成立于哪一年？", "故宫博物院位于北京，成立于1925年。")


@pytest.fixture(scope="module")
async def cluster() -> AsyncIterator[Cluster]:
    """The services over the bundled model."""
    async with Cluster(MODEL, stages=2) as running:
        yield running


@pytest.fixture(scope="module")
async def http(cluster: Cluster) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the HTTP API."""
    async with httpx.AsyncClient(base_url=cluster.url, timeout=120, trust_env=False) as client:
        yield client


@pytest.fixture(scope="module")
def whole() -> Any:
    """transformers' unsplit model."""
    return reference.load(MODEL)


async def ask(http: httpx.AsyncClient, question: str, context: str, **more: Any) -> dict[str, Any]:
    body = {"question": question, "context": context, "explain": True, **more}
    response = await http.post("/v1/qa", json=body, headers={"X-Request-Timeout": "60"})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


@pytest.mark.parametrize("asked", [ENGLISH, CHINESE])
async def test_an_explained_answer(
    http: httpx.AsyncClient, whole: Any, asked: tuple[str, str]
) -> None:
    question, context = asked
    body = await ask(http, question, context)
    why, best = body["explanation"], body["answers"][0]
    answer = why["answer"]
    assert (answer["text"], answer["start"]) == (best["text"], best["start"])
    assert answer["logit"] == pytest.approx(best["logit"], abs=1e-2)
    assert context[answer["start"] : answer["end"]] == answer["text"]

    # Completeness, by token and by word.
    complete = why["completeness"]
    difference = complete["logit"] - complete["baseline_logit"]
    by_token = sum(token["attribution"] for token in why["tokens"])
    assert by_token == pytest.approx(complete["sum"], abs=1e-4)
    assert sum(word["attribution"] for word in why["words"]) == pytest.approx(by_token, abs=1e-4)
    assert complete["gap"] == pytest.approx(complete["sum"] - difference, abs=1e-4)
    assert abs(complete["gap"]) <= max(0.05, 0.01 * abs(difference))
    assert difference > 5, "the words must matter to a model that was trained"

    # Words and tokens are where they say.
    texts = {"question": question, "context": context}
    for piece in (*why["words"], *why["tokens"]):
        if piece["part"] == "special":
            assert piece["text"] in ("[CLS]", "[SEP]")
            assert piece["attribution"] == 0
        else:
            assert texts[piece["part"]][piece["start"] : piece["end"]] == piece["text"]
    first, last = why["attention"]["from"]
    assert why["tokens"][first]["start"] == answer["start"]
    assert why["tokens"][last]["end"] == answer["end"]

    # Attention and rollout, and the baseline, against the whole model.
    inputs = _inputs(question, context)
    weights = reference.attention(whole, *inputs)
    rows = torch.tensor(why["attention"]["rows"])
    assert rows.shape == (6, 12, len(why["tokens"]))
    positions = sorted({first, last})
    torch.testing.assert_close(rows, weights[:, :, positions].mean(2), atol=1e-4, rtol=0)
    rollout = torch.tensor([token["rollout"] for token in why["tokens"]])
    wanted = reference.rollout(weights)[positions].mean(0)
    torch.testing.assert_close(rollout, wanted, atol=1e-4, rtol=0)
    replaced = torch.tensor([token["part"] != "special" for token in why["tokens"]])
    _, logit, baseline = reference.attribution(
        *(whole, *inputs, replaced, (first, last)), points=[0.5], weights=[1.0]
    )
    assert complete["logit"] == pytest.approx(logit, abs=1e-3)
    assert complete["baseline_logit"] == pytest.approx(baseline, abs=1e-3)

    # What else there is.
    margins = [other["margin"] for other in why["runners_up"]]
    assert margins == sorted(margins)
    assert why["margin"] == margins[0] > 0
    hops = [step["hop"] for step in why["path"]]
    assert hops[:2] == ["cache", "tokenizer"]
    assert {"stage 0", "stage 1", "explain: stage 0", "explain: stage 1"} <= set(hops)
    assert all(step["did"] for step in why["path"])
    assert why["path"][0]["cache"] == "miss"
    assert any("does not prove" in note for note in why["notes"])
    assert body["warnings"] == []


def _inputs(question: str, context: str) -> tuple[torch.Tensor, torch.Tensor]:
    from transformers import AutoTokenizer

    encoded = AutoTokenizer.from_pretrained(MODEL)(question, context)
    return torch.tensor(encoded["input_ids"]), torch.tensor(encoded["token_type_ids"])


async def test_a_cached_answer_is_explained_as_such(http: httpx.AsyncClient) -> None:
    question, context = "Who?", "It was Ann."
    first = (await http.post("/v1/qa", json={"question": question, "context": context})).json()
    body = await ask(http, question, context)
    assert (first["cache"], body["cache"]) == ("miss", "hit")
    path = {step["hop"]: step["cache"] for step in body["explanation"]["path"]}
    assert path["cache"] == "hit"
    assert "stage 0" not in path, "nothing was computed for the answer"
    assert path["explain: tokenizer"] == "hit"
    assert body["explanation"]["answer"]["text"] == first["answers"][0]["text"]


async def test_over_grpc_and_several_windows(cluster: Cluster, http: httpx.AsyncClient) -> None:
    context = "It was a quiet year, and little happened. " * 40 + ENGLISH[1]
    async with open_channel(cluster.grpc_target) as channel:
        stub = gateway_pb2_grpc.GatewayServiceStub(channel)
        request = gateway_pb2.AnswerRequest(
            question=ENGLISH[0], context=context, explain=True, max_answer_length=3
        )
        reply = await stub.Answer(request, timeout=60)
    why = reply.explanation
    assert why.answer.text == reply.answers[0].text == "1925"
    count = len(why.tokens)
    attention = np.frombuffer(why.attention, "<f4").reshape(why.layers, why.heads, count)
    np.testing.assert_allclose(attention.sum(-1), 1, atol=1e-4)
    assert [why.tokens[i].text for i in why.attention_from] == ["1925", "1925"]
    assert not why.tokens[0].HasField("start")
    assert why.tokens[0].text == "[CLS]"
    assert sum(token.attribution for token in why.tokens) == pytest.approx(why.sum, abs=1e-3)
    read = next(step for step in why.path if step.hop == "explain: read")
    assert "window 2 of 2 gives the answer" in read.did
    assert {warning.kind for warning in reply.warnings} == {"repetition"}


async def test_no_answer_is_explained_too(http: httpx.AsyncClient) -> None:
    body = await ask(http, ENGLISH[0], "Bananas are yellow.", no_answer_threshold=-100)
    assert body["answerable"] is False
    assert body["answers"] == []
    assert 'The verdict is "no answer"' in body["explanation"]["notes"][0]
    assert body["explanation"]["answer"]["text"] in "Bananas are yellow."


async def test_documents_are_explained(http: httpx.AsyncClient) -> None:
    for source, text in (("a", ENGLISH[1]), ("b", "The tower in Paris was founded on rock.")):
        added = await http.post("/v1/documents", json={"text": text, "source": source})
        assert added.status_code == 200, added.text
    body = {"question": ENGLISH[0], "explain": True}
    response = await http.post("/v1/qa", json=body, headers={"X-Request-Timeout": "60"})
    assert response.status_code == 200, response.text
    answer = response.json()
    why = answer["explanation"]
    passage = answer["passages"][why["passage"]]
    assert passage["source"] == "a"
    assert why["retrieval"] == passage["retrieval"]
    assert why["retrieval"]["lexical_rank"] == 1
    assert passage["text"][why["answer"]["start"] : why["answer"]["end"]] == why["answer"]["text"]
    (step,) = [step for step in why["path"] if step["hop"] == "retrieval"]
    assert step["did"].endswith("by their words only: there is no encoder")


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({"question": "Who?", "context": "", "explain": True}, "/context"),
        ({"question": "Who?", "context": "I.", "explain": 1}, "/explain"),
        ({"question": "Who?", "context": "I.", "explain": True, "mode": "generative"}, "/explain"),
        ({"question": "Who?", "explain": True, "mode": "generative"}, "/explain"),
        ({"question": "x" * 4001, "context": "I.", "explain": True}, "/question"),
    ],
)
async def test_what_cannot_be_explained(
    http: httpx.AsyncClient, body: dict[str, Any], pointer: str
) -> None:
    response = await http.post("/v1/qa", json=body)
    assert response.status_code == 422
    assert [error["pointer"] for error in response.json()["errors"]] == [pointer]


async def test_not_in_a_batch(http: httpx.AsyncClient) -> None:
    item = {"question": ENGLISH[0], "context": ENGLISH[1]}
    response = await http.post("/v1/qa/batch", json={"requests": [item, {**item, "explain": True}]})
    lines = [line for line in response.text.splitlines() if '"error"' in line]
    assert len(lines) == 1
    assert "/requests/1/explain" in lines[0]


async def test_a_question_without_room_for_a_passage(http: httpx.AsyncClient) -> None:
    body = {"question": "word " * 500, "context": ENGLISH[1], "explain": True}
    response = await http.post("/v1/qa", json=body)
    assert response.status_code == 422
    assert "no room for the passage" in response.text


async def test_time_runs_out_or_the_caller_leaves(
    cluster: Cluster, http: httpx.AsyncClient
) -> None:
    """The stages are free again at once for the next one."""
    body = {"question": ENGLISH[0], "context": ENGLISH[1] + " So it was.", "explain": True}
    late = await http.post("/v1/qa", json=body, headers={"X-Request-Timeout": "0.05"})
    assert late.status_code == 504
    with pytest.raises(httpx.ReadTimeout):
        await http.post("/v1/qa", json=body, timeout=0.2)
    await ask(http, *ENGLISH)


async def test_too_many_at_once_are_refused(http: httpx.AsyncClient) -> None:
    async def one(index: int) -> int:
        body = {"question": ENGLISH[0], "context": f"{ENGLISH[1]} {index}", "explain": True}
        response = await http.post("/v1/qa", json=body, headers={"X-Request-Timeout": "60"})
        if response.status_code == 503:
            assert "Retry-After" in response.headers
        return response.status_code

    codes = await asyncio.gather(*(one(index) for index in range(8)))
    # One is worked on and four wait; on a busy machine one may be done before the last comes.
    assert codes.count(200) + codes.count(503) == 8
    assert 5 <= codes.count(200) < 8


async def test_ask_shows_why(cluster: Cluster) -> None:
    asked = ["ask", ENGLISH[0], "--context", ENGLISH[1] + "\u200b", "--explain"]
    runner = CliRunner()
    done = await asyncio.to_thread(
        lambda: runner.invoke(app, [*asked, "--url", cluster.url], env={"COLUMNS": "120"})
    )
    assert done.exit_code == 0, done.output
    for words in ("strongest: ", "they add up to ", "or: ", "does not prove", "(invisible_charac"):
        assert words in " ".join(done.stdout.split()), done.stdout
    refused = runner.invoke(app, [*asked, "--grpc", cluster.grpc_target])
    assert refused.exit_code == 2


async def test_probe_asks_a_running_gateway(cluster: Cluster, tmp_path: Path) -> None:
    paragraphs = [
        {"context": context, "qas": [{"question": question, "answers": [{"text": text}]}]}
        for (question, context), text in ((ENGLISH, "1925"), (CHINESE, "1925年"))
    ]
    file = tmp_path / "questions.json"
    file.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}), "utf-8")

    def probe(*arguments: str) -> Result:
        runner, command = CliRunner(), ["probe", *arguments, "--url", cluster.url]
        return runner.invoke(app, command, env={"COLUMNS": "120"})

    done = await asyncio.to_thread(probe, str(file), "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    rows = {row["name"]: row for row in report["perturbations"]}
    assert report["items"] == 2
    assert rows["typos"]["items"] == 1, "there are no typos of that kind in Chinese"
    assert rows["similar characters"]["items"] <= 1
    assert rows["invisible characters"]["warned"] == 1
    assert rows["invisible characters"]["same"] == 1, "they are taken out before the model reads"
    assert rows["distracting sentences"]["right_before"] > 0.4
    table = await asyncio.to_thread(probe, str(file))
    assert "distracting sentences" in table.stdout
    assert "100%" in table.stdout


async def test_the_service_itself(cluster: Cluster) -> None:
    """Health, reflection, and requests that stages refuse."""
    head, last = cluster.stage_targets
    fingerprint = (await cluster.describe(0)).stage.model_fingerprint
    async with open_channel(head) as first, open_channel(last) as second:
        for channel in (first, second):
            health: Any = health_pb2_grpc.HealthStub(channel)
            check: Any = health.Check(health_pb2.HealthCheckRequest(service=SERVICE))
            assert (await check).status == health_pb2.HealthCheckResponse.SERVING
        reflection: Any = reflection_pb2_grpc.ServerReflectionStub(first)  # type: ignore[arg-type]
        listing = reflection.ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        )
        names = [
            one.name async for reply in listing for one in reply.list_services_response.service
        ]
        assert SERVICE in names

        window: dict[str, Any] = {
            "input_ids": np.arange(100, 110, dtype="<i4").tobytes(),
            "replaced": b"\1" * 10,
            "model_fingerprint": fingerprint,
        }
        at_head, at_last = (
            explain_pb2_grpc.ExplainServiceStub(channel) for channel in (first, second)
        )
        code = grpc.StatusCode
        for stub, change, status, words in (
            (at_head, {"model_fingerprint": "other"}, code.FAILED_PRECONDITION, "another model"),
            (at_last, {}, code.FAILED_PRECONDITION, "this is stage 1"),
            (at_head, {"input_ids": b"123"}, code.INVALID_ARGUMENT, "3 bytes"),
            (at_head, {"replaced": b"\1"}, code.INVALID_ARGUMENT, "replaced: 1 bytes"),
            (at_head, {"first": 9, "last": 10}, code.INVALID_ARGUMENT, "window of 10"),
            (at_head, {"max_points": 5}, code.INVALID_ARGUMENT, "from 9 to"),
            (at_head, {"token_type_ids": b"\7" * 10}, code.INVALID_ARGUMENT, "token_type_ids"),
        ):
            request = explain_pb2.ExplainRequest(**{**window, **change})
            with pytest.raises(aio.AioRpcError, match=words) as refused:
                await stub.Explain(request, timeout=60)
            assert refused.value.code() is status
        activations = explain_pb2.Activations(model_fingerprint=fingerprint, stage=1, points=1)
        with pytest.raises(aio.AioRpcError) as malformed:
            await at_last.Attend(explain_pb2.AttendRequest(activations=activations), timeout=60)
        assert malformed.value.code() is code.INVALID_ARGUMENT
        activations.stage = 0
        with pytest.raises(aio.AioRpcError, match="stage 0 takes windows") as wrong:
            await at_head.Attend(explain_pb2.AttendRequest(activations=activations), timeout=60)
        assert wrong.value.code() is code.FAILED_PRECONDITION
