"""Asking in the page: passages, both languages, both models, and by keyboard alone."""

from __future__ import annotations

import pytest
from playwright.async_api import Route

from tests.web.conftest import Open
from tests.web.looks import assert_accessible, assert_fits, assert_plain

QUESTION = "How high is the tower?"
# A character beyond U+FFFF takes two of JavaScript's units and is one code point.
PASSAGE = "𝔗𝔥𝔢 𠀀𠮷 tower was built in 1904. 🗼🗼 Its height is 84 metres, said the guide 🙂."


@pytest.mark.parametrize(
    ("language", "dark", "phone"), [("en", False, False), ("zh", True, False), ("zh", False, True)]
)
async def test_an_example_is_one_click(visit: Open, language: str, dark: bool, phone: bool) -> None:
    view = await visit(language, dark=dark, phone=phone)
    await view.go("")
    page = view.page
    assert await page.get_attribute("html", "lang") == {"en": "en", "zh": "zh-CN"}[language]
    await assert_accessible(page)
    await page.check(".check input")
    await page.click(f".examples [lang={language}]")
    await page.wait_for_selector(".answer-text")
    assert "776" in await page.inner_text(".answer-text")
    assert await page.inner_text(".source mark") == await page.inner_text(".answer-text")
    assert {"en": "Confidence", "zh": "置信度"}[language] in await page.inner_text(".facts")
    await page.click(".hops summary")
    assert {"en": "Model, stage 1", "zh": "模型第 1 段"}[language] in await page.inner_text(".hops")
    assert await page.locator(".candidate").count() == 5
    await assert_accessible(page)
    await assert_fits(page)
    await assert_plain(page)
    paper = await page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(18, 20, 22)" if dark else "rgb(246, 246, 243)")


async def test_by_keyboard_alone(visit: Open) -> None:
    view = await visit()
    await view.go("#/ask")
    page, keys = view.page, view.page.keyboard

    async def focused(what: str) -> None:
        await page.wait_for_function(
            "what => (document.activeElement.id || document.activeElement.textContent.trim())"
            " === what",
            arg=what,
        )

    await keys.press("Tab")
    await focused("Skip to content")
    await keys.press("Enter")
    await focused("main")
    await keys.press("Tab")
    await keys.press("Tab")
    await focused("question")
    outline = await page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    await keys.type(QUESTION)
    await keys.press("Tab")
    await focused("context")
    await keys.insert_text(PASSAGE)
    await keys.press("Control+Enter")
    await page.wait_for_selector(".answer-text")
    assert "84" in await page.inner_text(".answer-text")
    assert await page.inner_text("mark.best") == await page.inner_text(".answer-text")
    # What appeared is said to those who do not see it.
    await page.wait_for_function(
        "() => document.getElementById('status').textContent.includes('84')"
    )
    for _ in range(20):
        await keys.press("Tab")
        if await page.evaluate("document.activeElement.matches('.candidate:not(:first-child)')"):
            break
        if await page.evaluate("document.activeElement.matches('li + li .candidate')"):
            break
    text = await page.evaluate(
        "document.activeElement.querySelector('.candidate-text').textContent"
    )
    await keys.press("Enter")
    await page.wait_for_function(
        "text => document.querySelector('mark.best').textContent === text", arg=text.strip()
    )


async def test_a_second_time_it_comes_from_the_cache(visit: Open) -> None:
    view = await visit()
    await view.go("#/ask")
    page = view.page
    await page.fill("#question", "When was it built?")
    await page.fill("#context", PASSAGE)
    for said in ("computed just now", "from the cache"):
        await page.click("button.main")
        await page.wait_for_selector(f"text={said}")
    assert "characters" in await page.inner_text("#context-hint")
    assert (await page.inner_text("#context-hint")).startswith(f"{len(PASSAGE)} characters")
    await page.get_by_label("Compute anew").check()
    await page.click("button.main")
    await page.wait_for_selector("text=without the cache >> visible=true")
    await page.wait_for_selector(".fact[data-cache=bypass]")


async def test_what_is_missing_is_said(visit: Open) -> None:
    view = await visit("zh")
    await view.go("#/ask")
    page = view.page
    await page.click("button.main")
    await page.wait_for_selector("[role=alert] >> text=请填写问题。")
    await page.wait_for_function("() => document.activeElement.id === 'question'")
    await page.fill("#question", "什么？")
    await page.click("button.main")
    await page.wait_for_selector("[role=alert] >> text=请提供用来寻找答案的文本。")
    assert await page.get_attribute("#context", "aria-invalid") == "true"
    await assert_accessible(page)


