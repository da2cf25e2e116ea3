"""A gateway that wants keys, and one gateway's page that asks another."""

from __future__ import annotations

from gateway.access.keys import Limits, Rate, make_key
from tests.web.conftest import Open, Site, client_of
from tests.web.looks import assert_accessible, assert_fits, assert_plain


async def test_the_key_is_asked_for_kept_and_limited(visit: Open, site: Site) -> None:
    limits = Limits(rate=Rate(count=8, seconds=6000))
    key, secret = make_key("reader", limits=limits)
    site.keys.add(key)
    view = await visit(url=site.guarded_url, expected=("401", "429"))
    await view.go("#/ask")
    page = view.page
    await page.wait_for_selector("dialog[open]")
    assert "This gateway wants a key" in await page.inner_text("dialog")
    await assert_accessible(page)
    await page.fill("#api-key", "wrong")
    await page.keyboard.press("Enter")
    await page.wait_for_selector("text=The gateway did not accept this key.")
    await page.fill("#api-key", secret)
    await page.click("text=Use the key")
    await page.click(".examples [lang=en]")
    await page.wait_for_selector(".answer-text")
    stored = await page.evaluate("[sessionStorage.length, JSON.stringify(localStorage)]")
    assert stored[0] == 1
    assert secret not in stored[1]

    for turn in range(8):
        await page.fill("#question", f"Where does it begin, {turn}?")
        async with page.expect_response("**/v1/qa") as answered:
            await page.click("button.main")
        if (await answered.value).status == 429:
            break
    await page.wait_for_selector("text=Too much was asked at once.")
    assert "You can try again in" in await page.inner_text("[role=alert]")
    await assert_plain(page)


async def test_without_a_key_it_says_so(visit: Open, site: Site) -> None:
    view = await visit("zh", url=site.guarded_url, expected=("401",))
    await view.go("#/ask")
    page = view.page
    await page.wait_for_selector("dialog[open]")
    await page.keyboard.press("Escape")
    await page.click(".examples [lang=zh]")
    await page.wait_for_selector("dialog[open]")
    await page.keyboard.press("Escape")
    await page.wait_for_selector("text=需要网关接受的 API 密钥。")
    await page.wait_for_selector("header button[title='API 密钥']")


async def test_the_description_takes_a_key(visit: Open, site: Site) -> None:
    key, secret = make_key("trier")
    site.keys.add(key)
    view = await visit(url=site.guarded_url, phone=True, dark=True, expected=("401",))
    await view.go("docs")
    page = view.page
    await page.wait_for_selector("#key")
    await page.click("summary:has-text('POST /v1/qa Answer')")
    trial = page.locator("details[open]")
    assert "Needs an API key." in await trial.inner_text()
    await assert_accessible(page)
    await assert_fits(page)
    for given, told in (
        ("", "Give an API key above.\n\n401 "),
        ("wrong", "The gateway did not accept the key above.\n\n401 "),
        (secret, "200 application/json"),
    ):
        await page.fill("#key", given)
        async with page.expect_response("**/v1/qa"):
            await trial.get_by_role("button", name="Try it").click()
        shown = page.locator("details[open] [role=status]", has_text=told)
        await shown.wait_for()
    assert secret not in await page.evaluate("JSON.stringify(localStorage)")

    # The page knows it, too, and the other way round; where none is wanted, none is asked for.
    await page.get_by_role("link", name="Miaotui", exact=True).click()
    await page.wait_for_selector("h1 >> text=Ask a question")
    await page.wait_for_selector("header button[title='API key']")
    await view.go("docs")
    await page.wait_for_selector("#key")
    assert await page.input_value("#key") == secret
    await page.goto(f"{site.url}/docs")
    await page.wait_for_selector("details")
    assert await page.locator("#key").is_hidden()
    assert "Needs an API key." not in await page.inner_text("main")


async def test_compare_with_another_gateway(visit: Open, site: Site) -> None:
    key, secret = make_key("neighbour")
    site.keys.add(key)
    view = await visit(expected=("401", "ERR_FAILED", "CORS", "Content Security Policy", "blocked"))
    await view.go("#/compare")
    page = view.page
    await page.wait_for_selector("#compare-left")
    await page.click("text=Another gateway")
    for address, said in (
        ("nonsense", "This is not an address."),
        ("http://example.invalid", "This page may talk to gateways on its own host only."),
        (site.guarded_url, "This needs an API key that the gateway accepts."),
    ):
        await page.fill("#other-url", address)
        await page.get_by_role("button", name="Add", exact=True).click()
        await page.wait_for_selector(f"details >> text={said}")
    await page.fill("#other-key", secret)
    await page.get_by_role("button", name="Add", exact=True).click()
    await page.wait_for_selector("#compare-right option >> nth=2", state="attached")
    other = site.guarded_url.removeprefix("http://")
    await page.select_option("#compare-right", label=f"qa · finds answers · {other}")
    await page.click("text=Example in English")
    await page.click("button.main")
    await page.wait_for_selector(".verdict")
    assert "Both give the same answer." in await page.inner_text(".verdict")
    assert await page.locator(".columns mark").all_inner_texts() == ["1,776 kilometres"] * 2


async def test_only_named_origins_may_ask(site: Site) -> None:
    asked = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    async with client_of(site.guarded_url) as client:
        known = await client.options("/v1/qa", headers={**asked, "Origin": site.url})
        assert known.headers["access-control-allow-origin"] == site.url
        other = await client.options("/v1/qa", headers={**asked, "Origin": "http://other.example"})
        assert "access-control-allow-origin" not in other.headers
    async with client_of(site.url) as client:
        closed = await client.get("/v1/models", headers={"Origin": site.guarded_url})
        assert "access-control-allow-origin" not in closed.headers
