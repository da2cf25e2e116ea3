"""Vectors of questions and passages, from the encoder's stages."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Literal, TypeAlias

import numpy as np
from grpc import aio

from gateway.calling import call_id
from gateway.models import EncoderPair
from miaotui.retrieval.encoder import BUNDLED_NAME, TokenIds, Vectors
from miaotui.v1 import shard_pb2 as pb
from services.rpc.channel import call
from services.rpc.tracing import UNSAMPLED

log = logging.getLogger(__name__)
State: TypeAlias = Literal["serving", "away", "none"]

# A question that has no vector by then is answered by words alone.
QUESTION_SECONDS = 2.0
_PASSAGES_SECONDS = 60.0
# The stages work in the order of arrival. Passages go call by call, of so many tokens: that much
# at most is before a question. While questions are under way, passages wait, but not for ever.
_CALL_TOKENS = 1024
_PATIENCE_SECONDS = 1.0


class StageEncoder:
    """Questions go to the stages at once, passages one call at a time and after questions."""

    name = BUNDLED_NAME

    def __init__(self, pair: EncoderPair | None) -> None:
        """`pair`: None where no encoder is set up."""
        self._pair = pair
        self._asking = 0
        self._quiet = asyncio.Event()
        self._quiet.set()

    @property
    def state(self) -> State:
        """Whether there are vectors to be had now: "none" where no encoder is set up."""
        if self._pair is None:
            return "none"
        return "away" if self._pair.served is None else "serving"

    async def serving(self) -> None:
        """Waits until there are vectors to be had."""
        if self._pair is None:
            await asyncio.Event().wait()
        else:
            await self._pair.serving.wait()

    def question(self, text: str) -> Future[Vectors | None] | None:
        """A question's vector [dimensions], to come; `None` in it where the stages fail.

        `None` at once where they do not serve. Call it in the event loop, and wait for what it
        gives on another thread.
        """
        if self.state != "serving":
            return None
        return asyncio.run_coroutine_threadsafe(self._question(text), asyncio.get_running_loop())

    async def _question(self, text: str) -> Vectors | None:
        self._asking += 1
        self._quiet.clear()
        try:
            vectors = await self._infer(self._tokens([text]), QUESTION_SECONDS, traced=True)
        finally:
            self._asking -= 1
            if not self._asking:
                self._quiet.set()
        return None if vectors is None else vectors[0]

    async def passages(self, texts: Sequence[str]) -> Vectors | None:
        """Passages' vectors [texts, dimensions]; `None` where the stages cannot make them now."""
        if self.state != "serving":
            return None
        found = []
        for few in _calls(await asyncio.to_thread(self._tokens, texts)):
            with suppress(TimeoutError):
                async with asyncio.timeout(_PATIENCE_SECONDS):
                    await self._quiet.wait()
            vectors = await self._infer(few, _PASSAGES_SECONDS)
            if vectors is None:
                return None
            found.append(vectors)
        return np.concatenate(found)

    def _tokens(self, texts: Sequence[str]) -> list[TokenIds]:
        assert self._pair is not None
        assert self._pair.tokenizer is not None, "there is one wherever the stages serve"
        return self._pair.tokenizer(texts)

    async def _infer(
        self, texts: Sequence[TokenIds], seconds: float, *, traced: bool = False
    ) -> Vectors | None:
        """One call: vectors [texts, dimensions]."""
        assert self._pair is not None
        served = self._pair.served
        if served is None:
            return None
        request = pb.InferRequest(
            request_id=call_id("encode"),
            sequences=[pb.TokenSequence(input_ids=ids.astype("<i4").tobytes()) for ids in texts],
        )
        infer = self._pair.infer(served)
        answer: Awaitable[pb.InferResponse]
        if traced:
            name = "miaotui.v1.ShardService/Infer"
            answer = call(infer, request, name=name, timeout=seconds)
        else:
            answer = infer(request, timeout=seconds, metadata=UNSAMPLED)
        try:
            response = await answer
        except aio.AioRpcError as error:
            log.warning("the encoder's stages gave no vectors: %s", error.code().name)
            return None
        rows = [np.frombuffer(row, "<f4") for row in response.embeddings]
        if len(rows) != len(texts):
            log.error("the encoder's stages gave %d vectors of %d texts", len(rows), len(texts))
            return None
        return np.stack(rows).astype(np.float32)


def _calls(texts: Sequence[TokenIds]) -> Iterator[list[TokenIds]]:
    """The texts in order, as few at a time as a call may hold, at least one."""
    few: list[TokenIds] = []
    for ids in texts:
        if few and sum(map(len, few)) + len(ids) > _CALL_TOKENS:
            yield few
            few = []
        few.append(ids)
    if few:
        yield few
