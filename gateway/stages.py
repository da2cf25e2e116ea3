"""What the stages 0 of a model tell of all its stages' replicas, as one list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from gateway.replicas import Replica
from miaotui.v1 import shard_pb2 as pb

State: TypeAlias = Literal["serving", "starting", "draining", "mismatched", "unreachable"]
_STATES: dict[int, State] = {
    pb.STAGE_STATUS_SERVING: "serving",
    pb.STAGE_STATUS_DRAINING: "draining",
    pb.STAGE_STATUS_MISMATCHED: "mismatched",
}


@dataclass(frozen=True, slots=True)
class StageReplica:
    """A replica of a stage, as the gateway knows it by way of the stages 0."""

    index: int
    """Of the stage."""
    replica: int
    """Among those of the stage, by address, from 0."""
    address: str
    """host:port."""
    state: State
    reason: str
    """Why it does not serve; empty where it does."""
    info: pb.StageInfo | None
    """Who it is; None: it has not told anybody yet."""
    told: pb.ShardServiceDescribeResponse | None
    """What it last told of itself: queue, counters, memory."""

    @property
    def layers(self) -> tuple[int, int] | None:
        """First layer held, and one past the last."""
        return None if self.info is None else (self.info.first_layer, self.info.end_layer)

    @property
    def memory_bytes(self) -> int | None:
        """Of the process; None: not told."""
        return None if self.told is None else self.told.resident_bytes or None


def stage_replicas(
    heads: Sequence[Replica[pb.ShardServiceDescribeResponse]],
) -> list[StageReplica]:
    """All replicas, by stage and address. Of what several stages 0 say, the best counts."""
    found: dict[tuple[int, str], tuple[State, str, pb.ShardServiceDescribeResponse | None]] = {}
    for head in heads:
        told = head.described
        found[0, head.address] = (*_head_state(head), told)
        if told is None:
            continue
        for one in told.replicas:
            key = (one.stage, one.address)
            own = one.told if one.HasField("told") else None
            state = _state(one, own)
            if head.told is None and state == "serving":
                continue  # it speaks of a time when it served itself
            if key not in found or (state == "serving" and found[key][0] != "serving"):
                found[key] = (state, one.reason, own)
    infos = {info.address: info for head in heads if head.described for info in _chain(head)}
    replicas: list[StageReplica] = []
    for index, address in sorted(found):
        state, reason, told = found[index, address]
        info = told.stage if told is not None else infos.get(address)
        number = sum(one.index == index for one in replicas)
        replicas.append(StageReplica(index, number, address, state, reason, info, told))
    return replicas


def _chain(head: Replica[pb.ShardServiceDescribeResponse]) -> Sequence[pb.StageInfo]:
    return () if head.described is None else head.described.pipeline


def _head_state(head: Replica[pb.ShardServiceDescribeResponse]) -> tuple[State, str]:
    if head.told is not None:
        state = _STATES.get(head.told.status, "starting")
        return state, head.told.reason
    if head.described is not None and head.described.status == pb.STAGE_STATUS_DRAINING:
        return "draining", head.reason
    return ("starting" if "not serve" in head.reason else "unreachable"), head.reason


def _state(one: pb.StageReplica, told: pb.ShardServiceDescribeResponse | None) -> State:
    known = _STATES.get(one.status)
    if known is not None:
        return known
    return "unreachable" if told is None else "starting"
