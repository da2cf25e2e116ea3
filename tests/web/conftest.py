"""A real browser, and real services whose page it opens."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import httpx
import pytest
from playwright.async_api import Browser, ConsoleMessage, Page, async_playwright

from gateway.access.keys import make_key
from gateway.access.store import KeyFile
from miaotui.cli.layout import BUNDLED_MODEL
from tests.decoder_checkpoints import make_decoder
from tests.processes import START_SECONDS, Cluster, ServiceProcess, free_port

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome")
     if (found := shutil.which(name))), None
)  # fmt: skip
# The sandbox needs rights that a container's root does not have; /dev/shm is small there.
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
PATIENCE = 60_000.0  # milliseconds
PHONE = {"width": 360, "height": 740}
DESK = {"width": 1180, "height": 860}


@dataclass
class Site:
    """Services, and a second gateway over the same ones."""

    cluster: Cluster
    writer: Cluster
    guarded_url: str
    keys: KeyFile

    @property
    def url(self) -> str:
        """The page's address."""
        return self.cluster.url


@dataclass
class Visit:
    """An open page, and what its console said."""

    page: Page
    url: str
    said: list[str] = field(default_factory=list)

    async def go(self, route: str) -> None:
        """Opens a view."""
        await self.page.goto(f"{self.url}/{route}")
        await self.page.wait_for_selector("h1")

    def console(self, message: ConsoleMessage) -> None:
        """Keeps what is worth a look."""
        if message.type in ("error", "warning"):
            self.said.append(f"{message.type}: {message.text} ({message.location})")


Open: TypeAlias = Callable[..., Any]


@pytest.fixture(scope="package")
async def browser() -> AsyncIterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here: apt-get install chromium (make test does)")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        await browser.close()


@pytest.fixture(scope="package")
async def site(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    """The bundled model in two stages and a tiny decoder, behind one gateway; and another
    gateway over them, which wants a key and lets the first one's page ask."""
    folder = tmp_path_factory.mktemp("web")
    keys = KeyFile(folder / "keys.json")
    decoder = make_decoder(folder / "tiny-writer", "llama", max_length=2048)
    writer = Cluster(decoder, stages=1, generative=True)
    writer.processes = [writer.tokenizer, *writer.shards]
    both = {
        "MIAOTUI_GATEWAY_GENERATOR_TOKENIZER": writer.tokenizer_target,
        "MIAOTUI_GATEWAY_GENERATOR_SHARD": writer.stage_targets[0],
    }
    cluster = Cluster(BUNDLED_MODEL, stages=2, gateway_env=both)
    more = {
        "MIAOTUI_GATEWAY_KEYS": str(folder / "keys.json"),
        "MIAOTUI_GATEWAY_CORS_ORIGINS": cluster.url,
    }
    keys.add(make_key("nobody")[0])
    writer.start()
    try:
        async with cluster, one_more_gateway(cluster, folder, more) as guarded_url:
            yield Site(cluster, writer, guarded_url, keys)
    finally:
        writer.stop()


@asynccontextmanager
async def one_more_gateway(
    cluster: Cluster, folder: Path, more: Mapping[str, str]
) -> AsyncIterator[str]:
    """The address of a gateway of its own over the extractive model, once it answers.

    `folder`: for its documents and its log; `more`: of its environment.
    """
    port = free_port()
    process = ServiceProcess(
        "another-gateway",
        cluster.gateway.argv,
        {
            **cluster.gateway.env,
            "MIAOTUI_GATEWAY_HTTP_LISTEN": f"127.0.0.1:{port}",
            "MIAOTUI_GATEWAY_GRPC_LISTEN": f"127.0.0.1:{free_port()}",
            "MIAOTUI_GATEWAY_DOCUMENTS": str(folder / "documents"),
            "MIAOTUI_GATEWAY_GENERATOR_TOKENIZER": "",
            "MIAOTUI_GATEWAY_GENERATOR_SHARD": "",
            **more,
        },
        folder / "another-gateway.log",
    )
    process.start()
    url = f"http://127.0.0.1:{port}"
    try:
        async with asyncio.timeout(START_SECONDS), client_of(url) as client:
            while not await _ready(client):
                assert process.alive, process.tail()
                await asyncio.sleep(0.05)
        yield url
    finally:
        process.stop()


async def _ready(client: httpx.AsyncClient) -> bool:
    try:
        return (await client.get("/readyz")).is_success
    except httpx.TransportError:
        return False


@pytest.fixture
async def visit(browser: Browser, site: Site) -> AsyncIterator[Open]:
    """As `visits`, at the site."""
    async with visits(browser, site.url) as visit:
        yield visit


@asynccontextmanager
async def visits(browser: Browser, usual_url: str) -> AsyncIterator[Open]:
    """Opens the page anew; afterwards the console must have been silent.

    `visit(language, dark, phone, url, expected)`: `expected` are parts of what the console may
    say, such as the status of a response that a test asks for.
    """
    opened: list[tuple[Visit, tuple[str, ...], Coroutine[Any, Any, None]]] = []

    async def visit(
        language: str = "en",
        *,
        dark: bool = False,
        phone: bool = False,
        url: str = "",
        expected: tuple[str, ...] = (),
    ) -> Visit:
        context = await browser.new_context(
            locale="zh-CN" if language == "zh" else "en-GB",
            color_scheme="dark" if dark else "light",
            viewport=PHONE if phone else DESK,  # type: ignore[arg-type]
            reduced_motion="reduce",
        )
        context.set_default_timeout(PATIENCE)
        page = await context.new_page()
        made = Visit(page, url or usual_url)
        page.on("console", made.console)
        page.on("pageerror", lambda error: made.said.append(f"exception: {error}"))
        opened.append((made, expected, context.close()))
        return made

    yield visit
    for made, expected, close in opened:
        await close
        said = [line for line in made.said if not any(part in line for part in expected)]
        assert said == [], f"the console of {made.url}"


@asynccontextmanager
async def client_of(url: str, **more: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a gateway."""
    async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=60.0, **more) as client:
        yield client
