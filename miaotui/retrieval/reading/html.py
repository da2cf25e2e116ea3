"""HTML, and Markdown by way of it."""

from __future__ import annotations

import re
from html.parser import HTMLParser

from markdown_it import MarkdownIt

from miaotui.retrieval.reading.document import Extracted, Limits, TextBuilder
from miaotui.retrieval.reading.encoding import decode

_CHARSET = re.compile(rb"""<meta[^>]{0,200}?charset\s*=\s*["']?([A-Za-z0-9_.:-]{1,40})""", re.I)
_FRONT_MATTER = re.compile(r"\A---[ \t]*\r?\n.*?\r?\n(?:---|\.\.\.)[ \t]*\r?\n", re.S)
# What a page shows beside its content, or does not show at all.
_SKIPPED_TAGS = "script style template noscript nav svg math iframe object"
_BLOCK_TAGS = (
    "address article aside blockquote body dd details dialog div dl dt fieldset figcaption figure "
    "footer form header hr html li main ol p pre section summary table tr ul caption"
)
_SKIPPED = frozenset(_SKIPPED_TAGS.split())
_BLOCKS = frozenset(_BLOCK_TAGS.split())
_CELLS = frozenset(("td", "th"))
_HEADING = re.compile(r"h[1-6]")


def read_html(data: bytes, limits: Limits) -> Extracted:
    """The text that a page shows. Raises `UnreadableError`."""
    declared = _CHARSET.search(data, 0, 4096)
    text, _ = decode(data, declared.group(1).decode("ascii") if declared else "")
    return html_text(text, limits)


def read_markdown(data: bytes, limits: Limits) -> Extracted:
    """The text as it is shown, without the marks. Raises `UnreadableError`."""
    source = _FRONT_MATTER.sub("", decode(data)[0])
    return html_text(MarkdownIt("commonmark").enable("table").render(source), limits)


def html_text(source: str, limits: Limits) -> Extracted:
    """The text that HTML shows. Raises `UnreadableError` where it is too long."""
    reader = _Reader(limits)
    reader.feed(source)
    reader.close()
    return reader.result()


class _Reader(HTMLParser):
    def __init__(self, limits: Limits) -> None:
        super().__init__(convert_charrefs=True)
        self._builder = TextBuilder(limits)
        self._text: list[str] = []
        self._skipping: list[str] = []
        self._heading = 0
        self._preformatted = 0
        self._in_title = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _SKIPPED:
            self._skipping.append(tag)
        elif tag == "title":
            self._in_title = True
        elif tag == "br":
            self._text.append("\n")
        elif tag in _CELLS:
            self._text.append("\t")
        elif _HEADING.fullmatch(tag):
            self._end_block()
            self._heading = int(tag[1])
        elif tag in _BLOCKS:
            self._end_block()
            self._preformatted += tag == "pre"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in _SKIPPED:
            self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        if tag in self._skipping:
            while self._skipping.pop() != tag:
                pass
        elif tag == "title":
            self._in_title = False
        elif _HEADING.fullmatch(tag) or tag in _BLOCKS:
            self._end_block()
            self._preformatted -= tag == "pre" and self._preformatted > 0
            if tag in ("body", "html"):
                self._skipping.clear()  # something was never closed

    def handle_data(self, data: str) -> None:
        if self._in_title:
            self._builder.title = " ".join(f"{self._builder.title} {data}".split())
        elif not self._skipping:
            self._text.append(data if self._preformatted else re.sub(r"[ \t\r\n\f]+", " ", data))

    def _end_block(self) -> None:
        text = "".join(self._text)
        self._text.clear()
        if not self._preformatted:
            text = re.sub(r" *([\t\n]) *", r"\1", re.sub(r" {2,}", " ", text))
        if self._heading:
            self._builder.heading(self._heading, text)
            self._heading = 0
        else:
            self._builder.paragraph(text)

    def result(self) -> Extracted:
        self._end_block()
        return self._builder.result()
