"""Stage 0 knows a replica by the address that it was found under, and by its own name."""

from __future__ import annotations

from typing import Any, cast

import grpc
import pytest

from miaotui.v1 import shard_pb2 as pb
from services.shard.lanes import Lanes
from services.shard.link import LinkClock, LinkEnd
from services.shard.route import HeadLane, Replica
from services.shard.shares import Shares

FOUND = (("10.0.0.1:50060", "10.0.0.2:50060"), ("10.0.0.3:50060",))


class Owner:
    """A stage 0 that does nothing."""

    info = pb.StageInfo(index=0)

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


def own_name(stage: int, number: int) -> str:
    return f"stage-{stage}-{number}.stage-{stage}.prod.svc:50060"


@pytest.fixture
def lanes() -> Lanes:
    """Of a stage 0 with two stages behind it, found by DNS; no lane can be opened."""
    shares = Shares(1, 1)
    shares.take()
    made = Lanes(
        cast(Any, Owner()), FOUND, shares, part_bytes=1024, clock=LinkClock(), stall_seconds=30
    )
    for index, addresses in enumerate(FOUND):
        for number, address in enumerate(addresses):
            told = pb.ShardServiceDescribeResponse()
            told.stage.address = own_name(index + 1, number)
            made._replicas[index][address] = Replica(index + 1, address, told=told)
    return made


def lane_through(lanes: Lanes) -> HeadLane:
    route = tuple(next(iter(replicas.values())) for replicas in lanes._replicas)
    return HeadLane(0, "lane", route, cast(Any, None), Owner.info, cast(Any, None))


def test_a_replica_found_by_dns_is_known_to_shut_down(lanes: Lanes) -> None:
    lanes._draining(lane_through(lanes), own_name(1, 0))
    states = [[one.draining for one in some.values()] for some in lanes._replicas]
    assert states == [[True, False], [False]]


def test_a_replica_found_by_dns_is_blamed_for_what_it_says(lanes: Lanes) -> None:
    lane = lane_through(lanes)
    for at, failures in ((own_name(1, 0), [1, 0]), (FOUND[0][0], [2, 0]), ("?:1", [2, 1])):
        lanes._blame(lane, LinkEnd(grpc.StatusCode.UNAVAILABLE, "gone", at))
        assert [one.breaker.failures for one in lane.route] == failures
