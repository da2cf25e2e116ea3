"""The services behind a model: who they are, whether they serve, and what they serve together.

A model is served by tokenizers and stages 0, of each one or several.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from typing import Any, Generic, TypeVar

from gateway.calling import MARGIN_SECONDS
from gateway.errors import GatewayError
from gateway.replicas import LOOK_SECONDS, Replica, Replicas
from gateway.served import Role, Served, agreed
from gateway.stages import StageReplica, stage_replicas
from miaotui.v1 import shard_pb2 as shard_pb
from miaotui.v1 import shard_pb2_grpc, tokenizer_pb2_grpc
from miaotui.v1 import tokenizer_pb2 as tokenizer_pb
from services.rpc.breaker import RetryBudget
from services.rpc.tracing import UNSAMPLED

log = logging.getLogger(__name__)
_ROLES: dict[int, Role] = {
    shard_pb.MODEL_KIND_EXTRACTIVE: "extractive",
    shard_pb.MODEL_KIND_GENERATIVE: "generative",
    shard_pb.MODEL_KIND_EMBEDDING: "embedding",
}
UNREADY_POLL_SECONDS = 0.25
# So many looks in a row that are not answered in time are a hang, where others answer.
HUNG_LOOKS = 2


class Tokenizer(Replica[tokenizer_pb.TokenizerServiceDescribeResponse]):
    """A replica of a tokenizer service."""

    def __init__(self, address: str, lost: Callable[[], None]) -> None:
        super().__init__("tokenizer", address, lost)
        self.stub = tokenizer_pb2_grpc.TokenizerServiceStub(self.channel)

    async def describe(self) -> tokenizer_pb.TokenizerServiceDescribeResponse:
        """Asks it who it is. Raises `AioRpcError`."""
        response: tokenizer_pb.TokenizerServiceDescribeResponse
        response = await self.stub.Describe(
            tokenizer_pb.TokenizerServiceDescribeRequest(),
            timeout=LOOK_SECONDS,
            metadata=UNSAMPLED,
        )
        return response


class Head(Replica[shard_pb.ShardServiceDescribeResponse]):
    """A replica of a stage 0."""

    def __init__(self, address: str, lost: Callable[[], None]) -> None:
        super().__init__("stage 0", address, lost)
        self.stub = shard_pb2_grpc.ShardServiceStub(self.channel)

    async def describe(self) -> shard_pb.ShardServiceDescribeResponse:
        """Asks it who it is. Raises `AioRpcError`."""
        response: shard_pb.ShardServiceDescribeResponse
        response = await self.stub.Describe(
            shard_pb.ShardServiceDescribeRequest(), timeout=LOOK_SECONDS, metadata=UNSAMPLED
        )
        return response


TokenizerT = TypeVar("TokenizerT", bound=Tokenizer)
HeadT = TypeVar("HeadT", bound=Head)


class Pair(Generic[TokenizerT, HeadT]):
    """Watches the tokenizers and the stages 0 of a model, and says what they serve together.

    During an upgrade there may be replicas of two models side by side. A request keeps to one
    of them (`Served`) from its tokens to its answer.
    """

    def __init__(
        self,
        kind: shard_pb.ModelKind.ValueType,
        tokenizers: Replicas[TokenizerT],
        heads: Replicas[HeadT],
        poll_seconds: float,
        name: str = "",
        role: Role | None = None,
    ) -> None:
        """`kind`: what the model must do. `name`: its name; empty: what the services call it.

        `role`: what for, where `kind` does not say it.
        """
        self._kind = kind
        self._name = name
        self.role: Role = role or _ROLES[kind]
        self.since = int(time.time())
        """When this began, in Unix time."""
        self.tokenizers = tokenizers
        self.heads = heads
        self.budget = RetryBudget()
        self._poll_seconds = poll_seconds
        self._offers: dict[Served, tuple[list[TokenizerT], list[HeadT]]] = {}
        self._served: Served | None = None
        self.last: Served | None = None
        self._reason = "The gateway has not looked at its services yet."
        self._misfit = False
        # Set, and replaced, whenever it may have become another model that is served.
        self._judged = asyncio.Event()
        self._lock = asyncio.Lock()
        self._looks = 0
        self._wake = asyncio.Event()
        self._polling: asyncio.Task[None] | None = None

    @property
    def served(self) -> Served | None:
        """The model served now, by most replicas; `None` while not ready."""
        return self._served

    @property
    def reason(self) -> str:
        """Why there is no answer to be had; empty when ready."""
        return "" if self._served else self._reason

    @property
    def pipeline(self) -> shard_pb.ShardServiceDescribeResponse | None:
        """What one of the stages 0 told last: one that serves, if any does."""
        heads = self._offers[self._served][1] if self._served else self.heads.all
        return next((head.described for head in heads if head.described is not None), None)

    @property
    def stages(self) -> list[StageReplica]:
        """All replicas of all stages that are known, by stage and address."""
        return stage_replicas(self.heads.all)

    def serves(self, served: Served) -> bool:
        """Whether this model is served now."""
        return served in self._offers

    def start(self) -> None:
        """Begins to watch."""
        self._polling = asyncio.create_task(self._poll())

    async def verified(self, patience: float = 0.0) -> Served:
        """A model served now, after a look if need be; of several, by their replicas' shares.

        `patience`: seconds to wait for its return where there is none. Raises `GatewayError`
        (unavailable) with the reason where it does not come back, and at once where none was
        served since the gateway began, or where tokenizers and shards do not fit each other:
        then nothing is on its way back.
        """
        if (best := self._served) is None:
            best = await self._returned(patience)
        if len(self._offers) == 1:
            return best
        weights = [len(heads) for _, heads in self._offers.values()]
        return random.choices(list(self._offers), weights)[0]

    async def served_within(self, timeout: float, slot: AbstractContextManager[None]) -> Served:
        """The model served now, or again within `timeout` seconds; who waits holds `slot`.

        Raises `GatewayError`.
        """
        if self._served is not None:
            return await self.verified()
        with slot:
            return await self.verified(timeout - MARGIN_SECONDS)

    async def check_still(self, served: Served, patience: float = 0.0) -> None:
        """For after a failed call: raises `GatewayError` where not this model is served by now.

        Looks first, because what a service told of itself holds until its connection breaks, and
        a stage may lack the next one, or be about to stop. `patience` as for `verified`.
        """
        await self.look()
        if self._served is None:
            await self._returned(patience)
        if not self.serves(served):
            raise GatewayError("unavailable", "The model has just been replaced.")

    async def _returned(self, patience: float) -> Served:
        loop = asyncio.get_running_loop()
        end = loop.time() + patience
        await self.look()
        # The look just taken is the polling's first: from now on it looks more often.
        self._wake.set()
        while (best := self._served) is None:
            left = end - loop.time()
            if left <= 0 or self.last is None or self._misfit:
                raise GatewayError("unavailable", self._reason)
            judged = self._judged
            with suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await judged.wait()
        return best

    def tokenizers_of(self, served: Served) -> Sequence[TokenizerT]:
        """Those that may tokenise for this model; where none may now, all that there are."""
        offer = self._offers.get(served)
        return offer[0] if offer else self.tokenizers.all

    def heads_of(self, served: Served) -> Sequence[HeadT]:
        """Those that serve this model; where none does now, those that did."""
        offer = self._offers.get(served)
        if offer:
            return offer[1]
        known = self.heads.all
        return [h for h in known if _fingerprint(h) == served.fingerprint] or known

    async def look(self) -> None:
        """Asks all services who they are and whether they are healthy."""
        before = self._looks
        async with self._lock:
            if self._looks != before:
                return  # another has just looked
            await asyncio.gather(self.tokenizers.refresh(), self.heads.refresh())
            every: list[Replica[Any]] = [*self.tokenizers.all, *self.heads.all]
            await asyncio.gather(*(one.look() for one in every))
            self._looks += 1
            for replicas in (self.tokenizers.all, self.heads.all):
                _give_up_hung(replicas)
            self._judge()

    def lost(self) -> None:
        """A connection broke."""
        self._judge()
        self._wake.set()

    def told_tokenizers(
        self,
    ) -> Sequence[tuple[TokenizerT | None, tokenizer_pb.TokenizerServiceDescribeResponse]]:
        """What tokenises for this model, and what it told of itself; None: not a service."""
        every = self.tokenizers.all
        return [(one, told) for one in every if (told := one.told) is not None]

    def _judge(self) -> None:
        """Finds which tokenizers and stages 0 fit together."""
        offers: dict[Served, tuple[list[TokenizerT], list[HeadT]]] = {}
        reason, misfit = "", False
        for head in self.heads.all:
            for tokenizer, told in self.told_tokenizers():
                if head.told is None:
                    continue
                served, why = agreed(self._kind, self.role, told, head.told)
                if served is None:
                    reason = reason or why
                    misfit |= head.told.status == shard_pb.STAGE_STATUS_SERVING
                    continue
                served = replace(served, name=self._name or served.name)
                tokenizers, heads = offers.setdefault(served, ([], []))
                if tokenizer is not None and tokenizer not in tokenizers:
                    tokenizers.append(tokenizer)
                if head not in heads:
                    heads.append(head)
        every: list[Replica[Any]] = [*self.tokenizers.all, *self.heads.all]
        reason = reason or next((one.reason for one in every if one.reason), "")
        best = max(offers, key=lambda one: (len(offers[one][1]), one == self._served), default=None)
        if best != self._served or (best is None and reason != self._reason):
            news = f"serving {best.name}" if best else f"not ready: {reason}"
            log.info("%s model: %s", self.role, news)
        self._offers, self._served = offers, best
        self._reason = reason or self._reason
        # Whoever is missing may fit when it comes back.
        self._misfit = misfit and all(one.told is not None for one in every)
        self.last = best or self.last
        self._judged.set()
        self._judged = asyncio.Event()

    async def _poll(self) -> None:
        while True:
            await self.look()
            every: list[Replica[Any]] = [*self.tokenizers.all, *self.heads.all]
            late = any(one.late for one in every)
            pause = self._poll_seconds if self._served and not late else UNREADY_POLL_SECONDS
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._wake.wait()
            self._wake.clear()

    async def close(self) -> None:
        """Stops watching and closes the links."""
        if self._polling is not None:
            self._polling.cancel()
            await asyncio.gather(self._polling, return_exceptions=True)
        await asyncio.gather(self.tokenizers.close(), self.heads.close())


def _give_up_hung(replicas: Sequence[Replica[Any]]) -> None:
    """Takes their work from replicas that do not answer, where others do.

    Alone, a late one may just be busy, and to wait for it is the best that can be done.
    """
    if any(one.told is not None and not one.late for one in replicas):
        for one in replicas:
            if one.late >= HUNG_LOOKS and (one.told is not None or one.outstanding):
                log.warning("%s at %s does not answer; others do its work", one.name, one.address)
                one.drop()


def _fingerprint(head: Head) -> str:
    return "" if head.described is None else head.described.stage.model_fingerprint
