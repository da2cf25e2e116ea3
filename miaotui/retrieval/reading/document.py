"""What is read from a document: its text, and where its headings and pages begin."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from miaotui.retrieval.errors import UnreadableError


@dataclass(frozen=True, slots=True)
class Limits:
    """What one document may cost."""

    max_bytes: int = 64 * 1024 * 1024
    max_characters: int = 5_000_000
    max_pages: int = 5_000


@dataclass(frozen=True, slots=True)
class Heading:
    """A heading at a character offset of the text; level 1 is the highest."""

    start: int
    level: int
    text: str


@dataclass(frozen=True, slots=True)
class Extracted:
    """A document's text. All offsets count Unicode code points of `text`.

    `pages`: offset of each page's first character, empty where there are no pages.
    """

    text: str
    title: str = ""
    headings: tuple[Heading, ...] = ()
    pages: tuple[int, ...] = ()

    def page_at(self, offset: int) -> int | None:
        """The page (from 1) on which a character stands; `None` where there are no pages."""
        return page_at(self.pages, offset)

    def heading_at(self, offset: int) -> str:
        """The headings above a character, outermost first: "Guide › Install"; or empty."""
        return heading_at(self.headings, offset)


def page_at(pages: Sequence[int], offset: int) -> int | None:
    """See `Extracted.page_at`."""
    return max(1, bisect_right(pages, offset)) if pages else None


def heading_at(headings: Sequence[Heading], offset: int) -> str:
    """See `Extracted.heading_at`."""
    path: list[str] = []
    level = 10
    for heading in reversed(headings[: bisect_right(headings, offset, key=lambda h: h.start)]):
        if heading.level < level:
            path.append(heading.text)
            level = heading.level
    return " › ".join(reversed(path))


class TextBuilder:
    """Puts paragraphs together, an empty line between them, and notes where things begin."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._parts: list[str] = []
        self._length = 0
        self._headings: list[Heading] = []
        self._pages: list[int] = []
        self.title = ""

    def paragraph(self, text: str) -> None:
        """Adds a paragraph; one of nothing but white space is left out."""
        text = text.strip()
        if not text:
            return
        if self._parts:
            self._append("\n\n")
        self._append(text)

    def heading(self, level: int, text: str) -> None:
        """Adds a heading, on one line."""
        text = " ".join(text.split())
        if not text:
            return
        if self._parts:
            self._append("\n\n")
        self._headings.append(Heading(self._length, level, text))
        self._append(text)

    def page(self) -> None:
        """What is added from here on stands on the next page."""
        # The page's first character comes after the empty line.
        self._pages.append(self._length + (2 if self._parts else 0))

    def _append(self, text: str) -> None:
        self._length += len(text)
        if self._length > self._limits.max_characters:
            raise too_long(self._limits)
        self._parts.append(text)

    def result(self) -> Extracted:
        """All of it."""
        title = self.title or next((h.text for h in self._headings if h.level == 1), "")
        pages = [min(page, self._length) for page in self._pages]
        return Extracted("".join(self._parts), title, tuple(self._headings), tuple(pages))


def too_long(limits: Limits) -> UnreadableError:
    """The error for a document of too many characters."""
    return UnreadableError(
        f"it holds more than {limits.max_characters:,} characters; split it into several files"
    )
