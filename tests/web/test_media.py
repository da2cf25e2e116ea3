"""Pictures and recordings in the chat, over fakes of the models: a token is a byte."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from playwright.async_api import Browser

from tests.gateway.conftest import run_gateway
from tests.gateway.fakes import running_fakes
from tests.web.conftest import Open, visits
from tests.web.looks import assert_accessible, assert_fits, assert_plain

PICTURE = {"name": "cat.png", "mimeType": "image/png", "buffer": b"a cat on a mat"}
SOUND = {"name": "talk.flac", "mimeType": "audio/flac", "buffer": b"Good |morning."}


@pytest.fixture(scope="module")
async def urls(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[dict[str, str]]:
    """Gateways: with all kinds of models, and without one that writes."""
    folder = tmp_path_factory.mktemp("web-media")
    every, few = folder / "every", folder / "few"
    for place in (every, few):
        place.mkdir()
    async with (
        running_fakes() as fakes,
        run_gateway(fakes, every, models="generative transcribing captioning") as whole,
        run_gateway(fakes, few, models="transcribing captioning") as part,
    ):
        yield {"every": whole.url, "few": part.url}


@pytest.fixture
async def media_visit(browser: Browser, urls: dict[str, str]) -> AsyncIterator[Open]:
    async with visits(browser, urls["every"]) as visit:
        yield visit


async def _chat(visit: Open, language: str = "en", **options: Any) -> Any:
    view = await visit(language, **options)
    await view.go("#/ask?from=chat")
    await view.page.wait_for_selector("#attachment", state="attached")
    return view.page


@pytest.mark.parametrize(("language", "phone"), [("en", False), ("zh", True)])
async def test_a_picture_is_described(media_visit: Open, language: str, phone: bool) -> None:
    page = await _chat(media_visit, language, phone=phone)
    await page.set_input_files("#attachment", PICTURE)
    await page.wait_for_selector("text=cat.png")
    await assert_accessible(page)
    await page.click("button[type=submit]")
    await page.wait_for_selector(".bubble.assistant >> text=a cat on a mat")
    assert await page.get_attribute(".bubble.user img", "alt") == "cat.png"
    await assert_accessible(page)
    await assert_fits(page)
    await assert_plain(page)
    # What comes next is for the model that writes.
    await page.fill("#message", "Whose mat?")
    await page.press("#message", "Enter")
    await page.wait_for_selector(".bubble.assistant >> text=Hello, world.")


async def test_a_recording_is_written_down(media_visit: Open) -> None:
    page = await _chat(media_visit)
    await page.set_input_files("#attachment", SOUND)
    await page.wait_for_selector(".bubble.assistant >> text=Good morning.")
    await page.wait_for_selector(".bubble.user >> text=talk.flac")
    await assert_accessible(page)


async def test_a_picture_that_is_dropped_can_be_taken_away(media_visit: Open) -> None:
    page = await _chat(media_visit)
    await page.evaluate(
        """() => {
          const transfer = new DataTransfer();
          transfer.items.add(new File(["a dog"], "dog.png", { type: "image/png" }));
          document.querySelector(".drop").dispatchEvent(
            new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true }));
        }"""
    )
    # Its name alone is read out as well, and stays in what was read out.
    await page.wait_for_selector("img.thumb", state="attached")
    await page.click("text=Remove")
    await page.wait_for_selector("img.thumb", state="detached")


async def test_what_cannot_be_taken(media_visit: Open, urls: dict[str, str]) -> None:
    page = await _chat(media_visit, url=urls["few"], expected=("400",))
    await page.set_input_files(
        "#attachment", {"name": "a.pdf", "mimeType": "application/pdf", "buffer": b"x"}
    )
    await page.wait_for_selector("[role=alert] >> text=a.pdf")
    await page.fill("#message", "Hello")
    await page.press("#message", "Enter")
    await page.wait_for_selector("[role=alert] >> text=add one")
    await page.set_input_files("#attachment", {**SOUND, "buffer": b"broken"})
    await page.wait_for_selector("[role=alert] >> text=broken")
    assert await page.locator(".bubble").count() == 0
    await assert_plain(page)
