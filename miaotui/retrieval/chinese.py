"""Traditional characters as simplified ones."""

from __future__ import annotations

import opencc

_converter = opencc.OpenCC("t2s")


def simplified(text: str) -> str:
    """The text in simplified characters. Lengths may differ."""
    converted: str = _converter.convert(text)
    return converted
