"""PDF, by pypdf: the text of each page, its lines joined to paragraphs again."""

from __future__ import annotations

import re
from io import BytesIO

from pypdf import PdfReader
from pypdf.errors import DependencyError, FileNotDecryptedError, PyPdfError

from miaotui.retrieval.errors import UnreadableError
from miaotui.retrieval.reading.document import Extracted, Limits, TextBuilder

_WIDE = re.compile(r"[\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef]")
# A line this much shorter than the page's longest ends its paragraph if it ends a sentence,
# and one still shorter in any case: it is a heading, or an item of a list.
_FULL_LINE = 0.75
_HALF_LINE = 0.5
_SENTENCE_END = re.compile(r"[.!?:。！？：;；][\"'”’」』)）]*$")


def read_pdf(data: bytes, limits: Limits) -> Extracted:
    """The text of each page. Raises `UnreadableError`, also where the pages are pictures."""
    builder = TextBuilder(limits)
    try:
        reader = PdfReader(BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            raise UnreadableError("it is protected by a password")
        if len(reader.pages) > limits.max_pages:
            raise UnreadableError(f"it has more than {limits.max_pages:,} pages; split it")
        title = reader.metadata.title if reader.metadata else None
        builder.title = " ".join(str(title or "").split())
        for page in reader.pages:
            builder.page()
            for paragraph in join_lines(page.extract_text()):
                builder.paragraph(paragraph)
    except UnreadableError:
        raise
    except (DependencyError, FileNotDecryptedError):
        raise UnreadableError("it is encrypted; save it without protection") from None
    except (PyPdfError, ValueError, KeyError, TypeError, AttributeError, IndexError, OSError):
        # pypdf lets what it trips over in a damaged file pass.
        raise UnreadableError("the file is damaged, or not a PDF") from None
    except RecursionError:
        raise UnreadableError("its objects are nested too deeply") from None
    extracted = builder.result()
    if not extracted.text:
        raise UnreadableError("its pages hold no text (scans?); run text recognition first")
    return extracted


def join_lines(text: str) -> list[str]:
    """Paragraphs of a page's text, whose lines are broken as they were set."""
    # Fonts without a mapping give NULs and lone surrogates, which are no text.
    text = re.sub("[\x00-\x08\x0b\x0e-\x1f\ud800-\udfff]", "", text)
    lines = [line.strip() for line in text.splitlines()]
    longest = max(map(_width, lines), default=0)
    paragraphs: list[str] = []
    current = ""
    for line in lines:
        if not line:
            paragraphs.append(current)
            current = ""
            continue
        current = _joined(current, line)
        share = _width(line) / longest
        if share < _HALF_LINE or (share < _FULL_LINE and _SENTENCE_END.search(line)):
            paragraphs.append(current)
            current = ""
    return [paragraph for paragraph in (*paragraphs, current) if paragraph]


def _width(line: str) -> int:
    return len(line) + len(_WIDE.findall(line))


def _joined(before: str, line: str) -> str:
    if not before:
        return line
    if _WIDE.match(before[-1]) and _WIDE.match(line[0]):
        return before + line
    if re.search(r"[a-z]-$", before) and line[0].islower():
        return before[:-1] + line
    return f"{before} {line}"
