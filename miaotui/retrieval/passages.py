"""Cutting a text into passages, at headings, pages, paragraphs and sentences.

Each passage is a run of the text, so that offsets in one are offsets in the other. Lengths
are counted in units that come close to a model's tokens: a Chinese character is one, a word
of letters one for each six of its letters begun, any other sign one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from miaotui.retrieval.reading import Extracted

# Part of what a store keeps: raise it whenever equal text may be cut differently.
PASSAGES_VERSION = 1


@dataclass(frozen=True, slots=True)
class PassageBounds:
    """Lengths in units. With a question, the longest fits into a window of 384 tokens."""

    longest: int = 256
    overlap: int = 40
    """What a passage repeats of the one before, in whole sentences, inside of a paragraph."""
    section: int = 64
    """A passage shorter than this goes on over a heading or the end of a page."""
    paragraph: int = 192
    """A passage longer than this ends with its paragraph."""


@dataclass(frozen=True, slots=True)
class Span:
    """Characters `start` to `end` of a text."""

    start: int
    end: int


_UNIT = re.compile(
    "[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U000323af]"
    "|\\d{1,3}|[^\\W\\d_\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
    "\U00020000-\U000323af]{1,6}|[^\\w\\s]|_"
)
_PARAGRAPH = re.compile(r"[^\r\n\u2028\u2029]+")
_SENTENCE_END = re.compile(
    r"[。！？!?…]+[”’\"'』」）)\]]*\s*|\.[\"'”’)\]]*\s+(?=[^\s\W\da-z_]|[\"'“‘(\[\d])|[；;]\s*"
)
_CLAUSE_END = re.compile(r"[，,、：:]\s*|\s+")

_SENTENCE, _PARAGRAPH_BREAK, _SECTION = 0, 1, 2


@dataclass(frozen=True, slots=True)
class _Piece:
    """A sentence or a part of one; `rank` says what begins with it."""

    start: int
    end: int
    units: int
    rank: int


def count_units(text: str) -> int:
    """The text's length in units."""
    return sum(1 for _ in _UNIT.finditer(text))


def split_passages(document: Extracted, bounds: PassageBounds | None = None) -> list[Span]:
    """The document's passages in their order, without white space around them."""
    bounds = bounds or PassageBounds()
    sections = {heading.start for heading in document.headings} | set(document.pages)
    passages: list[Span] = []
    current: list[_Piece] = []
    for piece in _pieces(document.text, sections, bounds.longest):
        units = sum(p.units for p in current)
        if current and _ends_before(piece, units, bounds):
            passages.append(Span(current[0].start, current[-1].end))
            overlaps = piece.rank == _SENTENCE
            room = min(bounds.overlap, bounds.longest - piece.units)
            current = _overlap(current, room) if overlaps else []
        current.append(piece)
    if current:
        passages.append(Span(current[0].start, current[-1].end))
    return passages


def _ends_before(piece: _Piece, units: int, bounds: PassageBounds) -> bool:
    if units + piece.units > bounds.longest:
        return True
    if piece.rank == _SECTION:
        return units >= bounds.section
    return piece.rank == _PARAGRAPH_BREAK and units >= bounds.paragraph


def _overlap(pieces: Sequence[_Piece], room: int) -> list[_Piece]:
    """The last pieces that have room, but never all."""
    first = len(pieces)
    while first > 1 and pieces[first - 1].units <= room:
        first -= 1
        room -= pieces[first].units
    return list(pieces[first:])


def _pieces(text: str, sections: set[int], longest: int) -> Iterator[_Piece]:
    begins = iter(sorted(sections))
    begin = next(begins, len(text) + 1)
    for paragraph in _PARAGRAPH.finditer(text):
        rank = _PARAGRAPH_BREAK
        while begin <= paragraph.start():
            rank = _SECTION
            begin = next(begins, len(text) + 1)
        for start, end in _cut(text, paragraph.start(), paragraph.end(), _SENTENCE_END):
            for span in _bounded(text, start, end, longest):
                yield _Piece(span.start, span.end, count_units(text[span.start : span.end]), rank)
                rank = _SENTENCE


def _bounded(text: str, start: int, end: int, longest: int) -> Iterator[Span]:
    """The sentence, or parts of it that are short enough: clauses, words, else characters."""
    span = _stripped(text, start, end)
    if span is None:
        return
    if count_units(text[span.start : span.end]) <= longest:
        yield span
        return
    begin, units = span.start, 0
    for clause_start, clause_end in _cut(text, span.start, span.end, _CLAUSE_END):
        ends = [clause_start + m.end() for m in _UNIT.finditer(text[clause_start:clause_end])]
        if units and units + len(ends) > longest:
            if (part := _stripped(text, begin, clause_start)) is not None:
                yield part
            begin, units = clause_start, 0
        whole = max(0, (len(ends) - 1) // longest)
        for cut in ends[longest - 1 : whole * longest : longest]:
            yield Span(begin, cut)
            begin = cut
        units += len(ends) - whole * longest
    if (part := _stripped(text, begin, span.end)) is not None:
        yield part


def _cut(text: str, start: int, end: int, ends: re.Pattern[str]) -> Iterator[tuple[int, int]]:
    begin = start
    for match in ends.finditer(text, start, end):
        yield begin, match.end()
        begin = match.end()
    if begin < end:
        yield begin, end


def _stripped(text: str, start: int, end: int) -> Span | None:
    part = text[start:end]
    left = len(part) - len(part.lstrip())
    right = len(part.rstrip())
    return Span(start + left, start + right) if left < right else None
