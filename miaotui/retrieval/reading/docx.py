"""Word documents (Office Open XML, ECMA-376): a zip of XML, of which little is needed."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from io import BytesIO
from xml.etree import ElementTree
from zipfile import BadZipFile, ZipFile
from zlib import error as ZlibError

from miaotui.retrieval.errors import UnreadableError
from miaotui.retrieval.reading.document import Extracted, Limits, TextBuilder

_W = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"
_FALLBACK = "{http://schemas.openxmlformats.org/markup-compatibility/2006}Fallback"
_DC = "{http://purl.org/dc/elements/1.1/}"
_DOCUMENT, _STYLES, _CORE = "word/document.xml", "word/styles.xml", "docProps/core.xml"
# What reading a zip file that is damaged, or encrypted, has been seen to raise.
_DAMAGE = (
    BadZipFile, ZlibError, struct.error, ValueError, KeyError, RuntimeError, EOFError, OSError,
)  # fmt: skip
_WHITE = {"tab": "\t", "br": "\n", "cr": "\n", "noBreakHyphen": "-"}


def read_docx(data: bytes, limits: Limits) -> Extracted:
    """Paragraphs, headings and tables, as they stand. Raises `UnreadableError`."""
    try:
        with ZipFile(BytesIO(data)) as archive:
            names = set(archive.namelist())
            if _DOCUMENT not in names:
                raise UnreadableError("it is a zip file, but not a Word document (.docx)")
            parts = {
                name: _part(archive, name, limits)
                for name in (_DOCUMENT, _STYLES, _CORE)
                if name in names
            }
    except UnreadableError:
        raise
    except _DAMAGE:
        raise UnreadableError("the file is damaged, encrypted, or not a .docx") from None
    builder = TextBuilder(limits)
    if _CORE in parts:
        builder.title = " ".join((parts[_CORE].findtext(f"{_DC}title") or "").split())
    body = parts[_DOCUMENT].find(f"{_W}body")
    if body is not None:
        _read(body, _heading_styles(parts.get(_STYLES)), builder)
    return builder.result()


def _part(archive: ZipFile, name: str, limits: Limits) -> ElementTree.Element:
    with archive.open(name) as part:
        data = part.read(limits.max_bytes + 1)
    if len(data) > limits.max_bytes:
        raise UnreadableError(f"unpacked it has more than {limits.max_bytes:,} bytes")
    if b"<!DOCTYPE" in data or b"<!ENTITY" in data:
        # Word writes none, and entities can be made to explode.
        raise UnreadableError("its XML holds a document type, which no .docx has")
    try:
        return ElementTree.fromstring(data)
    except ElementTree.ParseError:
        raise UnreadableError("the file is damaged: its XML cannot be parsed") from None


def _heading_styles(styles: ElementTree.Element | None) -> dict[str, int]:
    """Ids of the heading styles and their levels."""
    found: dict[str, int] = {}
    for style in styles.iter(f"{_W}style") if styles is not None else ():
        name = style.find(f"{_W}name")
        label = name.get(f"{_W}val", "").lower() if name is not None else ""
        outline = style.find(f"{_W}pPr/{_W}outlineLvl")
        identifier = style.get(f"{_W}styleId", "")
        if match := re.fullmatch(r"heading ([1-9])", label):
            found[identifier] = int(match.group(1))
        elif label == "title":
            found[identifier] = 1
        elif outline is not None and outline.get(f"{_W}val", "").isdecimal():
            found[identifier] = int(outline.get(f"{_W}val", "")) + 1
    return found


def _read(body: ElementTree.Element, styles: dict[str, int], builder: TextBuilder) -> None:
    for element in body:
        if element.tag == f"{_W}p":
            text = "".join(_runs(element))
            style = element.find(f"{_W}pPr/{_W}pStyle")
            level = styles.get(style.get(f"{_W}val", ""), 0) if style is not None else 0
            if 1 <= level <= 6:
                builder.heading(level, text)
            else:
                builder.paragraph(text)
        elif element.tag == f"{_W}tbl":
            for row in element.iter(f"{_W}tr"):
                cells = (" ".join("".join(_runs(cell)).split()) for cell in row.iterfind(f"{_W}tc"))
                builder.paragraph("\t".join(cells))
        else:  # content controls and the like hold further paragraphs
            inner = element.find(f"{_W}sdtContent")
            _read(element if inner is None else inner, styles, builder)


def _runs(element: ElementTree.Element) -> Iterator[str]:
    for child in element:
        if child.tag == f"{_W}t":
            yield child.text or ""
        elif child.tag.startswith(_W) and child.tag[len(_W) :] in _WHITE:
            yield _WHITE[child.tag[len(_W) :]]
        elif child.tag != _FALLBACK and child.tag != f"{_W}pPr":
            yield from _runs(child)
            if child.tag == f"{_W}p":
                yield "\n"
