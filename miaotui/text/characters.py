"""What the text steps need to know of each Unicode character, as one lookup table.

Sources: Python's `unicodedata` (canonical classes, decompositions, categories), and
Unicode Annex 29 and Technical Standard 51 for grapheme clusters.
"""

from __future__ import annotations

import unicodedata
from functools import cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

# Above plane 3 only tags and variation selectors (plane 14) are assigned.
_ASSIGNED = (range(0x40000), range(0xE0000, 0xE0200))

# Extended_Pictographic of emoji-data.txt (Unicode 16), as inclusive ranges.
_PICTOGRAPHS = (
    *((0xA9, 0xA9), (0xAE, 0xAE), (0x203C, 0x203C), (0x2049, 0x2049), (0x2122, 0x2122)),
    *((0x2139, 0x2139), (0x2194, 0x2199), (0x21A9, 0x21AA), (0x231A, 0x231B)),
    *((0x2328, 0x2328), (0x2388, 0x2388), (0x23CF, 0x23CF), (0x23E9, 0x23F3)),
    *((0x23F8, 0x23FA), (0x24C2, 0x24C2), (0x25AA, 0x25AB), (0x25B6, 0x25B6)),
    *((0x25C0, 0x25C0), (0x25FB, 0x25FE), (0x2600, 0x2605), (0x2607, 0x2612)),
    *((0x2614, 0x2685), (0x2690, 0x2705), (0x2708, 0x2712), (0x2714, 0x2714)),
    *((0x2716, 0x2716), (0x271D, 0x271D), (0x2721, 0x2721), (0x2728, 0x2728)),
    *((0x2733, 0x2734), (0x2744, 0x2744), (0x2747, 0x2747), (0x274C, 0x274C)),
    *((0x274E, 0x274E), (0x2753, 0x2755), (0x2757, 0x2757), (0x2763, 0x2767)),
    *((0x2795, 0x2797), (0x27A1, 0x27A1), (0x27B0, 0x27B0), (0x27BF, 0x27BF)),
    *((0x2934, 0x2935), (0x2B05, 0x2B07), (0x2B1B, 0x2B1C), (0x2B50, 0x2B50)),
    *((0x2B55, 0x2B55), (0x3030, 0x3030), (0x303D, 0x303D), (0x3297, 0x3297)),
    *((0x3299, 0x3299), (0x1F000, 0x1F0FF), (0x1F10D, 0x1F10F), (0x1F12F, 0x1F12F)),
    *((0x1F16C, 0x1F171), (0x1F17E, 0x1F17F), (0x1F18E, 0x1F18E), (0x1F191, 0x1F19A)),
    *((0x1F1AD, 0x1F1E5), (0x1F201, 0x1F20F), (0x1F21A, 0x1F21A), (0x1F22F, 0x1F22F)),
    *((0x1F232, 0x1F23A), (0x1F23C, 0x1F23F), (0x1F249, 0x1F3FA), (0x1F400, 0x1F53D)),
    *((0x1F546, 0x1F64F), (0x1F680, 0x1F6FF), (0x1F774, 0x1F77F), (0x1F7D5, 0x1F7FF)),
    *((0x1F80C, 0x1F80F), (0x1F848, 0x1F84F), (0x1F85A, 0x1F85F), (0x1F888, 0x1F88F)),
    *((0x1F8AE, 0x1F8FF), (0x1F90C, 0x1F93A), (0x1F93C, 0x1F945), (0x1F947, 0x1FAFF)),
    (0x1FC00, 0x1FFFD),
)

