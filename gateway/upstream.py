"""The services behind a model: links to them, who they are, and whether they serve.

A model is served by a pair of addresses: its tokenizer's and its stage 0's. Each pair is
watched by itself.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar

import grpc
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from gateway.errors import GatewayError
from miaotui.v1 import shard_pb2 as shard_pb
from miaotui.v1 import shard_pb2_grpc, tokenizer_pb2_grpc
from miaotui.v1 import tokenizer_pb2 as tokenizer_pb
from services.rpc.channel import open_channel

log = logging.getLogger(__name__)
T = TypeVar("T")
Role: TypeAlias = Literal["extractive", "generative"]

LOOK_SECONDS = 1.5
# A busy machine answers late, and that alone is no reason to send requests away.
LATE_LOOKS = 3
UNREADY_POLL_SECONDS = 0.25
# Looks at the services would drown the traces of requests: flag 00 is "not sampled".
_UNSAMPLED = (("traceparent", f"00-{1:032x}-{1:016x}-00"),)


@dataclass(frozen=True, slots=True)
class Writing:
    """What is to be known of a decoder beside what is known of every model."""

    vocab_size: int
    has_chat_template: bool
    stop_token_ids: tuple[int, ...]
    defaults: tuple[tuple[str, float], ...]
    """Sampling parameters that the model's makers advise, by name."""


@dataclass(frozen=True, slots=True)
class Served:
    """The model that tokenizer and shards agree on.

    `max_length` in tokens: the longest window; a decoder's prompt and text together.
    `no_answer_thresholds`: by language, where the model was calibrated.
    """

    name: str
    fingerprint: str
    tokenizer_fingerprint: str
    model_type: str
    stages: int
    layers: int
    max_length: int
    writing: Writing | None = None
    no_answer_thresholds: tuple[tuple[str, float], ...] = ()

    @property
    def identity(self) -> str:
        """What cached results depend on."""
        return f"{self.fingerprint} {self.tokenizer_fingerprint}"


