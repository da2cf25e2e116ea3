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
from openai import AsyncOpenAI, DefaultAsyncHttpxClient

from tests.encoder import EncoderStage
from tests.gateway.fakes import Fakes, running_fakes
from tests.processes import START_SECONDS, RedisServer, ServiceProcess, free_port

PLAIN = ("REDIS_URL", "OTEL_", "MIAOTUI_")


async def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
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
        self.http = httpx.AsyncClient(base_url=self.url, trust_env=False, timeout=60.0)

    async def ask(self, question: str, context: str, **more: Any) -> httpx.Response:
        """POST /v1/qa."""
        body = {"question": question, "context": context, **more}
        return await self.http.post("/v1/qa", json=body)

    async def metric(self, name: str, key: str = "", **labels: str) -> float:
        """The sum of a counter's series that have these labels; `key`: an API key to ask with."""
        text = (await self.http.get("/metrics", headers={"X-API-Key": key} if key else {})).text
        total = 0.0
        for line in text.splitlines():
            if line.startswith(f"{name}{{") or line.startswith(f"{name} "):
                series, _, value = line.rpartition(" ")
                if all(f'{key}="{label}"' in series for key, label in labels.items()):
                    total += float(value)
        return total

    async def until_metric(
        self, name: str, holds: Callable[[float], bool], key: str = "", **labels: str
    ) -> None:
        """Waits until this holds for a counter."""
        deadline = time.monotonic() + 30
        while not holds(found := await self.metric(name, key, **labels)):
            assert time.monotonic() < deadline, f"{name} is {found}"
            await asyncio.sleep(0.02)

    async def until_asked(self, count: int, key: str = "") -> None:
        """Waits until so many questions are being worked on."""
        name = "miaotui_gateway_questions_in_flight"
        await self.until_metric(name, lambda found: found == count, key)

    async def ready(self, ready: bool = True, timeout: float = 60.0) -> httpx.Response:
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
    """As `start_gateway`, once it is ready."""
    async with start_gateway(fakes, directory, models=models, **settings) as gateway:
        await gateway.ready(timeout=START_SECONDS)
        yield gateway


@asynccontextmanager
async def start_gateway(
    fakes: Fakes, directory: Path, *, models: str = "extractive", **settings: str
) -> AsyncIterator[Gateway]:
    """A gateway over the fakes; settings by their environment variable's last part.

    `models`: of "extractive", "generative", "transcribing" and "captioning".
    """
    addresses = {}
    for kind, name in (
        ("extractive", ""),
        ("generative", "generator_"),
        ("transcribing", "transcriber_"),
        ("captioning", "captioner_"),
    ):
        for part in ("tokenizer", "shard"):
            address = fakes.address(f"{name}{part}") if kind in models else ""
            addresses[f"MIAOTUI_GATEWAY_{name}{part}".upper()] = address
    port, grpc_port = free_port(), free_port()
    env = {
        "MIAOTUI_GATEWAY_HTTP_LISTEN": f"127.0.0.1:{port}",
        "MIAOTUI_GATEWAY_GRPC_LISTEN": f"127.0.0.1:{grpc_port}",
        **addresses,
        "MIAOTUI_GATEWAY_POLL_SECONDS": "0.3",
        # Where a test says nothing of time, a busy machine may take it.
        "MIAOTUI_GATEWAY_REQUEST_TIMEOUT": "60",
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
        BODY_TIMEOUT="3",
    ) as running:
        yield running


@pytest.fixture(scope="session")
def encoder_stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EncoderStage]:
    """The bundled encoder in one stage; it may still be starting."""
    stage = EncoderStage(tmp_path_factory.mktemp("encoder"))
    stage.start()
    yield stage
    stage.stop()


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


@pytest.fixture
async def client(writer_gateway: Gateway) -> AsyncIterator[AsyncOpenAI]:
    """The official `openai` client of a gateway with both models."""
    async with AsyncOpenAI(
        base_url=f"{writer_gateway.url}/v1",
        api_key="none",
        max_retries=0,
        http_client=DefaultAsyncHttpxClient(trust_env=False),
    ) as client:
        yield client