# Inclusive ranges of characters that carry nothing for a reader.
_UNWANTED = (
    *((0x00, 0x08), (0x0E, 0x1B), (0x7F, 0x84), (0x86, 0x9F)),  # C0 and C1 controls
    *((0xAD, 0xAD), (0x200B, 0x200B), (0xFEFF, 0xFEFF)),  # soft hyphen, zero width, BOM
    (0x2060, 0x2064),  # word joiner and invisible operators
    *((0x61C, 0x61C), (0x200E, 0x200F), (0x202A, 0x202E), (0x2066, 0x206F)),  # direction
    *((0xFFF9, 0xFFFB), (0xE0001, 0xE0001), (0xE0020, 0xE007F)),  # annotations and tags
    *((0xD800, 0xDFFF), (0xFFFD, 0xFFFD), (0xFDD0, 0xFDEF)),  # what is left of broken text
    *((plane << 16 | 0xFFFE, plane << 16 | 0xFFFF) for plane in range(17)),  # noncharacters
)
# Prepend of GraphemeBreakProperty.txt, as inclusive ranges.
_PREPENDED = (
    *((0x600, 0x605), (0x6DD, 0x6DD), (0x70F, 0x70F), (0x890, 0x891), (0x8E2, 0x8E2)),
    *((0xD4E, 0xD4E), (0x110BD, 0x110BD), (0x110CD, 0x110CD), (0x111C2, 0x111C3)),
    *((0x113D1, 0x113D1), (0x1193F, 0x1193F), (0x11941, 0x11941), (0x11A3A, 0x11A3A)),
    *((0x11A84, 0x11A89), (0x11D46, 0x11D46), (0x11F02, 0x11F02)),
)
# Blocks of Devanagari, Bengali, Gujarati, Oriya, Telugu and Malayalam, laid out alike.
_CONJUNCT_BLOCKS = (0x900, 0x980, 0xA80, 0xB00, 0xC00, 0xD00)
# Vertical tab, form feed, file to unit separators, next line.
_SEPARATORS = ((0x0B, 0x0C), (0x1C, 0x1F), (0x85, 0x85))


class Kind:
    """Properties of a character, as bits; a table entry is their union."""

    EXTEND: Final = 1  # belongs to the cluster before it: marks, joiners, emoji modifiers, tags
    PICTOGRAPH: Final = 2
    REGIONAL: Final = 4  # half of a flag
    HANGUL_L: Final = 8
    HANGUL_V: Final = 16
    HANGUL_T: Final = 32
    HANGUL_LV: Final = 64
    HANGUL_LVT: Final = 128
    SPACE: Final = 256
    NFC_INNER: Final = 512  # may combine with, or be reordered before, what stands before it
    NFKC_INNER: Final = 1024
    NFC_CHANGES: Final = 2048  # not its own normal form
    NFKC_CHANGES: Final = 4096
    UNWANTED: Final = 8192  # controls, broken and invisible characters without meaning here
    SEPARATOR: Final = 16384  # controls that separate words
    JOINER: Final = 32768  # ZWNJ and ZWJ: spelling in some places, noise in others
    PREPEND: Final = 65536  # belongs to the cluster after it
    LINKER: Final = 131072  # virama that makes a conjunct of two consonants
    CONSONANT: Final = 262144  # of the scripts with such a virama


Kinds = NDArray[np.uint32]

CLUSTERING: Final = (
    Kind.EXTEND | Kind.REGIONAL | Kind.HANGUL_L | Kind.HANGUL_V | Kind.HANGUL_T | Kind.PREPEND
)  # without any of these, every character is a cluster of its own


