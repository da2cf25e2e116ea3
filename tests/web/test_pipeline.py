"""The live pipeline, traces, and why an answer is the answer."""

from __future__ import annotations

import asyncio

import pytest
from playwright.async_api import Route

from tests.web.conftest import Open, Site, client_of
from tests.web.looks import assert_accessible, assert_fits, assert_plain


@pytest.mark.parametrize(("language", "dark", "phone"), [("en", False, False), ("zh", True, True)])
async def test_stages_and_traces(visit: Open, language: str, dark: bool, phone: bool) -> None:
    view = await visit(language, dark=dark, phone=phone)
    await view.go("#/ask")
    page = view.page
    await page.check(".check input")
    await page.click(f".examples [lang={language}]")
    await page.wait_for_selector(".answer-text")
    await view.go("#/pipeline")
    await page.wait_for_selector(".stage.serving >> nth=2")
    stages = await page.locator(".stage").all_inner_texts()
    assert len(stages) == 3
    layers = {"en": "Layers 1 to 3", "zh": "第 1 至 3 层"}[language]
    assert layers in stages[0]
    assert {"en": "serving", "zh": "服务中"}[language] in stages[1]
    assert " MB" in stages[1]
    await page.wait_for_selector(".spark-line")
    await page.wait_for_selector("a[href^='#/trace/']")
    await assert_accessible(page)
    await assert_fits(page)
    await assert_plain(page)
    await page.click("a[href^='#/trace/'] >> nth=0")
    await page.wait_for_selector(".waterfall tbody tr")
    services = set(await page.locator(".waterfall td:nth-child(2)").all_inner_texts())
    assert "gateway" in services
    await assert_accessible(page)
    await assert_fits(page)


async def test_a_stage_that_stops_turns_red_and_comes_back(visit: Open, site: Site) -> None:
    view = await visit()
    await view.go("#/pipeline")
    page = view.page
    await page.wait_for_selector("[aria-label=qa] .stage.serving >> nth=1")
    stage = site.cluster.shards[1]
    await page.evaluate(
        """() => {
          window.said = [];
          new MutationObserver(() => said.push(document.getElementById("status").textContent))
            .observe(document.getElementById("status"), {childList: true});
        }"""
    )
    stage.kill()
    try:
        await page.wait_for_selector("[aria-label=qa] .stage.unreachable")
        gone = page.locator("[aria-label=qa] .stage.unreachable")
        assert "unreachable" in await gone.inner_text()
        await page.wait_for_selector("[aria-label=qa] .chip.unreachable >> text=not ready")
        await assert_accessible(page)
    finally:
        stage.start()
        await site.cluster.ready()
    await page.wait_for_selector("[aria-label=qa] .stage.serving >> nth=1", timeout=120_000)
    # What is said comes a moment after what is shown.
    for words in ("Stage 1 of qa cannot be reached.", "Stage 1 of qa serves again."):
        await page.wait_for_function("words => said.join(' ').includes(words)", arg=words)


async def test_polls_only_while_it_is_seen(visit: Open) -> None:
    view = await visit()
    await view.go("#/pipeline")
    page = view.page
    await page.wait_for_selector(".stage")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    await page.evaluate(
        "Object.defineProperty(document, 'hidden', {value: true});"
        "document.dispatchEvent(new Event('visibilitychange'))"
    )
    asked.clear()  # what was asked until then
    await page.wait_for_timeout(2500)
    assert [url for url in asked if url.endswith("/v1/live")] == []


async def test_an_unknown_trace_and_an_unknown_address(visit: Open) -> None:
    view = await visit(expected=("404",))
    await view.go(f"#/trace/{'0' * 32}")
    await view.page.wait_for_selector("text=This trace is not kept any more.")
    await view.go("#/nowhere")
    await view.page.wait_for_selector("#question")


async def test_files_are_revalidated_and_typed(site: Site) -> None:
    async with client_of(site.url) as client:
        for path, kind in (("web/app.js", "text/javascript"), ("web/style/base.css", "text/css")):
            response = await client.get(path)
            assert response.headers["content-type"] == f"{kind}; charset=utf-8"
            assert response.headers["cache-control"] == "no-cache"
            tag = response.headers["etag"]
            again = await client.get(path, headers={"If-None-Match": f'"x", {tag}'})
            assert again.status_code == 304
            assert again.content == b""
        page = await client.get("/")
        policy = page.headers["content-security-policy"]
        assert "script-src 'sha256-" in policy
        assert "unsafe" not in policy
        host = "connect-src 'self' http://127.0.0.1:* https://127.0.0.1:*"
        assert policy.endswith(host)
        odd = await client.get("/", headers={"Host": "x; script-src *"})
        assert "*" not in odd.headers.get("content-security-policy", "")
        for path in ("web/../settings.py", "web/%2e%2e/settings.py", "web/none.js", "web/"):
            assert (await client.get(path)).status_code == 404


async def test_why(visit: Open) -> None:
    view = await visit("zh")
    await view.go("#/why")
    page = view.page
    await page.wait_for_selector("text=请先提问")
    await assert_accessible(page)
    await view.go("#/ask")
    await page.click(".examples [lang=zh]")
    await page.wait_for_selector(".answer-text")
    await page.click("text=为什么是这个答案？")
    await page.wait_for_selector(".heat, [role=alert]", timeout=120_000)
    assert await page.locator("[role=alert]").all_inner_texts() == []
    await page.locator("main .waiting").wait_for(state="detached")
    assert await page.locator(".w.for").count() > 0
    assert await page.inner_text(".is-answer >> nth=0") in await page.inner_text("#why-answer")
    assert "%" in await page.inner_text(".card .figure")
    await page.get_by_label("单层注意力").check()
    assert await page.locator(".row select").count() == 2
    before = await page.inner_html(".heat")
    await page.select_option(".row select >> nth=0", "0")
    assert await page.inner_html(".heat") != before
    await page.get_by_label("注意力展开").check()
    await page.wait_for_selector(".waterfall tbody tr")
    await assert_accessible(page)
    await assert_fits(page)
    await assert_plain(page)


@pytest.mark.parametrize(("language", "phone"), [("en", True), ("zh", False)])
async def test_why_shows_how_long_it_takes(visit: Open, language: str, phone: bool) -> None:
    """The explanation is held back until all has been seen, and then fails."""
    view = await visit(language, phone=phone, expected=("net::ERR_FAILED",))
    await view.go("#/ask")
    page = view.page
    await page.click(f".examples [lang={language}]")
    await page.wait_for_selector(".answer-text")
    seen = asyncio.Event()

    async def hold(route: Route) -> None:
        await seen.wait()
        await route.abort()

    await page.route("**/v1/qa", hold)
    await page.click({"en": "text=Why this answer?", "zh": "text=为什么是这个答案？"}[language])
    bar, timer = page.locator("main progress"), page.get_by_role("timer")
    assert await bar.get_attribute("aria-label")
    assert await bar.get_attribute("value") is None, "nobody knows how far it is"
    first = await timer.inner_text()
    await page.wait_for_function(
        "first => document.querySelector('[role=timer]').textContent !== first", arg=first
    )
    # Read out once, and not every second.
    assert await page.locator("[aria-live] [role=timer], [role=status] [role=timer]").count() == 0
    await assert_accessible(page)
    await assert_fits(page)
    await assert_plain(page)
    seen.set()
    await page.wait_for_selector("[role=alert]")
    await bar.wait_for(state="detached")
    assert await timer.count() == 0
