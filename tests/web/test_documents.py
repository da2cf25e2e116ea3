"""Documents in the page: a mixed folder is added, and ten questions are answered with sources."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from playwright.async_api import Page, Route

from tests.encoder import EncoderStage
from tests.gateway.test_documents_mixed import FOLDER, QUESTIONS
from tests.web.conftest import Open, Site, client_of, one_more_gateway
from tests.web.looks import assert_accessible, assert_fits, assert_plain


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, data in FOLDER.items():
        path = tmp_path / "library" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "library"


async def test_ten_questions_to_a_mixed_folder(visit: Open, site: Site, folder: Path) -> None:
    view = await visit("zh", dark=True)
    await view.go("#/documents")
    page = view.page
    await page.wait_for_selector(".empty")
    await assert_accessible(page)
    await page.set_input_files("#folder", folder)
    await page.wait_for_selector(".list tbody tr:nth-child(8)")
    await page.wait_for_function(
        "() => document.getElementById('status').textContent.includes('8 个文件已在文档集中')"
    )
    added = await page.locator(".uploads li").all_inner_texts()
    assert len(added) == 9
    assert sum("已添加" in line for line in added) == 8
    (refused,) = [line for line in added if "picture.png" in line]
    assert "未添加: 只能读取文本" in refused.replace("\n", " ")
    await assert_accessible(page)
    await assert_plain(page)

    await view.go("#/ask?collection=default")
    await page.wait_for_selector("option >> text=8 份文档", state="attached")
    wrong = []
    for question, expected, source, number, heading in QUESTIONS:
        await page.fill("#question", question)
        async with page.expect_response("**/v1/qa"):
            await page.click("button.main")
        await page.wait_for_selector(".outcome:not(.waiting) .citation")
        cited = await page.inner_text(".citation")
        marked = await page.inner_text(".cited mark")
        places = [f"第 {number} 页"] if number else []
        places += [f"“{heading}”"] if heading else []
        if expected not in marked or not all(part in cited for part in (source, *places)):
            wrong.append((question, marked, cited))
        assert marked == await page.inner_text(".answer-text")
    assert wrong == []
    await assert_accessible(page)

    # The citation leads to the same characters of the document.
    address = await page.get_attribute(".citation a", "href")
    assert address is not None
    place = urlsplit(address.removeprefix("#"))
    start, end = (int(parse_qs(place.query)[name][0]) for name in ("start", "end"))
    async with client_of(site.url) as client:
        document = (await client.get(f"/v1{place.path}")).json()
    await page.click(".citation a")
    await page.wait_for_selector(".tall mark")
    assert await page.inner_text(".tall mark") == document["text"][start:end]
    await assert_accessible(page)

    await view.go("#/ask?collection=default")
    await page.fill("#question", "月球的直径是多少？")
    await page.click("button.main")
    await page.wait_for_selector("text=您的文档中似乎没有提到。")


async def test_dropped_added_again_and_deleted(visit: Open) -> None:
    view = await visit(phone=True)
    await view.go("#/documents")
    page = view.page
    await page.fill("#new-collection", "phone notes")
    await page.press("#new-collection", "Enter")
    await page.wait_for_selector("text=A new collection")
    drop = """(texts) => {
      const transfer = new DataTransfer();
      for (const [name, text] of texts) transfer.items.add(new File([text], name));
      document.querySelector(".drop")
        .dispatchEvent(new DragEvent("drop", {dataTransfer: transfer, bubbles: true}));
    }"""
    texts = [["a.txt", "The bridge is 90 metres long."], ["空.txt", " "]]
    await page.evaluate(drop, texts)
    await page.wait_for_selector(".list tbody tr")
    await page.wait_for_selector("text=not taken: it holds no text")
    said = await page.locator(".upload-state").all_inner_texts()
    assert said == ["added", "not taken: it holds no text"]
    await page.evaluate(drop, texts[:1])
    await page.wait_for_selector("text=was here already")
    await page.click("text=Clear finished")
    assert await page.locator(".uploads li").count() == 0
    await assert_fits(page)
    await assert_accessible(page)

    await page.click(".list button")
    await page.wait_for_selector("dialog[open]")
    await assert_accessible(page)
    await page.keyboard.press("Escape")
    assert await page.locator(".list tbody tr").count() == 1
    await page.click(".list button")
    await page.click("dialog .danger")
    await page.wait_for_selector("text=No documents yet.")


async def test_a_name_that_no_collection_may_have(visit: Open) -> None:
    view = await visit(expected=("422", "404"))
    await view.go("#/documents")
    page = view.page
    await page.fill("#new-collection", "a/b")
    await page.click("text=Create")
    await page.set_input_files(
        "#files", [{"name": "a.txt", "mimeType": "text/plain", "buffer": b"text"}]
    )
    await page.wait_for_selector("text=failed: Something is missing or not right.")
    assert "a collection’s name has letters" in await page.inner_text(".uploads")
    await assert_plain(page)


_COUNTED = """() => {
  const {fetch} = window;
  window.looks = 0;
  window.fetch = (...all) => {
    if (String(all[0]).includes("/v1/collections")) window.looks += 1;
    return fetch(...all);
  };
  Object.defineProperty(document, "hidden", {get: () => window.away === true});
}"""
_SHOWN = """(shown) => {
  window.away = !shown;
  document.dispatchEvent(new Event("visibilitychange"));
  return window.looks;
}"""


async def looks_in_a_minute(page: Page) -> int:
    """How often the page looks at the collections when a minute of its clock goes by at once."""
    before: int = await page.evaluate("looks")
    await page.clock.run_for(60_000)
    after: int = await page.evaluate("looks")
    return after - before


async def test_the_view_follows_the_encoder(visit: Open, site: Site, tmp_path: Path) -> None:
    stage = EncoderStage(tmp_path)
    encoding = {"MIAOTUI_GATEWAY_ENCODER_STAGES": stage.address}
    async with one_more_gateway(site.cluster, tmp_path, encoding) as url:
        view = await visit(url=url)
        page = view.page
        await page.clock.install()
        await view.go("#/documents")
        await page.evaluate(_COUNTED)
        text = {"name": "a.txt", "mimeType": "text/plain", "buffer": b"The bridge is long."}
        await page.set_input_files("#files", [text])
        await page.wait_for_selector("text=1 passage is found by its words only until")
        assert await page.get_attribute(".encoding progress", "value") == "0"
        assert await page.get_attribute(".encoding progress", "max") == "1"
        await assert_accessible(page)

        # Nobody looks: it asks for nothing.
        await page.evaluate(_SHOWN, False)
        assert await looks_in_a_minute(page) == 0
        await page.evaluate(_SHOWN, True)

        stage.start()
        try:
            await page.wait_for_selector(".encoding progress", state="detached")
        finally:
            stage.stop()
        assert "1 of them are also found by meaning" in await page.inner_text("#summary")
        await page.wait_for_function(
            "() => document.getElementById('status').textContent.includes('read for their meaning')"
        )
        assert await looks_in_a_minute(page) == 0


async def test_progress_is_said_by_quarters(visit: Open) -> None:
    """The gateway's words for it; that a real one counts so is tested above."""
    view = await visit("zh", phone=True)
    page = view.page
    counts = {"name": "default", "documents": 1, "passages": 12, "vectors": 0, "waiting": 10}
    bodies: dict[str, Any] = {
        "collections": {"collections": [counts], "encoder": "serving"},
        "documents": {"collection": "default", "documents": [], "next": None},
    }

    async def answer(route: Route) -> None:
        body = bodies["documents" if "/v1/documents" in route.request.url else "collections"]
        await route.fulfill(body=json.dumps(body), content_type="application/json")

    await page.route("**/v1/collections", answer)
    await page.route("**/v1/documents?*", answer)
    await page.clock.install()
    await view.go("#/documents")
    await page.wait_for_selector("text=10 个段落正在建立语义索引")
    await assert_fits(page)
    for made, said in ((3, "语义索引已完成 25%。"), (8, "语义索引已完成 75%。")):
        counts |= {"vectors": made, "waiting": 10 - made}
        await page.clock.run_for(2_000)
        await page.wait_for_function(
            "said => document.getElementById('status').textContent === said", arg=said
        )
        assert await page.evaluate("document.querySelector('.encoding progress').value") == made
    counts |= {"vectors": 10, "waiting": 0}
    await page.clock.run_for(2_000)
    await page.wait_for_function(
        "() => document.getElementById('status').textContent === '语义索引已完成。'"
    )
    assert await page.locator(".encoding progress").count() == 0
