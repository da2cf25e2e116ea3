"""Cleans a text before it is tokenised, and keeps the alignment with what was sent.

Steps, each skipped where it has nothing to do: surrogate pairs are joined, markup is
removed (on request), control characters, broken and invisible characters are removed,
and the rest is normalised (Unicode Annex 15).
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

import numpy as np

from miaotui.text.alignment import AlignedText, Edit
from miaotui.text.characters import Kind, kinds, table
from miaotui.text.markup import strip_markup
from miaotui.text.normalization import Normalization, normalize

# Part of every fingerprint: raise it whenever equal input may be cleaned differently.
CLEANING_VERSION = 1


@dataclass(frozen=True, slots=True)
class TextOptions:
    """How a text is cleaned."""

    normalization: Normalization = Normalization.NFC
    strip_markup: bool = False


_ASCII_SUSPECT = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")
_ZWJ = "\u200d"
_VIRAMA = 9  # canonical combining class
_JOINERS = "\u200c\u200d"
# Flags of regions (Scotland, …) are a black flag and the region spelled in tags.
_BLACK_FLAG = "\U0001f3f4"
_FLAG = re.compile("[\U000e0020-\U000e007e]+\U000e007f")
# Arabic, Syriac and their kin; Indic; Myanmar; Khmer and Mongolian; Arabic presentation
# forms; Brahmic scripts of plane 1; Adlam. There, joiners are spelling.
_JOINING_SCRIPT = re.compile(
    "[\u0600-\u0dff\u1000-\u109f\u1780-\u18af\ua8e0-\ua8ff\ufb50-\ufdff\ufe70-\ufefc"
    "\U00010a00-\U00011fff\U0001e900-\U0001e95f]"
)


def clean(text: str, options: TextOptions) -> AlignedText:
    """The text as it will be tokenised, aligned with the text as sent.

    Text that is clean already comes back as it is, at the cost of a scan.
    """
    aligned = AlignedText.of(text)
    if not text.isascii():
        aligned = _join_surrogates(aligned)
    if options.strip_markup:
        aligned = strip_markup(aligned)
    return normalize(_remove_invisible(aligned), options.normalization)


def _join_surrogates(aligned: AlignedText) -> AlignedText:
    """Pairs of surrogates (from JSON escapes taken one by one) become the character meant."""
    text = aligned.text
    if _SURROGATE.search(text) is None:
        return aligned
    edits: list[Edit] = []
    for pair in _PAIR.finditer(text):
        character = pair.group().encode("utf-16-le", "surrogatepass").decode("utf-16-le")
        edits.append((pair.start(), pair.end(), character))
    return aligned.edit(edits)


def _remove_invisible(aligned: AlignedText) -> AlignedText:
    """Separating controls become spaces; other unwanted characters go."""
    text = aligned.text
    if text.isascii() and _ASCII_SUSPECT.search(text) is None:
        return aligned
    suspects = kinds(text) & (Kind.UNWANTED | Kind.SEPARATOR | Kind.JOINER)
    found = np.flatnonzero(suspects)
    if len(found) == 0:
        return aligned
    edits: list[Edit] = []
    # Runs of equal treatment: neighbours that are all separators, or all others.
    separates = suspects[found] == Kind.SEPARATOR
    breaks = np.flatnonzero((np.diff(found) != 1) | (np.diff(separates) != 0)) + 1
    firsts = found[np.concatenate(([0], breaks))].tolist()
    lasts = found[np.concatenate((breaks - 1, [-1]))].tolist()
    for start, last in zip(firsts, lasts, strict=True):
        if suspects[start] == Kind.SEPARATOR:
            edits.append((start, last + 1, " "))
            continue
        flag = _FLAG.match(text, start) if text[start - 1 : start] == _BLACK_FLAG else None
        begin = flag.end() if flag is not None else start
        if begin <= last:
            kept = _kept_joiner(text, begin, last + 1)
            if text[begin : last + 1] != kept:
                edits.append((begin, last + 1, kept))
    return aligned.edit(edits)


def _kept_joiner(text: str, start: int, end: int) -> str:
    """What is left of a run of invisible characters: one joiner where it means something.

    ZWJ within an emoji sequence; either joiner between letters of a joining script, or
    after a virama. Elsewhere joiners only break words apart for a tokenizer.
    """
    joiner = next((character for character in text[start:end] if character in _JOINERS), "")
    if not joiner or start == 0:
        return ""
    # Marks between the letter and the joiner may yet be reordered by normalisation.
    base = start - 1
    while base > 0 and unicodedata.combining(text[base]) not in (0, _VIRAMA):
        base -= 1
    if unicodedata.combining(text[base]) == _VIRAMA:
        return joiner
    if end == len(text):
        return ""
    letter, after = text[base], text[end]
    if joiner == _ZWJ and _is_emoji(after, Kind.PICTOGRAPH):
        # Before it: a pictograph, a skin tone, or a variation selector after one.
        before = text[start - 1]
        return joiner if _is_emoji(before, Kind.PICTOGRAPH | Kind.EXTEND) else ""
    if not (_JOINING_SCRIPT.match(letter) and _JOINING_SCRIPT.match(after) and after.isalpha()):
        return ""
    return joiner if letter.isalpha() or unicodedata.category(letter)[0] == "M" else ""


def _is_emoji(character: str, kinds_wanted: int) -> bool:
    kind = int(table()[ord(character)])
    # NFKC makes letters of some (™, ℹ); those stand in no sequence.
    return bool(kind & kinds_wanted) and not kind & Kind.NFKC_CHANGES
