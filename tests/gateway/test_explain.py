"""Explanations where the stages cannot give one, and warnings, through a gateway over fakes."""

from __future__ import annotations

import grpc
import pytest

from miaotui.v1 import gateway_pb2, gateway_pb2_grpc
from services.rpc.channel import open_channel
from tests.gateway.conftest import Gateway
from tests.gateway.fakes import Fakes


async def test_stages_that_explain_nothing_are_the_callers_affair(
    gateway: Gateway, fakes: Fakes
) -> None:
    response = await gateway.ask("When, and why?", "It was in 1961.", explain=True)
    assert response.status_code == 422
    problem = response.json()
    assert [error["pointer"] for error in problem["errors"]] == ["/explain"]
    assert "cannot be explained" in problem["errors"][0]["detail"]
    async with open_channel(gateway.grpc_target) as channel:
        stub = gateway_pb2_grpc.GatewayServiceStub(channel)
        request = gateway_pb2.AnswerRequest(question="When?", context="In 1962.", explain=True)
        with pytest.raises(grpc.aio.AioRpcError, match="/explain") as refused:
            await stub.Answer(request, timeout=20)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_warnings_come_from_the_cache_and_over_grpc_too(
    gateway: Gateway, fakes: Fakes
) -> None:
    for cache in ("miss", "hit"):
        body = (await gateway.ask("Whеn was it?", "It was in 1\u200b963.")).json()
        assert body["cache"] == cache
        kinds = {warning["kind"]: warning["score"] for warning in body["warnings"]}
        assert set(kinds) == {"homoglyphs", "invisible_characters"}
        assert all(0 < score <= 1 for score in kinds.values())
    plain = (await gateway.ask("When was it?", "It was in 1963.")).json()
    assert plain["warnings"] == []
    assert plain["explanation"] is None
    async with open_channel(gateway.grpc_target) as channel:
        stub = gateway_pb2_grpc.GatewayServiceStub(channel)
        request = gateway_pb2.AnswerRequest(question="Whеn was it?", context="In 1964.")
        reply = await stub.Answer(request, timeout=20)
    assert [warning.kind for warning in reply.warnings] == ["homoglyphs"]