class Pair:
    """Watches a tokenizer and a stage 0 and says which model they serve together.

    What was verified holds until a connection breaks: only then can another process,
    perhaps with another model, stand behind an address.
    """

    def __init__(
        self, kind: shard_pb.ModelKind.ValueType, tokenizer: str, shard: str, poll_seconds: float
    ) -> None:
        """`kind`: what the model must do; `tokenizer`, `shard`: host:port."""
        self._kind = kind
        self.role: Role = "extractive" if kind == shard_pb.MODEL_KIND_EXTRACTIVE else "generative"
        self.since = int(time.time())
        """When this began, in Unix time."""
        self._poll_seconds = poll_seconds
        self._channels = {"tokenizer": open_channel(tokenizer), "stage 0": open_channel(shard)}
        self.tokenizer = tokenizer_pb2_grpc.TokenizerServiceStub(self._channels["tokenizer"])
        self.shard = shard_pb2_grpc.ShardServiceStub(self._channels["stage 0"])
        self._health = {
            name: health_pb2_grpc.HealthStub(channel) for name, channel in self._channels.items()
        }
        self._served: Served | None = None
        self.last: Served | None = None
        self._reason = "The gateway has not looked at its services yet."
        self._lock = asyncio.Lock()
        self._looks = 0
        self._late = 0
        self._stale = asyncio.Event()
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self.pipeline: shard_pb.ShardServiceDescribeResponse | None = None

    @property
    def served(self) -> Served | None:
        """The model served now; `None` while not ready."""
        return self._served

    @property
    def reason(self) -> str:
        """Why there is no answer to be had; empty when ready."""
        return "" if self._served else self._reason

    def start(self) -> None:
        """Begins to watch."""
        watches = [self._watch(name, channel) for name, channel in self._channels.items()]
        self._tasks = [asyncio.create_task(work) for work in (self._poll(), *watches)]

    async def verified(self) -> Served:
        """The model served, after a look if need be.

        Raises `GatewayError` (unavailable) with the reason where there is none.
        """
        if self._served is None:
            await self.look()
        if self._served is None:
            raise GatewayError("unavailable", self._reason)
        return self._served

    async def check_still(self, served: Served) -> None:
        """Raises `GatewayError` where another model is served by now, or none."""
        if await self.verified() != served:
            raise GatewayError("unavailable", "The model has just been replaced.")

    async def look(self) -> None:
        """Asks both services who they are and whether they are healthy."""
        before = self._looks
        async with self._lock:
            if self._looks != before:
                return  # another has just looked
            self._stale.clear()
            try:
                served, reason = await self._ask()
                self._late = 0
            except _LateError as error:
                self._late += 1
                kept = self._served if self._late < LATE_LOOKS else None
                served, reason = kept, str(error)
            self._looks += 1
            if self._stale.is_set():
                served, reason = None, "A service behind the gateway has just restarted."
            if (served, reason) != (self._served, self._reason):
                news = f"serving {served.name}" if served else f"not ready: {reason}"
                log.info("%s model: %s", self.role, news)
            self._served, self._reason = served, reason
            self.last = served or self.last

    async def _ask(self) -> tuple[Served | None, str]:
        try:
            tokenizer, shard, _, _ = await asyncio.gather(
                self._asked(
                    "tokenizer",
                    self.tokenizer.Describe(
                        tokenizer_pb.TokenizerServiceDescribeRequest(),
                        timeout=LOOK_SECONDS,
                        metadata=_UNSAMPLED,
                    ),
                ),
                self._asked(
                    "stage 0",
                    self.shard.Describe(
                        shard_pb.ShardServiceDescribeRequest(),
                        timeout=LOOK_SECONDS,
                        metadata=_UNSAMPLED,
                    ),
                ),
                self._healthy("tokenizer"),
                self._healthy("stage 0"),
            )
        except _NotReadyError as error:
            return None, str(error)
        self.pipeline = shard
        return _agreed(self._kind, tokenizer, shard)

    async def _asked(self, name: str, call: Awaitable[T]) -> T:
        try:
            return await call
        except aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise _LateError(f"{name} does not answer in time.") from None
            raise _NotReadyError(f"{name} does not answer ({error.code().name}).") from None

    async def _healthy(self, name: str) -> None:
        request = health_pb2.HealthCheckRequest()
        check = self._health[name].Check(request, timeout=LOOK_SECONDS)  # type: ignore[attr-defined]
        reply = await self._asked(name, check)
        if reply.status != health_pb2.HealthCheckResponse.SERVING:
            raise _NotReadyError(f"{name} reports that it does not serve yet.")

    async def _poll(self) -> None:
        while True:
            await self.look()
            pause = self._poll_seconds if self._served else UNREADY_POLL_SECONDS
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._wake.wait()
            self._wake.clear()

    async def _watch(self, name: str, channel: aio.Channel) -> None:
        state = channel.get_state(try_to_connect=True)
        while True:
            await channel.wait_for_state_change(state)
            before, state = state, channel.get_state(try_to_connect=True)
            if before is grpc.ChannelConnectivity.READY:
                self._stale.set()
                self._served, self._reason = None, f"The connection to {name} was lost."
                self._wake.set()

    async def close(self) -> None:
        """Stops watching and closes the links."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for channel in self._channels.values():
            await channel.close()


class _NotReadyError(Exception):
    pass


class _LateError(Exception):
    pass


_DOES = {
    shard_pb.MODEL_KIND_EXTRACTIVE: "finds spans",
    shard_pb.MODEL_KIND_GENERATIVE: "writes text",
}


def _agreed(
    kind: shard_pb.ModelKind.ValueType,
    tokenizer: tokenizer_pb.TokenizerServiceDescribeResponse,
    shard: shard_pb.ShardServiceDescribeResponse,
) -> tuple[Served | None, str]:
    stage = shard.stage
    if stage.index != 0:
        return None, f"The shard address leads to stage {stage.index}; it must lead to stage 0."
    if shard.status != shard_pb.STAGE_STATUS_SERVING:
        return None, f"stage 0 does not serve: {shard.reason or 'it gives no reason'}"
    if tokenizer.model_fingerprint != stage.model_fingerprint:
        return None, (
            "The tokenizer serves another model than the shards (their fingerprints differ); "
            "start both with the same model directory."
        )
    for name, told in (("tokenizer", tokenizer.kind), ("stage 0", stage.kind)):
        if told not in (kind, shard_pb.MODEL_KIND_UNSPECIFIED):
            return None, (
                f"{name} serves a model that {_DOES.get(told, 'does something unknown')}, and one "
                f"that {_DOES[kind]} is called for; check which addresses are set for which model."
            )
    decoder = kind == shard_pb.MODEL_KIND_GENERATIVE
    longest = tokenizer.context_length if decoder else tokenizer.max_length
    lengths = [length for length in (longest, stage.max_sequence_length) if length]
    return Served(
        name=stage.model_name,
        fingerprint=stage.model_fingerprint,
        tokenizer_fingerprint=tokenizer.tokenizer_fingerprint,
        model_type=stage.model_type,
        stages=stage.stages,
        layers=stage.model_layers,
        max_length=min(lengths, default=0),
        writing=_writing(tokenizer, stage) if decoder else None,
        no_answer_thresholds=tuple(sorted(tokenizer.no_answer_thresholds.items())),
    ), ""


def _writing(
    tokenizer: tokenizer_pb.TokenizerServiceDescribeResponse, stage: shard_pb.StageInfo
) -> Writing:
    return Writing(
        vocab_size=stage.vocab_size or tokenizer.vocab_size,
        has_chat_template=tokenizer.has_chat_template,
        stop_token_ids=tuple(tokenizer.stop_token_ids),
        defaults=tuple((field.name, value) for field, value in tokenizer.sampling.ListFields()),
    )
