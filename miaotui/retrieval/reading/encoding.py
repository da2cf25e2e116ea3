"""Bytes to text where nobody says in which encoding: UTF-8, UTF-16, GB18030, Big5, Latin."""

from __future__ import annotations

import codecs
import re

from miaotui.retrieval.chinese import simplified
from miaotui.retrieval.errors import UnreadableError

_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Lead bytes of what is common: punctuation and the frequent characters (GB 2312 level 1,
# Big5 level 1). Text read in the wrong one of the two is full of rare characters.
_COMMON = {
    "gb2312": (*range(0xA1, 0xA4), *range(0xB0, 0xD8)),
    "big5": range(0xA1, 0xC7),
}
_SAMPLE = 4096
_LEAST_COMMON = 0.7
_MOST_LATIN = 0.3
_BINARY = re.compile(r"[\x00-\x08\x0e-\x1a\x1c-\x1f]")


def decode(data: bytes, declared: str = "") -> tuple[str, str]:
    """The text and the encoding that it was in.

    `declared`: an encoding that the document itself names, tried after marks at the start
    and UTF-8. Raises `UnreadableError` where it is no text, or in none of the encodings.
    """
    for mark, name in _BOMS:
        if data.startswith(mark):
            return _checked(_strict(data, name), name)
    if (name := _utf16(data)) and (text := _strict(data, name)) is not None:
        return _checked(text, name)
    for name in ("utf-8", declared):
        if name and (text := _strict(data, name)) is not None:
            return _checked(text, name)
    name = _guess(data)
    return _checked(_strict(data, name) if name else None, name)


def _strict(data: bytes, encoding: str) -> str | None:
    try:
        return data.decode(encoding)
    except (UnicodeDecodeError, LookupError, ValueError):
        return None


def _checked(text: str | None, encoding: str) -> tuple[str, str]:
    if text is None:
        raise UnreadableError(
            "it is not text in UTF-8, UTF-16, GB18030, Big5 or Windows-1252; save it as UTF-8"
        )
    if _BINARY.search(text):
        raise UnreadableError("it is not text: it holds control characters")
    return text, encoding


def _utf16(data: bytes) -> str:
    """UTF-16 without a mark, known by line ends and ASCII, whose other byte is zero."""
    sample = data[: 2 * _SAMPLE]
    if len(data) % 2 or 0 not in sample:
        return ""
    high, low = sample[1::2].count(0), sample[::2].count(0)
    if high and not low:
        return "utf-16-le"
    return "utf-16-be" if low and not high else ""


def _guess(data: bytes) -> str:
    scores = {
        # Traditional characters are written in GB18030, too, outside of GB 2312.
        "gb18030": _common(simplified(_strict(data, "gb18030") or ""), "gb2312"),
        "cp950": _common(_strict(data, "cp950") or "", "big5"),
    }
    best = max(scores, key=scores.__getitem__)
    if scores[best] >= _LEAST_COMMON:
        return best
    high = sum(byte > 127 for byte in data[:_SAMPLE])
    return "cp1252" if high <= _MOST_LATIN * len(data[:_SAMPLE]) else ""


def _common(text: str, encoding: str) -> float:
    """Share of common ones among the text's characters that are not ASCII."""
    wide = [character for character in text if character > "\x7f"][:_SAMPLE]
    leads = (character.encode(encoding, "ignore")[:1] for character in wide)
    common = _COMMON[encoding]
    return sum(bool(lead) and lead[0] in common for lead in leads) / max(1, len(wide))
