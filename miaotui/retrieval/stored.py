"""What a store gives back, and how it writes what has no columns of its own."""

from __future__ import annotations

import json
import zlib
from dataclasses import asdict, dataclass

from miaotui.retrieval.reading import Extracted, Heading

# Of a `Document`, in its fields' order, in both stores' tables.
DOCUMENT_COLUMNS = "d.id, d.source, d.title, d.sha256, d.size, d.characters, d.passages, d.added"


@dataclass(frozen=True, slots=True)
class Document:
    """A document of a collection. `added`: seconds since 1970, of this version."""

    id: str
    source: str
    title: str
    sha256: str
    size: int
    characters: int
    passages: int
    added: float


@dataclass(frozen=True, slots=True)
class Marks:
    """Where a document's headings and pages begin, as in `Extracted`."""

    headings: tuple[Heading, ...]
    pages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StoredPassage:
    """A passage: characters `start` to `end` of its document's text."""

    id: int
    document: Document
    marks: Marks
    start: int
    end: int
    text: str
    chinese: float


def written_marks(extracted: Extracted) -> str:
    """A document's headings and pages as JSON."""
    marks = {"pages": extracted.pages, "headings": [asdict(h) for h in extracted.headings]}
    return json.dumps(marks)


def read_marks(written: str) -> Marks:
    """The inverse of `written_marks`."""
    marks = json.loads(written)
    return Marks(tuple(Heading(**h) for h in marks["headings"]), tuple(marks["pages"]))


def compressed(text: str) -> bytes:
    """A text, whatever characters it has."""
    return zlib.compress(text.encode("utf-8", "surrogatepass"), 6)


def decompressed(data: bytes) -> str:
    """The inverse of `compressed`."""
    return zlib.decompress(data).decode("utf-8", "surrogatepass")