def code_points(text: str) -> NDArray[np.uint32]:
    """The text's code points, uint32 `[characters]`; lone surrogates pass."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def kinds(text: str) -> Kinds:
    """What each character is, as unions of `Kind`: uint32 `[characters]`."""
    return table()[code_points(text)]


def spaces(text: str) -> NDArray[np.bool_]:
    """Which characters are white space: bool `[characters]`."""
    if text.isascii():
        return _ascii_spaces()[np.frombuffer(text.encode(), np.uint8)]
    return (kinds(text) & Kind.SPACE).astype(np.bool_)


@cache
def _ascii_spaces() -> NDArray[np.bool_]:
    return (table()[:128] & Kind.SPACE).astype(np.bool_)


@cache
def table() -> Kinds:
    """`Kind` of every code point, uint32 `[0x110000]`; built once in about 0.3 s."""
    result = np.zeros(0x110000, np.uint32)
    composing: set[str] = set()
    for code in (code for part in _ASSIGNED for code in part):
        character = chr(code)
        kind = 0
        if unicodedata.category(character) in ("Mn", "Mc", "Me"):
            kind |= Kind.EXTEND
        if character.isspace():
            kind |= Kind.SPACE
        if unicodedata.combining(character):
            kind |= Kind.NFC_INNER | Kind.NFKC_INNER
        decomposition = unicodedata.decomposition(character)
        if decomposition:
            kind |= _changes(character)
            parts = decomposition.split()
            canonical = not decomposition.startswith("<")
            if canonical and len(parts) == 2 and not kind & Kind.NFC_CHANGES:
                composing.add(chr(int(parts[1], 16)))
        if kind:
            result[code] = kind
    result[[ord(character) for character in composing]] |= Kind.NFC_INNER | Kind.NFKC_INNER
    result[0x1161:0x1176] |= Kind.NFC_INNER | Kind.NFKC_INNER  # Hangul vowels and finals
    result[0x11A8:0x11C3] |= Kind.NFC_INNER | Kind.NFKC_INNER  # compose by arithmetic
    _mark_inner_decompositions(result)
    _mark_clusters(result)
    for ranges, kind in ((_UNWANTED, Kind.UNWANTED), (_SEPARATORS, Kind.SEPARATOR)):
        for first, last in ranges:
            result[first : last + 1] |= kind
    result[[0x200C, 0x200D]] |= Kind.JOINER
    result.flags.writeable = False
    return result


def _changes(character: str) -> int:
    kind = 0
    if unicodedata.normalize("NFC", character) != character:
        kind |= Kind.NFC_CHANGES
    if unicodedata.normalize("NFKC", character) != character:
        kind |= Kind.NFKC_CHANGES
    return kind


def _mark_inner_decompositions(result: Kinds) -> None:
    """A character combines backwards also if its decomposition's first character does."""
    forms = (
        ("NFD", Kind.NFC_CHANGES, Kind.NFC_INNER),
        ("NFKD", Kind.NFKC_CHANGES, Kind.NFKC_INNER),
    )
    for form, changes, inner in forms:
        for code in np.flatnonzero(result & changes):
            first = unicodedata.normalize(form, chr(code))[0]  # type: ignore[arg-type]
            if result[ord(first)] & inner:
                result[code] |= inner


def _mark_clusters(result: Kinds) -> None:
    for first, last in _PICTOGRAPHS:
        result[first : last + 1] |= Kind.PICTOGRAPH
    for first, last in _PREPENDED:
        result[first : last + 1] |= Kind.PREPEND
    for block in _CONJUNCT_BLOCKS:
        result[block + 0x4D] |= Kind.LINKER
        result[block + 0x15 : block + 0x3A] |= Kind.CONSONANT
        result[block + 0x58 : block + 0x60] |= Kind.CONSONANT
    result[[*range(0x978, 0x980), 0x9F0, 0x9F1, 0xAF9, 0xB71]] |= Kind.CONSONANT
    result[0x1F1E6:0x1F200] |= Kind.REGIONAL
    result[[0xE33, 0xEB3, 0x200C, 0x200D, 0xFF9E, 0xFF9F]] |= Kind.EXTEND
    result[0x1F3FB:0x1F400] |= Kind.EXTEND
    result[0xE0020:0xE0080] |= Kind.EXTEND
    for first, past in ((0x1100, 0x1160), (0xA960, 0xA97D)):
        result[first:past] |= Kind.HANGUL_L
    for first, past in ((0x1160, 0x11A8), (0xD7B0, 0xD7C7)):
        result[first:past] |= Kind.HANGUL_V
    for first, past in ((0x11A8, 0x1200), (0xD7CB, 0xD7FC)):
        result[first:past] |= Kind.HANGUL_T
    result[0xAC00:0xD7A4] |= Kind.HANGUL_LVT
    result[0xAC00:0xD7A4:28] ^= Kind.HANGUL_LVT | Kind.HANGUL_LV
