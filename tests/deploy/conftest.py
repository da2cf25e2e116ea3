"""What the tests of the deployment share: the chart, and the Compose file's services, running."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import httpx
import pytest

from tests.checkpoints import make_checkpoint
from tests.deploy.chart import VALUES, Manifest, render
from tests.deploy.stack import Stack
from tests.e2e.collector import Collector
from tests.processes import START_SECONDS


@dataclass(frozen=True)
class Stacks:
    """The same services in plain text and over TLS."""

    plain: Stack
    tls: Stack


@pytest.fixture(params=VALUES)
def manifests(request: pytest.FixtureRequest) -> list[Manifest]:
    """The chart rendered with several values."""
    return render(VALUES[request.param])


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    """Takes the traces of both stacks."""
    with Collector() as running:
        yield running


@pytest.fixture(scope="session")
async def stacks(
    tmp_path_factory: pytest.TempPathFactory, collector: Collector
) -> AsyncIterator[Stacks]:
    """Both, ready; started together, because most of a start is waiting for imports."""
    directory = tmp_path_factory.mktemp("stacks")
    model = make_checkpoint(directory / "model", "bert")
    plain, tls = (
        Stack(tmp_path_factory.mktemp(name), model, collector.address, tls=name == "tls")
        for name in ("plain", "tls")
    )
    tls.processes["gateway"].env["MIAOTUI_GATEWAY_HTTPS"] = "1"
    both = (plain, tls)
    try:
        await asyncio.gather(*(stack.start() for stack in both))
        for stack in both:
            await _ready(stack)
        yield Stacks(plain, tls)
    finally:
        await asyncio.gather(*(stack.stop() for stack in both))


@pytest.fixture
async def client(stacks: Stacks) -> AsyncIterator[httpx.AsyncClient]:
    """Trusts the TLS stack's own authority, and no other."""
    async with _client(stacks.tls) as opened:
        yield opened


def _client(stack: Stack) -> httpx.AsyncClient:
    verify: ssl.SSLContext | bool = False
    if stack.tls_dir is not None:
        verify = ssl.create_default_context(cafile=stack.tls_dir / "ca.crt")
    return httpx.AsyncClient(trust_env=False, timeout=60.0, verify=verify)


async def _ready(stack: Stack) -> None:
    deadline = time.monotonic() + START_SECONDS
    state = "the gateway does not answer"
    async with _client(stack) as client:
        while time.monotonic() < deadline:
            for process in stack.processes.values():
                assert process.alive, process.tail()
            try:
                response = await client.get(f"{stack.url}/readyz")
                if response.status_code == 200:
                    return
                state = response.text
            except httpx.TransportError as error:
                state = str(error)
            await asyncio.sleep(0.1)
    logs = "\n".join(process.tail() for process in stack.processes.values())
    raise AssertionError(f"not ready: {state}\n{logs}")
