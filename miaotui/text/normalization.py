"""Unicode normalisation (Unicode Annex 15) that keeps the alignment."""

from __future__ import annotations

import unicodedata
from enum import Enum

import numpy as np

from miaotui.text.alignment import AlignedText, Edit
from miaotui.text.characters import Kind, kinds


class Normalization(Enum):
    """Normal form applied before tokenisation."""

    NONE = "none"
    NFC = "nfc"
    NFKC = "nfkc"


def normalize(aligned: AlignedText, form: Normalization) -> AlignedText:
    """The text in a normal form; the result's text equals `unicodedata.normalize`'s.

    The text is cut before every character that can neither combine with nor be reordered
    before what precedes it, so segments normalise independently of each other. A segment
    that changes is aligned as a whole; the others character by character.
    """
    text = aligned.text
    if form is Normalization.NONE or text.isascii():
        return aligned
    if form is Normalization.NFC:
        name, inner_kind, changes_kind = "NFC", Kind.NFC_INNER, Kind.NFC_CHANGES
    else:
        name, inner_kind, changes_kind = "NFKC", Kind.NFKC_INNER, Kind.NFKC_CHANGES
    if unicodedata.is_normalized(name, text):  # type: ignore[arg-type]
        return aligned
    properties = kinds(text)
    begins = (properties & inner_kind) == 0
    begins[0] = True
    starts = np.flatnonzero(begins)
    ends = np.append(starts[1:], len(text))
    suspects = (ends - starts > 1) | ((properties[starts] & changes_kind) != 0)
    edits: list[Edit] = []
    known: dict[str, str] = {}
    for start, end in zip(starts[suspects].tolist(), ends[suspects].tolist(), strict=True):
        segment = text[start:end]
        normal = known.get(segment)
        if normal is None:
            normal = unicodedata.normalize(name, segment)  # type: ignore[arg-type]
            known[segment] = normal
        if normal != segment:
            # White space that begins a segment stays a character of its own.
            own = int(segment[0].isspace() and normal[0] == segment[0] and len(segment) > 1)
            edits.append((start + own, end, normal[own:]))
    return aligned.edit(edits)
