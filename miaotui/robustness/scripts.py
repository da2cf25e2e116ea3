"""Scripts of a text, and which of them a vocabulary has.

Ranges: the letters' main blocks of Unicode 16; what is in none of them (digits, punctuation,
symbols, rarer scripts) belongs to no script here.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

# Script: inclusive ranges of its letters.
_RANGES: Mapping[str, tuple[tuple[int, int], ...]] = {
    "Latin": (
        *((0x41, 0x5A), (0x61, 0x7A), (0xC0, 0xD6), (0xD8, 0xF6), (0xF8, 0x24F)),
        *((0x1E00, 0x1EFF), (0xFF21, 0xFF3A), (0xFF41, 0xFF5A)),
    ),
    "Greek": ((0x370, 0x3FF), (0x1F00, 0x1FFF)),
    "Cyrillic": ((0x400, 0x52F),),
    "Armenian": ((0x530, 0x58F),),
    "Hebrew": ((0x5D0, 0x5F2),),
    "Arabic": ((0x620, 0x65F), (0x66E, 0x6D3), (0x6FA, 0x6FF), (0x750, 0x77F)),
    "Devanagari": ((0x900, 0x963), (0x970, 0x97F)),
    "Bengali": ((0x980, 0x9FF),),
    "Tamil": ((0xB80, 0xBFF),),
    "Thai": ((0xE00, 0xE4E),),
    "Georgian": ((0x10A0, 0x10FF),),
    "Hangul": ((0x1100, 0x11FF), (0x3130, 0x318F), (0xAC00, 0xD7A3)),
    "Kana": ((0x3041, 0x3096), (0x30A1, 0x30FA), (0x31F0, 0x31FF)),
    "Han": ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x323AF)),
}
# Scripts of which a single character may be a word; of the others a piece of two letters counts.
_WORDS_OF_ONE = ("Hangul", "Kana", "Han")
NAMES: Final = tuple(_RANGES)
_OTHER = len(NAMES)


def _table() -> NDArray[np.uint8]:
    """Each character's script: an index into `NAMES`, or their number."""
    table = np.full(sys.maxunicode + 1, _OTHER, np.uint8)
    for index, name in enumerate(NAMES):
        for low, high in _RANGES[name]:
            table[low : high + 1] = index
    return table


_SCRIPT = _table()


def code_points(text: str) -> NDArray[np.uint32]:
    """Return a text's characters as uint32 [characters]."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def count_scripts(points: NDArray[np.uint32]) -> dict[str, int]:
    """Letters of each script that occurs in a text, given as `code_points`."""
    counts = np.bincount(_SCRIPT[points], minlength=_OTHER)
    return {NAMES[index]: int(counts[index]) for index in np.flatnonzero(counts[:_OTHER])}


def count_pieces(pieces: Sequence[str]) -> dict[str, int]:
    """By script, how many of a vocabulary's pieces hold two of its letters or a word of it.

    Single letters are no measure: many vocabularies have all letters of scripts of which they
    have no words.
    """
    owners = _SCRIPT[code_points("".join(pieces))].astype(np.intp)
    lengths = [len(piece) for piece in pieces]
    piece = np.repeat(np.arange(len(pieces)), lengths)
    counts = np.bincount(piece * (_OTHER + 1) + owners, minlength=len(pieces) * (_OTHER + 1))
    by_piece = counts.reshape(len(pieces), _OTHER + 1)
    least = np.array([1 if name in _WORDS_OF_ONE else 2 for name in NAMES])
    totals = (by_piece[:, :_OTHER] >= least).sum(axis=0)
    return {name: int(total) for name, total in zip(NAMES, totals, strict=True)}
