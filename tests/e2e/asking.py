"""Questions to ask, and two clients that ask them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
from google.protobuf.json_format import MessageToDict

from miaotui.v1 import gateway_pb2, gateway_pb2_grpc
from tests.checkpoints import EXAMPLES

T = TypeVar("T")
CONCURRENCY = 32


@dataclass(frozen=True)
class Question:
    """What is asked."""

    question: str
    context: str
    top_k: int = 1

    @property
    def body(self) -> dict[str, Any]:
        """As the HTTP API takes it."""
        return {"question": self.question, "context": self.context, "top_k": self.top_k}


def questions(count: int, seed: int = 0, *, long_every: int = 7) -> list[Question]:
    """Different questions over passages of one clause to many windows, in mixed scripts.

    Mostly short ones, as in life; one of `long_every` takes several windows.
    """
    chance = random.Random(seed)
    sentences = [
        piece + mark
        for _, passage in EXAMPLES
        for mark in (". ", ",")
        for piece in passage.split(mark.strip())
        if len(piece) > 2
    ]
    made = []
    for index in range(count):
        long = index % long_every == 3
        pieces = chance.randint(25, 40) if long else chance.choice((1, 1, 2, 3, 5, 8))
        context = "".join(chance.choice(sentences) for _ in range(pieces)).strip()
        question = chance.choice(EXAMPLES)[0]
        made.append(Question(question, f"{context} ({index})", chance.choice((1, 1, 1, 3, 10))))
    return made


async def gathered(
    work: Callable[[Question], Awaitable[T]], asked: Sequence[Question], concurrency: int
) -> list[T]:
    """Asks all, `concurrency` at a time; the results in the order of the questions."""
    room = asyncio.Semaphore(concurrency)

    async def one(question: Question) -> T:
        async with room:
            return await work(question)

    return list(await asyncio.gather(*(one(question) for question in asked)))


def http_client(url: str) -> httpx.AsyncClient:
    """A client of the HTTP API that opens as many connections as a test asks at once."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=CONCURRENCY)
    return httpx.AsyncClient(base_url=url, timeout=120, trust_env=False, limits=limits)


async def ask_http(client: httpx.AsyncClient, question: Question) -> dict[str, Any]:
    """The answer over HTTP; fails where there is none."""
    response = await client.post("/v1/qa", json=question.body)
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


async def ask_grpc(
    stub: gateway_pb2_grpc.GatewayServiceAsyncStub, question: Question
) -> dict[str, Any]:
    """The answer over gRPC, in the shape of the HTTP API."""
    response = await stub.Answer(gateway_pb2.AnswerRequest(**question.body), timeout=60)
    return MessageToDict(
        response, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )


def contents(asked: Iterable[Question]) -> list[str]:
    """Every text that the questions hold."""
    return [text for question in asked for text in (question.question, question.context)]
