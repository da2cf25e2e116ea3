"""Boundaries of what readers take for one character (Unicode Annex 29).

Extended grapheme clusters, except that a mark never belongs to white space before it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from miaotui.text.alignment import IntArray
from miaotui.text.characters import CLUSTERING, Kind, Kinds, code_points, table

_ZWJ = 0x200D


def widen(text: str, starts: IntArray, ends: IntArray) -> tuple[IntArray, IntArray]:
    """Ranges (int32 `[n]` each, in code points of `text`) widened to whole clusters.

    Empty ranges stay as they are. Costs O(characters), next to nothing for ASCII.
    """
    if text.isascii() or len(starts) == 0:
        return starts, ends
    codes = code_points(text)
    properties = table()[codes]
    if not np.any(properties & CLUSTERING):
        return starts, ends
    length = len(text)
    inside = np.zeros(length + 1, np.bool_)
    inside[1:length] = _joined(codes, properties)
    positions = np.arange(length + 1, dtype=np.int32)
    before = np.maximum.accumulate(np.where(inside, 0, positions))
    after = np.minimum.accumulate(np.where(inside, length, positions)[::-1])[::-1]
    empty = starts >= ends
    return np.where(empty, starts, before[starts]), np.where(empty, ends, after[ends])


def _joined(codes: NDArray[np.uint32], properties: Kinds) -> NDArray[np.bool_]:
    """For each neighbouring pair, whether no boundary lies between: bool `[characters - 1]`."""
    left, right = properties[:-1], properties[1:]

    def have(side: Kinds, kind: int) -> NDArray[np.bool_]:
        found: NDArray[np.bool_] = (side & kind) != 0
        return found

    visible = (codes[:-1] >= 0x20) & ~have(left, Kind.SPACE)
    joined = have(right, Kind.EXTEND) & visible
    joined |= have(left, Kind.PREPEND) & (codes[1:] >= 0x20) & ~have(right, Kind.SPACE)
    joined |= (codes[:-1] == _ZWJ) & have(right, Kind.PICTOGRAPH)
    index = np.arange(len(codes))
    linker = have(left, Kind.LINKER)
    if linker.any():
        # A conjunct: a linker, any further marks, a consonant.
        last_linker = np.maximum.accumulate(np.where(linker, index[:-1], -1))
        last_other = np.maximum.accumulate(np.where(have(left, Kind.EXTEND), -1, index[:-1]))
        joined |= (last_linker > last_other) & have(right, Kind.CONSONANT)
    hangul_syllable = Kind.HANGUL_L | Kind.HANGUL_V | Kind.HANGUL_LV | Kind.HANGUL_LVT
    joined |= have(left, Kind.HANGUL_L) & have(right, hangul_syllable)
    joined |= have(left, Kind.HANGUL_LV | Kind.HANGUL_V) & have(
        right, Kind.HANGUL_V | Kind.HANGUL_T
    )
    joined |= have(left, Kind.HANGUL_LVT | Kind.HANGUL_T) & have(right, Kind.HANGUL_T)
    regional = have(properties, Kind.REGIONAL)
    if regional.any():
        # Flags are pairs, counted from the start of each run of regional indicators.
        run_start = np.maximum.accumulate(np.where(regional, 0, index + 1))
        joined |= regional[1:] & ((index - run_start)[1:] % 2 == 1)
    return joined
