"""One client that asks in every way and says of each answer whether it is right."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import httpx
from google.protobuf.json_format import MessageToDict
from grpc import aio

from miaotui.retrieval.collection import MOST_CHINESE
from miaotui.retrieval.terms import chinese_share
from miaotui.v1 import gateway_pb2, gateway_pb2_grpc
from tests.soak.cases import (
    COLLECTION,
    MEANING,
    WORDS,
    DocumentCase,
    QuestionCase,
    TextCase,
    documents,
)
from tests.soak.deployment import RPC, Deployment
from tests.soak.judge import BY_WORDS, CONNECTION, OK, REFUSED, WRONG, Outcome

# After so much more than a request's own time, nobody waits for it any longer.
HANG_SECONDS = 30.0
_OPENAI_CODES = {
    "unavailable": "503 unavailable",
    "rate_limit_exceeded": "429 overloaded",
    "timeout": "504 timeout",
    "service_failed": "502 service-failed",
    "internal": "500 internal",
}


class Client:
    """Its methods never raise for what the services do: that is what an `Outcome` tells."""

    def __init__(self, deployment: Deployment) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        self._http = httpx.AsyncClient(
            base_url=deployment.url, trust_env=False, timeout=None, limits=limits
        )
        self._channel = deployment.channel("gateway", RPC)
        self._stub: Any = gateway_pb2_grpc.GatewayServiceStub(self._channel)
        self.in_flight = 0

    async def close(self) -> None:
        """Closes all connections."""
        await self._http.aclose()
        await self._channel.close()

    # -- ways of asking -------------------------------------------------------------------

    async def question(self, case: QuestionCase, timeout: float, *, cached: bool) -> Outcome:
        """POST /v1/qa."""

        async def work() -> tuple[str, str]:
            body = {**case.asked.body, "no_cache": not cached}
            response = await self._post("/v1/qa", body, timeout)
            if response.status_code != 200:
                return _problem(response)
            return _checked(case, response.json())

        return await self._timed("question" if not cached else "cached question", timeout, work)

    async def grpc_question(self, case: QuestionCase, timeout: float) -> Outcome:
        """GatewayService.Answer."""

        async def work() -> tuple[str, str]:
            request = gateway_pb2.AnswerRequest(**case.asked.body, no_cache=True)
            try:
                reply = await self._stub.Answer(request, timeout=timeout)
            except aio.AioRpcError as error:
                return error.code().name, error.details() or ""
            body = MessageToDict(
                reply, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
            )
            return _checked(case, body)

        return await self._timed("gRPC question", timeout, work)

    async def batch(self, cases: Sequence[QuestionCase], timeout: float) -> list[Outcome]:
        """POST /v1/qa/batch; one outcome a question."""
        found: dict[int, tuple[str, str]] = {}

        async def work() -> tuple[str, str]:
            items = [{**case.asked.body, "no_cache": index % 2 == 0}
                     for index, case in enumerate(cases)]  # fmt: skip
            headers = {"X-Request-Timeout": str(timeout)}
            asking = self._http.stream(
                "POST", "/v1/qa/batch", json={"requests": items}, headers=headers
            )
            async with asking as response:
                if response.status_code != 200:
                    await response.aread()
                    return _problem(response)
                async for line in response.aiter_lines():
                    item = json.loads(line)
                    if item.get("response") is not None:
                        found[item["index"]] = _checked(cases[item["index"]], item["response"])
                    else:
                        problem = item["error"]
                        slug = problem["type"].rpartition("/")[2]
                        found[item["index"]] = f"{problem['status']} {slug}", problem["detail"]
            return "cut off", "the batch ended without all answers"

        whole = await self._timed("batch item", timeout, work)
        return [
            Outcome(whole.operation, whole.began, whole.ended, timeout,
                    *found.get(index, (whole.status, whole.detail)))
            for index in range(len(cases))
        ]  # fmt: skip

    async def text(self, case: TextCase, timeout: float, *, cached: bool) -> Outcome:
        """POST /v1/completions, streamed; what came before a failure must be right, too."""
        text = ""

        async def work() -> tuple[str, str]:
            nonlocal text
            body = {**case.body, "no_cache": not cached}
            headers = {"X-Request-Timeout": str(timeout)}
            asking = self._http.stream("POST", "/v1/completions", json=body, headers=headers)
            async with asking as response:
                if response.status_code != 200:
                    await response.aread()
                    return _openai_problem(response)
                async for line in response.aiter_lines():
                    if not line.startswith("data: "):
                        continue
                    if line == "data: [DONE]":
                        return OK, ""
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        code = str(event["error"]["code"])
                        return _OPENAI_CODES.get(code, code), event["error"]["message"]
                    text += event["choices"][0]["text"]
            return "cut off", "the stream ended without an end"

        outcome = await self._timed(case.operation, timeout, work)
        if case.expected is None:
            if outcome.status == OK:
                case.expected = text
            return outcome
        expected = case.expected
        right = text == expected if outcome.status == OK else expected.startswith(text.rstrip("�"))
        if right:
            return outcome
        place = next(
            (i for i, (a, b) in enumerate(zip(text, expected, strict=False)) if a != b),
            min(len(text), len(expected)),
        )
        detail = f"{len(text)} characters for {len(expected)}, another from {place} on"
        return Outcome(case.operation, outcome.began, outcome.ended, timeout, WRONG, detail)

    async def documents(
        self, case: DocumentCase, timeout: float, *, learn: bool = False, meaning: bool = False
    ) -> Outcome:
        """POST /v1/qa without a passage. With `learn`, what comes is right from now on.

        With `meaning`, documents found by words for want of the encoder are no success.
        """
        operation = "documents question"

        async def work() -> tuple[str, str]:
            nonlocal operation
            response = await self._post("/v1/qa", {**case.body, "no_cache": True}, timeout)
            if response.status_code != 200:
                return _problem(response)
            body = response.json()
            seen, way = case.seen(body), case.way(body)
            # The encoder knows no Chinese, so that such questions do without it at all times.
            alone = way == WORDS and body["dense"] != "language"
            if alone:
                operation = "documents question, by words"
            if learn:
                case.expected.setdefault(way, seen)
            empty = not seen and (way == MEANING or not case.meant)
            if empty or seen != case.expected.get(way):
                return WRONG, f"{len(seen)} answers found by {way}, and not those of before"
            return (BY_WORDS, body["dense"]) if meaning and alone else (OK, "")

        outcome = await self._timed("documents question", timeout, work)
        return replace(outcome, operation=operation)

    # -- the documents --------------------------------------------------------------------

    async def add_documents(self) -> None:
        """Adds all."""
        for source, text in documents():
            body = {"text": text, "source": source, "collection": COLLECTION}
            (await self._post("/v1/documents", body, 30.0)).raise_for_status()

    async def encoded(self, timeout: float) -> bool:
        """Waits until the encoder serves and every passage that it can read has a vector; whether
        it came to that within `timeout` seconds."""
        # Each document is one passage.
        readable = sum(chinese_share(text) <= MOST_CHINESE for _, text in documents())
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            body = (await self._http.get("/v1/collections")).json()
            vectors = sum(one["vectors"] for one in body["collections"])
            if body["encoder"] == "serving" and vectors == readable:
                return True
            await asyncio.sleep(0.2)
        return False

    # -- how it went ----------------------------------------------------------------------

    async def _post(self, path: str, body: dict[str, Any], timeout: float) -> httpx.Response:
        headers = {"X-Request-Timeout": str(timeout)}
        return await self._http.post(path, json=body, headers=headers)

    async def _timed(self, operation: str, timeout: float, work: Any) -> Outcome:
        began = time.monotonic()
        self.in_flight += 1
        try:
            async with asyncio.timeout(timeout + HANG_SECONDS):
                status, detail = await work()
        except TimeoutError:
            status, detail = "no answer at all", ""
        except httpx.ConnectError:
            status, detail = REFUSED, ""
        except httpx.TransportError as error:
            status, detail = CONNECTION, type(error).__name__
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise  # the run ends
            status, detail = "cancelled", "by gRPC"
        except Exception as error:  # noqa: BLE001 - what cannot be read is a finding, not an end
            status, detail = "unreadable", repr(error)[:200]
        finally:
            self.in_flight -= 1
        return Outcome(operation, began, time.monotonic(), timeout, status, detail)


def _checked(case: QuestionCase, body: dict[str, Any]) -> tuple[str, str]:
    try:
        case.check(body)
    except AssertionError as error:
        return WRONG, str(error).partition("\n")[0]
    return OK, ""


def _problem(response: httpx.Response) -> tuple[str, str]:
    slug, detail = "", ""
    with suppress(ValueError, KeyError):
        problem = response.json()
        slug, detail = problem["type"].rpartition("/")[2], problem["detail"]
    return _named(response, f"{response.status_code} {slug}"), detail


def _openai_problem(response: httpx.Response) -> tuple[str, str]:
    code, detail = "", ""
    with suppress(ValueError, KeyError):
        problem = response.json()["error"]
        code, detail = str(problem["code"]), problem["message"]
    return _named(response, _OPENAI_CODES.get(code, f"{response.status_code} {code}")), detail


def _named(response: httpx.Response, status: str) -> str:
    if response.status_code in (429, 503) and "retry-after" not in response.headers:
        return f"{status} without Retry-After"
    return status
