"""What each view must be like, whatever it shows."""

from __future__ import annotations

from typing import Any

from axe_playwright_python.base import AXE_SCRIPT  # type: ignore[import-untyped]
from playwright.async_api import Page

_RUN = """() => axe.run(document, {resultTypes: ["violations"], runOnly: {type: "tag",
    values: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]}})"""


async def assert_accessible(page: Page) -> None:
    """Fails with axe's findings (WCAG 2.2 AA and its makers' advice)."""
    if not await page.evaluate("typeof axe === 'object'"):
        await page.evaluate(AXE_SCRIPT)
    report: dict[str, Any] = await page.evaluate(_RUN)
    found = [
        f"{rule['id']}: {rule['help']}\n  "
        + "\n  ".join(f"{node['html'][:160]} {node['failureSummary'][:300]}"
                      for node in rule["nodes"][:4])
        for rule in report["violations"]
    ]  # fmt: skip
    assert found == [], "\n".join(found)


async def assert_fits(page: Page) -> None:
    """Fails where the page is wider than the window."""
    wider: list[str] = await page.evaluate(
        """() => {
          const most = document.documentElement.clientWidth;
          if (document.documentElement.scrollWidth <= most) return [];
          return [...document.querySelectorAll("body *")]
            .filter((one) => one.getBoundingClientRect().right > most + 1)
            .map((one) => one.outerHTML.slice(0, 90)).slice(0, 5);
        }"""
    )
    assert wider == []


async def assert_plain(page: Page) -> None:
    """Fails where the page shows the raw stuff of programs."""
    text = await page.inner_text("body")
    for raw in ("{", "undefined", "NaN", "[object", "application/", "Error:"):
        assert raw not in text, (raw, text[max(0, text.find(raw) - 80) :][:200])


async def contrast_of(page: Page, selector: str) -> float:
    """Contrast (WCAG) of an element's text with the page's background."""
    ratio: float = await page.evaluate(
        """(selector) => {
          const light = (text) => {
            const [r, g, b] = text.match(/[\\d.]+/g).map(Number).map((v) => v / 255)
              .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          const ink = light(getComputedStyle(document.querySelector(selector)).color);
          const paper = light(getComputedStyle(document.body).backgroundColor);
          return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
        }""",
        selector,
    )
    return ratio
