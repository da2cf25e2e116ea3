"""Which stages there are: those that the models' stage 0 names, and those it named before."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from gateway.models import Models
from gateway.served import Role
from gateway.settings import GatewaySettings
from gateway.upstream import Pair
from miaotui.v1 import shard_pb2 as pb
from services.rpc.endpoints import split_addresses

# So long is a stage shown that its stage 0 names no more.
_FORGET_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class KnownStage:
    """A stage that is, or was lately, a part of a model."""

    address: str
    """host:port under which the gateway reaches it."""
    info: pb.StageInfo
    named: bool
    """Whether stage 0 names it now, as a part of a ring that is whole."""


@dataclass(frozen=True, slots=True)
class Ring:
    """A model's stages."""

    name: str
    kind: Role
    ready: bool
    reason: str
    stages: tuple[KnownStage, ...]
    """By index, then address."""
    head: pb.ShardServiceDescribeResponse
    """What stage 0 said last."""


@dataclass(slots=True)
class _Memory:
    seen: dict[str, tuple[pb.StageInfo, float]] = field(default_factory=dict)


class Rings:
    """Remembers the stages that a ring had before it broke."""

    def __init__(
        self,
        models: Models,
        settings: GatewaySettings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._models = models
        self._clock = clock
        self._heads = {
            "extractive": (*split_addresses(settings.shard), "")[0],
            "generative": (*split_addresses(settings.generator_shard), "")[0],
            "transcribing": (*split_addresses(settings.transcriber_shard), "")[0],
            "captioning": (*split_addresses(settings.captioner_shard), "")[0],
            "embedding": (*split_addresses(settings.encoder_stages), "")[0],
        }
        self._memories = {pair.role: _Memory() for pair in models.all}

    def now(self) -> Sequence[Ring]:
        """Every model's stages."""
        return [self._ring(pair) for pair in self._models.all]

    def _ring(self, pair: Pair[Any, Any]) -> Ring:
        head, now = self._heads[pair.role], self._clock()
        told = pair.pipeline or pb.ShardServiceDescribeResponse()
        seen = self._memories[pair.role].seen
        whole = pair.served is not None
        named = {
            one.address: one.info
            for one in pair.stages
            if one.info is not None and one.state == "serving"
        }
        for address, info in named.items():
            # Stage 0 may be away: what it said last is no news then.
            if whole or address not in seen:
                seen[address] = (info, now)
        if whole:
            late = [a for a, (_, when) in seen.items() if now - when > _FORGET_SECONDS]
            for address in late:
                del seen[address]
        known = {address: info for address, (info, _) in seen.items()} or {head: told.stage}
        stages = [
            KnownStage(address, info, whole and address in named) for address, info in known.items()
        ]
        served = pair.served or pair.last
        return Ring(
            name=served.name if served else told.stage.model_name,
            kind=pair.role,
            ready=whole,
            reason=pair.reason,
            stages=tuple(sorted(stages, key=lambda stage: (stage.info.index, stage.address))),
            head=told,
        )
