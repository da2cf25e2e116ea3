"""A tokenizer service as a process of its own, over a real socket."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from sys import executable
from typing import TYPE_CHECKING

import grpc
import pytest
import pytest_asyncio
from grpc import aio

from miaotui.v1 import tokenizer_pb2 as pb
from miaotui.v1.tokenizer_pb2_grpc import TokenizerServiceStub
from services.rpc.channel import open_channel
from tests.checkpoints import make_checkpoint
from tests.processes import START_SECONDS, ServiceProcess, free_port

if TYPE_CHECKING:  # the generated module itself has no such class
    from miaotui.v1.tokenizer_pb2_grpc import TokenizerServiceAsyncStub

_SETTINGS = {"MIAOTUI_TOKENIZER_MAX_SPANS": "100", "MIAOTUI_TOKENIZER_DRAIN_SECONDS": "30"}


class Service:
    """The process, and where it listens."""

    def __init__(self, model: Path, log: Path, env: Mapping[str, str] | None = None) -> None:
        """`env`: settings beside the model and the addresses."""
        self.model = model
        self.target = f"127.0.0.1:{free_port()}"
        self.metrics_port = free_port()
        settings = {
            "MIAOTUI_TOKENIZER_MODEL": str(model),
            "MIAOTUI_TOKENIZER_LISTEN": self.target,
            "MIAOTUI_TOKENIZER_METRICS_PORT": str(self.metrics_port),
            **(env or {}),
        }
        argv = [executable, "-m", "services.tokenizer"]
        self.process = ServiceProcess("tokenizer", argv, settings, log)

    async def ready(self, channel: aio.Channel) -> None:
        """Waits until it answers; fails at once where it dies."""
        stub = TokenizerServiceStub(channel)
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                await stub.Describe(pb.TokenizerServiceDescribeRequest(), timeout=60)
                return
            except aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
            assert self.process.alive, self.process.tail()
            assert time.monotonic() < deadline, self.process.tail()
            await asyncio.sleep(0.1)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT."""
    return make_checkpoint(tmp_path_factory.mktemp("tokenizer-model"), "bert", layers=1)


@pytest.fixture(scope="session")
def service(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One service for all tests; the last one stops it."""
    log = tmp_path_factory.mktemp("tokenizer-log") / "tokenizer.log"
    service = Service(model, log, _SETTINGS)
    service.process.start()
    yield service
    assert service.process.stop() == 0


@pytest_asyncio.fixture(scope="session")
async def channel(service: Service) -> AsyncIterator[aio.Channel]:
    """A channel to it, once it answers."""
    async with open_channel(service.target) as channel:
        await service.ready(channel)
        yield channel


@pytest.fixture
def stub(channel: aio.Channel) -> TokenizerServiceAsyncStub:
    """Its methods."""
    return TokenizerServiceStub(channel)
