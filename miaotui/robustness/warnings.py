"""Signs that a question or passage looks adversarial, or unlike what the model has learnt from.

Cheap enough for every request (tens of microseconds, a few for ASCII): regular expressions and
counts, no model. A warning says what is unusual; it does not say that the answer is wrong.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from miaotui.robustness.scripts import code_points, count_scripts

Kind = Literal[
    "invisible_characters",
    "direction_controls",
    "homoglyphs",
    "unknown_tokens",
    "unfamiliar_script",
    "repetition",
    "unusual_length",
]

# More than this of a text is not looked at: what the first part holds, the rest will, too.
LONGEST = 20_000
Ranges = tuple[tuple[int, int], ...]

# Inclusive ranges: controls, soft hyphen, fillers, zero-width characters, tags, selectors.
_INVISIBLE: Ranges = (
    *((0x00, 0x08), (0x0E, 0x1F), (0x7F, 0x84), (0x86, 0x9F), (0xAD, 0xAD), (0x34F, 0x34F)),
    *((0x115F, 0x1160), (0x17B4, 0x17B5), (0x180B, 0x180E), (0x200B, 0x200B), (0x2060, 0x2064)),
    *((0x206A, 0x206F), (0x3164, 0x3164), (0xFEFF, 0xFEFF), (0xFFA0, 0xFFA0), (0xFFF9, 0xFFFB)),
    *((0xFFFE, 0xFFFF), (0xE0001, 0xE01EF)),
)
# They belong into emoji, and into Indic and Persian text, but not after Latin or Chinese.
_JOINERS: Ranges = ((0x200C, 0x200D),)
_DIRECTION: Ranges = ((0x61C, 0x61C), (0x200E, 0x200F), (0x202A, 0x202E), (0x2066, 0x2069))
# Cyrillic, Greek and Armenian letters that look like Latin ones (from Unicode's confusables.txt),
# full-width Latin, and mathematical letters: odd beside plain Latin letters.
_LOOKALIKES: Ranges = (
    *((0x405, 0x406), (0x408, 0x408), (0x410, 0x410), (0x412, 0x412), (0x415, 0x415)),
    *((0x417, 0x417), (0x41A, 0x41A), (0x41C, 0x41E), (0x420, 0x423), (0x425, 0x425)),
    *((0x430, 0x430), (0x433, 0x433), (0x435, 0x435), (0x43A, 0x43A), (0x43E, 0x43E)),
    *((0x440, 0x441), (0x443, 0x443), (0x445, 0x445), (0x455, 0x456), (0x458, 0x458)),
    *((0x4AE, 0x4AF), (0x4BB, 0x4BB), (0x4CF, 0x4CF), (0x501, 0x501), (0x51B, 0x51B)),
    *((0x51D, 0x51D), (0x391, 0x392), (0x395, 0x397), (0x399, 0x39A), (0x39C, 0x39D)),
    *((0x39F, 0x39F), (0x3A1, 0x3A1), (0x3A4, 0x3A5), (0x3A7, 0x3A7), (0x3B9, 0x3B9)),
    *((0x3BD, 0x3BD), (0x3BF, 0x3BF), (0x3C1, 0x3C1), (0x3C5, 0x3C5), (0x3F2, 0x3F2)),
    *((0x578, 0x578), (0x57D, 0x57D), (0x585, 0x585), (0xFF21, 0xFF3A), (0xFF41, 0xFF5A)),
    (0x1D400, 0x1D7CB),
)
# Radicals, which look like ideographs, and compatibility ideographs.
_HAN_LOOKALIKES: Ranges = ((0x2E80, 0x2FD5), (0xF900, 0xFAD9), (0x2F800, 0x2FA1D))


def _any_of(ranges: Ranges) -> str:
    """A regular expression for one of the characters."""
    return "[" + "".join(f"\\U{low:08x}-\\U{high:08x}" for low, high in ranges) + "]"


def _suspects() -> NDArray[np.bool_]:
    """Whether a character is in any of the ranges; most texts hold none, and are done then."""
    marked = np.zeros(sys.maxunicode + 1, np.bool_)
    for low, high in (*_INVISIBLE, *_JOINERS, *_DIRECTION, *_LOOKALIKES, *_HAN_LOOKALIKES):
        marked[low : high + 1] = True
    return marked


_SUSPECT = _suspects()

# A script is unfamiliar where the vocabulary has fewer pieces of it, and a smaller share.
_FEW_PIECES, _FEW_SHARE = 1_000, 0.05
_UNFAMILIAR_SHARE = 0.2
_UNKNOWN_SHARE = 0.05
_REPEATED_SHARE = 0.5
_SHORTEST_REPETITION = 200
_PROBE = 24
# The longest questions of seven English and Chinese test sets have 271 letters and 73 ideographs,
# the longest passages 4,063 letters; an ideograph counts for three and a half letters.
_QUESTION_LENGTH, _PASSAGE_LENGTH = 300, 16_000
_IDEOGRAPH = 3.5
# A single odd character in so many is nothing to a person, and may be everything to a model.
_WEIGHT = 20


@dataclass(frozen=True, slots=True)
class InputWarning:
    """What is unusual. `score`: how much of it there is, above 0 and up to 1."""

    kind: Kind
    message: str
    score: float


def look_at_input(
    question: str,
    passage: str,
    *,
    unknown_share: float = 0.0,
    script_pieces: Mapping[str, int] | None = None,
) -> list[InputWarning]:
    """Return warnings about a question and its passage, in no order of importance.

    Args:
        question: the question.
        passage: the passage; may be empty.
        unknown_share: of the passage's and question's tokens, how many the vocabulary lacks.
        script_pieces: by script, the vocabulary's pieces; None: not known.
    """
    found: list[InputWarning] = []
    passage = passage[:LONGEST]
    both = f"{question}\n{passage}"
    scripts: dict[str, int] = {}
    if not both.isascii():
        points = code_points(both)
        scripts = count_scripts(points)
        if script_pieces:
            found += _unfamiliar(scripts, script_pieces)
        if _SUSPECT[points].any():
            found += _odd_characters(both)
    elif not (question.isprintable() and passage.isprintable()):
        found += _odd_characters(both)
    if unknown_share > _UNKNOWN_SHARE:
        message = "Many tokens are unknown to the model's vocabulary."
        found.append(InputWarning("unknown_tokens", message, min(1.0, unknown_share)))
    if (share := repeated_share(passage)) > _REPEATED_SHARE:
        message = "The passage repeats itself."
        found.append(InputWarning("repetition", message, share))
    found += _lengths(question, passage, scripts)
    return found


def _odd_characters(text: str) -> list[InputWarning]:
    found = []
    for kind, pattern, message in _PATTERNS:
        if count := len(pattern.findall(text)):
            found.append(InputWarning(kind, message, min(1.0, _WEIGHT * count / len(text))))
    return found


_PATTERNS: tuple[tuple[Kind, re.Pattern[str], str], ...] = (
    (
        "invisible_characters",
        re.compile(f"{_any_of(_INVISIBLE)}|(?<=[A-Za-z0-9\u3400-\u9fff]){_any_of(_JOINERS)}"),
        "There are characters that nobody sees, such as zero-width spaces or control characters.",
    ),
    (
        "direction_controls",
        re.compile(_any_of(_DIRECTION)),
        "There are characters that change the direction of writing: what is shown may be in "
        "another order than what the model reads.",
    ),
    (
        "homoglyphs",
        re.compile(
            f"(?<=[A-Za-z]){_any_of(_LOOKALIKES)}|{_any_of(_LOOKALIKES)}(?=[A-Za-z])"
            f"|{_any_of(_HAN_LOOKALIKES)}"
        ),
        "There are letters of other scripts that look like those beside them.",
    ),
)


def _unfamiliar(scripts: Mapping[str, int], pieces: Mapping[str, int]) -> list[InputWarning]:
    total, letters = sum(pieces.values()), sum(scripts.values())
    found = []
    for script, count in scripts.items():
        few, share = pieces.get(script, 0), count / letters
        if share >= _UNFAMILIAR_SHARE and few < min(_FEW_PIECES, _FEW_SHARE * total):
            message = f"Much of the text is in {script} script, of which the model knows few words."
            found.append(InputWarning("unfamiliar_script", message, share))
    return found


def repeated_share(text: str) -> float:
    """Return the share of a text that is one piece over and over; 0 for short texts."""
    if len(text) < _SHORTEST_REPETITION:
        return 0.0
    share = 0.0
    for part in (1, 2, 3):
        place = part * len(text) // 4 - _PROBE // 2
        probe = text[place : place + _PROBE]
        count = text.count(probe)
        if count < 3:
            continue
        first = text.find(probe)
        second = text.find(probe, first + 1)
        period = second - first
        if text[first:second] == text[second : second + period]:
            # Overlapping finds, of periods shorter than the probe, are counted by their period.
            occurrences = count * math.ceil(_PROBE / period)
            share = max(share, min(1.0, occurrences * period / len(text)))
    return share


def _lengths(question: str, passage: str, scripts: Mapping[str, int]) -> list[InputWarning]:
    found = []
    # Counted in both together: a text is Chinese or it is not.
    wide = _IDEOGRAPH if scripts.get("Han", 0) * 4 > len(question) + len(passage) else 1.0
    for name, length, usual in (
        ("question", len(question) * wide, _QUESTION_LENGTH),
        ("passage", len(passage) * wide, _PASSAGE_LENGTH),
    ):
        if length > usual:
            message = f"The {name} is far longer than those that such models learn from."
            score = 1 - usual / length
            found.append(InputWarning("unusual_length", message, score))
    return found
