"""Which reader a document needs, and the checks that all have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import PurePosixPath

from miaotui.retrieval.errors import UnreadableError
from miaotui.retrieval.reading.document import Extracted, Limits, too_long
from miaotui.retrieval.reading.docx import read_docx
from miaotui.retrieval.reading.encoding import decode
from miaotui.retrieval.reading.html import read_html, read_markdown
from miaotui.retrieval.reading.pdf import read_pdf

Reader = Callable[[bytes, Limits], Extracted]


def read_plain(data: bytes, limits: Limits) -> Extracted:
    """Text as it is, in whatever encoding. Raises `UnreadableError`."""
    del limits  # checked by the caller: a text is not longer than its bytes
    return Extracted(decode(data)[0])


_READERS: Mapping[str, Reader] = {
    ".txt": read_plain,
    ".text": read_plain,
    ".log": read_plain,
    ".rst": read_plain,
    ".md": read_markdown,
    ".markdown": read_markdown,
    ".html": read_html,
    ".htm": read_html,
    ".xhtml": read_html,
    ".pdf": read_pdf,
    ".docx": read_docx,
}
SUFFIXES = tuple(_READERS)


def read_document(source: str, data: bytes, limits: Limits | None = None) -> Extracted:
    """The text of a file; the end of `source` says which kind it is.

    Raises `UnreadableError` saying why it cannot be taken.
    """
    limits = limits or Limits()
    suffix = PurePosixPath(source.replace("\\", "/")).suffix.lower()
    reader = _READERS.get(suffix)
    if reader is None:
        kinds = ", ".join(SUFFIXES)
        hint = "; save it as .docx" if suffix == ".doc" else ""
        raise UnreadableError(f"files of this kind are not read, only {kinds}{hint}")
    if len(data) > limits.max_bytes:
        raise UnreadableError(f"it has more than {limits.max_bytes:,} bytes; split it")
    extracted = reader(data, limits)
    if len(extracted.text) > limits.max_characters:
        raise too_long(limits)
    if not extracted.text.strip():
        raise UnreadableError("it holds no text")
    return extracted
