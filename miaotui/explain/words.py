"""From tokens to words: what a reader can make sense of."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# An ideograph, kana, or Thai or Hangul syllable by itself; a run of other letters, digits and
# marks, with apostrophes and hyphens inside; any other visible character by itself.
_ALONE = r"\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7a3\uf900-\ufaff"
_ALONE += r"\U00020000-\U000323af"
_WORD = re.compile(rf"[{_ALONE}]|(?:(?![{_ALONE}])\w)+(?:['’\-](?:(?![{_ALONE}])\w)+)*|\S")


@dataclass(frozen=True, slots=True)
class TokenValue:
    """A token's characters `[start, end)` of a text, in code points, and its value."""

    start: int
    end: int
    value: float


@dataclass(frozen=True, slots=True)
class WordValue:
    """A word's characters `[start, end)`, and the sum of its tokens' values."""

    start: int
    end: int
    value: float


def sum_by_word(text: str, tokens: Sequence[TokenValue]) -> list[WordValue]:
    """Sum tokens' values by word, in the text's order.

    A token that spans several words, as subword vocabularies of Chinese have them, makes these
    one. Tokens without characters (white space) count for the word before them, or the first.
    Words without tokens, which another window holds, are left out; so the sum of all is that
    of the tokens.
    """
    words = [(found.start(), found.end()) for found in _WORD.finditer(text)]
    pieces = _merged(words, ((token.start, token.end) for token in tokens))
    values: dict[int, float] = {}
    ahead = 0.0
    for token in tokens:
        if token.start >= token.end:
            if values:
                values[next(reversed(values))] += token.value
            else:
                ahead += token.value
            continue
        place = _place(pieces, token.start)
        values[place] = values.get(place, 0.0) + ahead + token.value
        ahead = 0.0
    return [WordValue(*pieces[place], values[place]) for place in sorted(values)]


def _merged(
    words: list[tuple[int, int]], tokens: Iterable[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Unions of words and tokens that share a character, in order."""
    spans = sorted([*words, *(span for span in tokens if span[0] < span[1])])
    merged: list[tuple[int, int]] = []
    for start, end in spans:
        if merged and start < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def _place(pieces: list[tuple[int, int]], start: int) -> int:
    """Index of the piece that holds the character."""
    low, high = 0, len(pieces)
    while low < high:
        middle = (low + high) // 2
        if pieces[middle][1] <= start:
            low = middle + 1
        else:
            high = middle
    return low