@pytest.mark.parametrize(
    ("language", "said", "wait"),
    [
        ("en", "There is a lot going on right now.", "You can try again in 7 seconds."),
        ("zh", "当前请求较多", "7 秒后可以重试。"),
    ],
)
async def test_an_overloaded_gateway(visit: Open, language: str, said: str, wait: str) -> None:
    """The gateway's words for it; that a real one says so is tested beside its HTTP API."""
    view = await visit(language, expected=("503",))
    await view.go("#/ask")
    page = view.page

    async def refuse(route: Route) -> None:
        await route.fulfill(
            status=503,
            headers={"Retry-After": "7", "Content-Type": "application/problem+json"},
            body='{"type": "/problems/overloaded", "title": "t", "status": 503, "detail": "d", '
            '"instance": "i", "request_id": "abc-123", "errors": []}',
        )

    await page.route("**/v1/qa", refuse)
    await page.click(".examples [lang=en]")
    alert = await page.wait_for_selector("[role=alert]")
    text = await alert.inner_text()
    assert said in text
    assert wait in text
    assert "abc-123" in text
    await assert_plain(page)
    await page.unroute("**/v1/qa")
    await page.click("[role=alert] button")
    await page.wait_for_selector(".answer-text")


async def test_real_refusals_and_no_gateway(visit: Open) -> None:
    view = await visit(expected=("422", "ERR_INTERNET_DISCONNECTED"))
    await view.go("#/ask")
    page = view.page
    await page.fill("#question", "q" * 4_001)
    await page.fill("#context", PASSAGE)
    await page.click("button.main")
    await page.wait_for_selector("text=The question: is too long; at most 4000 characters")
    await assert_plain(page)
    await page.fill("#question", QUESTION)
    await page.context.set_offline(True)
    await page.click("button.main")
    await page.wait_for_selector("text=The gateway cannot be reached.")
    await page.context.set_offline(False)
    await page.click("text=Try again")
    await page.wait_for_selector(".answer-text")


async def test_an_unusual_input_is_warned_of(visit: Open) -> None:
    view = await visit()
    await view.go("#/ask")
    page = view.page

    async def warn(route: Route) -> None:
        response = await route.fetch()
        body = await response.json()
        found = {"kind": "homoglyphs", "message": "m", "score": 0.25}
        await route.fulfill(response=response, json={**body, "warnings": [found]})

    await page.route("**/v1/qa", warn)
    await page.click(".examples [lang=en]")
    note = await page.wait_for_selector(".notice.warn")
    assert "letters that look like others" in await note.inner_text()
    assert "25%" in await note.inner_text()
    await assert_accessible(page)


async def test_languages_and_colours_are_remembered(visit: Open) -> None:
    view = await visit("en")
    await view.go("#/ask")
    page = view.page
    await page.fill("#question", "kept")
    await page.click("#language")
    await page.wait_for_selector("h1 >> text=提出问题")
    assert await page.input_value("#question") == "kept"
    await page.wait_for_function("() => document.activeElement.id === 'language'")
    await page.click("#theme")
    await page.click("#theme")
    assert await page.get_attribute("html", "data-theme") == "dark"
    await page.reload()
    await page.wait_for_selector("h1 >> text=提出问题")
    assert await page.get_attribute("html", "data-theme") == "dark"
    await page.click("#language")
    await page.wait_for_function("() => document.title === 'Ask · Miaotui 秒推'")


async def test_no_sign_before_nothing(visit: Open) -> None:
    view = await visit()
    await view.go("#/ask")
    shown = await view.page.evaluate(
        """async () => {
          const {fine, number, percent, signed} = await import("/web/core/i18n.js");
          const values = [-0.004, -0, 0.004, -0.006, 0.006, -1234.5];
          return [fine, signed, number, percent].map((write) => values.map(write));
        }"""
    )
    assert shown == [
        ["0.00", "0.00", "0.00", "−0.01", "0.01", "−1,234.50"],
        ["0.00", "0.00", "0.00", "−0.01", "+0.01", "−1,234.50"],
        ["0", "0", "0", "0", "0", "−1,234.5"],
        ["−0.4%", "0%", "0.4%", "−0.6%", "0.6%", "−123,450%"],
    ]


async def test_both_languages_have_all_words(visit: Open) -> None:
    view = await visit()
    await view.go("#/ask")
    keys = await view.page.evaluate(
        """async () => {
          const [{en}, {zh}] = [await import("/web/words/en.js"), await import("/web/words/zh.js")];
          const flat = (words, at = "") => Object.entries(words).flatMap(([key, value]) =>
            typeof value === "string" ? [[at + key, value]] : flat(value, at + key + "."));
          return [flat(en), flat(zh)];
        }"""
    )
    english, chinese = (dict(words) for words in keys)
    assert list(english) == list(chinese)
    assert len(english) > 300
    for key, words in english.items():
        assert sorted(_slots(words)) == sorted(_slots(chinese[key])), key


def _slots(words: str) -> list[str]:
    return [part.split("}")[0] for part in words.split("{")[1:]]
