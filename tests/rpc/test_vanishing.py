"""Callers that vanish just as they are answered: the service goes on, and its log is silent."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio
from grpc import aio

from services.rpc.server import RpcServer
from tests.rpc.deaf import DeafCaller

SERVICE = "test.Service"
# More than the buffers of a socket take.
STUFFING = "x" * 32_000_000


class Refusing:
    """A service that refuses whatever is asked, and knows how far it is with that."""

    def __init__(self) -> None:
        self.sending: list[str] = []
        self.over: list[str] = []
        self.failed: aio.InternalError | None = None
        """What came of a refusal that could not be sent."""
        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.stream_stream_rpc_method_handler
        handlers: dict[str, Any] = {
            "Stuff": unary(self.stuff),
            "Refuse": unary(self.refuse),
            "Fail": unary(self.fail),
            "Err": stream(self.err),
        }
        self.server = RpcServer(SERVICE)
        self.server.aio.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE, handlers),)
        )

    def _begin(self, name: str, context: Any) -> None:
        context.add_done_callback(lambda _: self.over.append(name))
        # By the time that it runs, what this task is about to send has been handed to gRPC.
        asyncio.get_running_loop().call_soon(self.sending.append, name)

    async def stuff(self, _: bytes, context: Any) -> None:
        self._begin("Stuff", context)
        await context.abort(grpc.StatusCode.NOT_FOUND, STUFFING)

    async def refuse(self, _: bytes, context: Any) -> None:
        self._begin("Refuse", context)
        try:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "not that one")
        except aio.InternalError as error:
            self.failed = error
            raise

    async def fail(self, _: bytes, context: Any) -> None:
        """As `refuse` whose caller vanishes, where gRPC hears of that only after the failure."""
        self._begin("Fail", context)
        assert self.failed is not None
        raise self.failed

    async def err(self, _: AsyncIterator[bytes], context: Any) -> None:
        """Does what no handler may: writes while it writes."""
        self._begin("Err", context)
        await asyncio.gather(context.write(b"one"), context.write(b"two"))


@pytest_asyncio.fixture
async def service(caplog: pytest.LogCaptureFixture) -> AsyncIterator[Refusing]:
    caplog.set_level(logging.INFO)
    service = Refusing()
    await service.server.start("127.0.0.1:0")
    yield service
    await service.server.stop(0)


async def _until_in(name: str, names: list[str]) -> None:
    async with asyncio.timeout(60):
        while name not in names:
            await asyncio.sleep(0.01)


async def test_a_caller_that_vanishes_is_no_error(
    service: Refusing, caplog: pytest.LogCaptureFixture
) -> None:
    caller = await DeafCaller.connect(service.server.port)
    await caller.call(f"/{SERVICE}/Stuff")
    await _until_in("Stuff", service.sending)
    # What is sent now waits behind that, until the caller is gone.
    await caller.call(f"/{SERVICE}/Refuse")
    await _until_in("Refuse", service.sending)
    assert service.over == []
    caller.vanish()
    await _until_in("Refuse", service.over)
    assert "execute_batch" in str(service.failed)
    other = await DeafCaller.connect(service.server.port)
    await other.call(f"/{SERVICE}/Fail")
    await _until_in("Fail", service.over)
    other.vanish()
    assert [record.getMessage() for record in caplog.records] == []


async def test_a_mistake_of_ours_is_logged(
    service: Refusing, caplog: pytest.LogCaptureFixture
) -> None:
    caller = await DeafCaller.connect(service.server.port)
    await caller.call(f"/{SERVICE}/Err")
    await _until_in("Err", service.over)
    caller.vanish()
    (record,) = caplog.records
    assert "ExecuteBatchError" in record.getMessage()
    assert "grpc_call_start_batch" in caplog.text
