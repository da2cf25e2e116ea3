"""A gateway process over fakes of its services, shared by the tests of this folder."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.gateway.fakes import Fakes, running_fakes
from tests.processes import RedisServer, ServiceProcess, free_port

PLAIN = ("REDIS_URL", "OTEL_", "MIAOTUI_")


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Waits until the condition holds; fails where it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that in time"
        await asyncio.sleep(0.02)


class Gateway:
    """A gateway process and clients of it."""

    def __init__(self, process: ServiceProcess, port: int, grpc_port: int) -> None:
        self.process = process
        self.port = port
        self.grpc_target = f"127.0.0.1:{grpc_port}"
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.AsyncClient(base_url=self.url, trust_env=False, timeout=30.0)

    async def ask(self, question: str, context: str, **more: Any) -> httpx.Response:
        """POST /v1/qa."""
        body = {"question": question, "context": context, **more}
        return await self.http.post("/v1/qa", json=body)

    async def metric(self, name: str, **labels: str) -> float:
        """The sum of a counter's series that have these labels."""
        text = (await self.http.get("/metrics")).text
        total = 0.0
        for line in text.splitlines():
            if line.startswith(f"{name}{{") or line.startswith(f"{name} "):
                series, _, value = line.rpartition(" ")
                if all(f'{key}="{label}"' in series for key, label in labels.items()):
                    total += float(value)
        return total

    async def ready(self, ready: bool = True, timeout: float = 20.0) -> httpx.Response:
        """Waits until /readyz says so."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            assert self.process.alive, self.process.tail()
            try:
                response = await self.http.get("/readyz")
                if (response.status_code == 200) == ready:
                    return response
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.05)
        raise AssertionError(f"not ready={ready} in time\n{self.process.tail()}")


@asynccontextmanager
async def run_gateway(
    fakes: Fakes, directory: Path, *, models: str = "extractive", **settings: str
) -> AsyncIterator[Gateway]:
    """A gateway over the fakes; settings by their environment variable's last part.

    `models`: "extractive", "generative" or both.
    """
    finds, writes = "extractive" in models, "generative" in models
    port, grpc_port = free_port(), free_port()
    env = {
        "MIAOTUI_GATEWAY_HTTP_LISTEN": f"127.0.0.1:{port}",
        "MIAOTUI_GATEWAY_GRPC_LISTEN": f"127.0.0.1:{grpc_port}",
        "MIAOTUI_GATEWAY_TOKENIZER": fakes.address("tokenizer") if finds else "",
        "MIAOTUI_GATEWAY_SHARD": fakes.address("shard") if finds else "",
        "MIAOTUI_GATEWAY_GENERATOR_TOKENIZER": (
            fakes.address("generator_tokenizer") if writes else ""
        ),
        "MIAOTUI_GATEWAY_GENERATOR_SHARD": fakes.address("generator_shard") if writes else "",
        "MIAOTUI_GATEWAY_POLL_SECONDS": "0.3",
        "MIAOTUI_GATEWAY_DOCUMENTS": str(directory / "documents"),
        **{
            name if name.startswith(PLAIN) else f"MIAOTUI_GATEWAY_{name}": value
            for name, value in settings.items()
        },
    }
    process = ServiceProcess(
        "gateway", [sys.executable, "-m", "gateway"], env, directory / "gateway.log"
    )
    process.start()
    gateway = Gateway(process, port, grpc_port)
    try:
        await gateway.ready()
        yield gateway
    finally:
        await gateway.http.aclose()
        await asyncio.to_thread(process.stop)


@pytest.fixture(scope="session")
async def all_fakes() -> AsyncIterator[Fakes]:
    """The services' fakes."""
    async with running_fakes() as running:
        yield running


@pytest.fixture
def fakes(all_fakes: Fakes) -> Fakes:
    """The services' fakes, without faults."""
    all_fakes.reset()
    return all_fakes


@pytest.fixture(scope="session")
async def gateway(
    all_fakes: Fakes, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Gateway]:
    """A gateway with its cache in memory and small limits."""
    async with run_gateway(
        all_fakes,
        tmp_path_factory.mktemp("gateway"),
        MAX_BODY_BYTES="65536",
        MAX_CONTEXT_CHARACTERS="20000",
        MAX_QUESTION_CHARACTERS="500",
        MAX_BATCH_ITEMS="40",
        MAX_CONCURRENT_REQUESTS="64",
        BODY_TIMEOUT="1",
    ) as running:
        yield running


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    """A real Redis of this test's own."""
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
async def writer_gateway(
    all_fakes: Fakes, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Gateway]:
    """A gateway with both models."""
    directory = tmp_path_factory.mktemp("writer-gateway")
    async with run_gateway(
        all_fakes, directory, models="extractive generative", MAX_TEXTS="8"
    ) as running:
        yield running
