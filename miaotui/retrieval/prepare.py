"""A document's way from bytes to what a collection keeps. All of its slow work is here, so
that it can run in another process: everything that comes out can be pickled."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from miaotui.retrieval.passages import split_passages
from miaotui.retrieval.reading import Extracted, Limits, read_document
from miaotui.retrieval.terms import Terms, chinese_share, count_terms


@dataclass(frozen=True, slots=True)
class PreparedPassage:
    """A passage: characters `start` to `end` of the document's text, and its terms."""

    start: int
    end: int
    terms: Terms
    chinese: float
    """Share of Chinese characters."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A document, read and cut; `sha256` is of what was given, before any reading."""

    source: str
    sha256: str
    size: int
    extracted: Extracted
    passages: tuple[PreparedPassage, ...]


def prepare_file(source: str, data: bytes, limits: Limits | None = None) -> Prepared:
    """Reads a file; the end of `source` says of which kind. Raises `UnreadableError`."""
    extracted = read_document(source, data, limits)
    return _prepare(source, sha256_of(data), len(data), extracted)


def prepare_text(source: str, text: str, title: str = "") -> Prepared:
    """Takes a text as it is, so that offsets in it hold."""
    data = text.encode("utf-8", "surrogatepass")
    return _prepare(source, sha256_of(data), len(data), Extracted(text, title))


def sha256_of(data: bytes) -> str:
    """What tells a document's versions apart."""
    return hashlib.sha256(data).hexdigest()


def _prepare(source: str, sha256: str, size: int, extracted: Extracted) -> Prepared:
    passages = []
    for span in split_passages(extracted):
        text = extracted.text[span.start : span.end]
        passages.append(
            PreparedPassage(span.start, span.end, count_terms(text), chinese_share(text))
        )
    return Prepared(source, sha256, size, extracted, tuple(passages))
