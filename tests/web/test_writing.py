"""Text that a decoder writes: streamed, stopped, and in a sentence with its sources."""

from __future__ import annotations

import json
import re

import pytest
from playwright.async_api import Route

from tests.web.conftest import Open
from tests.web.looks import assert_accessible, assert_fits


@pytest.mark.parametrize(("language", "phone"), [("en", False), ("zh", True)])
async def test_a_chat_streams(visit: Open, language: str, phone: bool) -> None:
    view = await visit(language, phone=phone)
    await view.go("#/ask?from=chat")
    page = view.page
    await page.wait_for_selector("#message")
    await assert_accessible(page)
    await page.click("details summary")
    await page.fill("input[type=number] >> nth=1", "24")
    await page.fill("input[type=number] >> nth=0", "0")
    await page.fill("#message", "Hello 你好")
    await page.press("#message", "Enter")
    rate = {"en": "tokens/s", "zh": "每秒"}[language]
    await page.wait_for_selector(f".bubble.assistant >> text={rate}")
    assert len(await page.inner_text(".bubble.assistant .bubble-text")) > 5
    await page.wait_for_selector(".messages:not([aria-busy])")
    assert await page.input_value("#message") == ""
    await assert_accessible(page)
    await assert_fits(page)


async def _without_an_end(route: Route) -> None:
    body = json.loads(route.request.post_data or "")
    await route.continue_(post_data=json.dumps({**body, "ignore_eos": True}))


async def test_a_chat_can_be_stopped(visit: Open) -> None:
    view = await visit()
    await view.go("#/ask?from=chat")
    page = view.page
    await page.wait_for_selector("#message")
    await page.click("details summary")
    await page.fill("input[type=number] >> nth=1", "1500")
    await page.fill("#message", "Write for a long time.")
    # A slow line: the tiny model's text would else be over before the click arrives.
    # Neither may it end by itself: one token in 300 of random weights ends a text.
    await page.route("**/v1/chat/completions", _without_an_end)
    session = await page.context.new_cdp_session(page)
    await session.send(
        "Network.emulateNetworkConditions",
        {"offline": False, "latency": 0, "downloadThroughput": 4096, "uploadThroughput": -1},
    )
    await page.get_by_role("button", name="Send").click()
    # As a function: the page's policy refuses an expression the second time that it is tried.
    await page.wait_for_function(
        "() => document.querySelector('.bubble.assistant .bubble-text')?.textContent.length > 10"
    )
    await page.get_by_role("button", name="Stop").click()
    await page.wait_for_selector(".bubble.assistant >> text=stopped by you")
    await page.get_by_role("button", name="Send").wait_for()
    assert await page.get_by_role("button", name="Send").is_enabled()
    await page.click("text=New conversation")
    assert await page.locator(".bubble").count() == 0


async def test_a_sentence_and_its_sources(visit: Open) -> None:
    view = await visit()
    await view.go("#/ask")
    page = view.page
    await page.wait_for_selector("text=A sentence")
    await page.get_by_label("A sentence").check()
    await page.click(".examples [lang=en]")
    await page.wait_for_selector(".answer-text", timeout=120_000)
    assert "tiny-writer" in await page.inner_text(".facts")
    assert await page.locator("text=Why this answer?").count() == 0
    await view.go("#/why")
    await page.wait_for_selector(".empty")


async def test_compare_two_models_and_another_gateway(visit: Open) -> None:
    view = await visit()
    await view.go("#/compare")
    page = view.page
    await page.wait_for_selector("#compare-left")
    options = await page.locator("#compare-right option").all_inner_texts()
    assert options == ["qa · finds answers", "tiny-writer · writes text"]
    await page.click("text=Example in English")
    await page.click("button.main")
    await page.wait_for_selector(".verdict", timeout=120_000)
    # Which one that is, is the machine's affair.
    verdict = await page.inner_text(".verdict")
    names = "qa · finds answers|tiny-writer · writes text"
    assert re.search(rf"The answers differ\. ({names}) was faster", verdict)
    assert await page.locator(".columns section").count() == 2
    await assert_accessible(page)
