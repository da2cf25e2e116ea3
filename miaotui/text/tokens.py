"""Tokenised texts, and the way from runs of their tokens back to characters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miaotui.text.alignment import AlignedText, IntArray
from miaotui.text.characters import spaces
from miaotui.text.errors import MalformedTokensError, TokenRangeError
from miaotui.text.graphemes import widen


@dataclass(frozen=True, slots=True, eq=False)
class TokenizedText:
    """Tokens of a text, without special tokens.

    `input_ids`, `starts` and `ends` are int32 `[tokens]`; token i stands for the
    characters `[starts[i], ends[i])` of the text as sent, in code points, whole grapheme
    clusters without surrounding white space. A token of white space alone has an empty
    range. `characters` is the length of the text as sent; `fingerprint` names the tokenizer
    and the options.
    """

    input_ids: IntArray
    starts: IntArray
    ends: IntArray
    characters: int
    fingerprint: str

    def __len__(self) -> int:
        return len(self.input_ids)

    def check(self, field: str, vocab_size: int | None = None) -> None:
        """Raises `MalformedTokensError` where this cannot be a tokenizer's work."""
        tokens = len(self.input_ids)
        if not tokens == len(self.starts) == len(self.ends):
            raise MalformedTokensError(
                field,
                f"{tokens} ids, {len(self.starts)} starts and {len(self.ends)} ends; "
                "send the passage of an earlier EncodeResponse unchanged",
            )
        ids = self.input_ids
        if vocab_size is not None and tokens and (ids.min() < 0 or ids.max() >= vocab_size):
            raise MalformedTokensError(field, "holds an id that is not in the vocabulary")
        ordered = bool(np.all(self.starts >= 0) and np.all(self.starts <= self.ends))
        if not ordered or (tokens and int(self.ends.max()) > self.characters):
            raise MalformedTokensError(
                field, f"holds offsets outside of the text's {self.characters} characters"
            )


def token_ranges(
    aligned: AlignedText, starts: IntArray, ends: IntArray
) -> tuple[IntArray, IntArray]:
    """Token ranges in the cleaned text to what `TokenizedText` holds: int32 `[tokens]` each.

    Tokenizers count a leading space in (Metaspace, byte-level BPE) or give each byte of a
    split character a token of its own; neither shows in an answer.
    """
    starts, ends = _trim(aligned.text, starts, ends)
    starts, ends = widen(aligned.text, starts, ends)
    return aligned.to_source(starts, ends)


def _trim(text: str, starts: IntArray, ends: IntArray) -> tuple[IntArray, IntArray]:
    """Takes white space off both ends; nothing but white space becomes empty, at its end."""
    if len(starts) == 0 or not text:
        return starts, ends
    space = spaces(text)
    last = np.maximum(ends - 1, 0)
    if not (space[np.minimum(starts, len(text) - 1)] | space[last]).any():
        return starts, ends
    positions = np.arange(len(text) + 1, dtype=np.int32)
    blank = np.append(space, False)
    visible_from = np.minimum.accumulate(np.where(blank, len(text), positions)[::-1])[::-1]
    visible_to = np.maximum.accumulate(np.where(np.append(True, space), 0, positions))
    trimmed_starts = np.minimum(visible_from[starts], ends)
    trimmed_ends = np.maximum(visible_to[ends], trimmed_starts)
    return trimmed_starts.astype(np.int32), trimmed_ends.astype(np.int32)


def character_spans(
    passage: TokenizedText, first: NDArray[np.integer[Any]], last: NDArray[np.integer[Any]]
) -> tuple[IntArray, IntArray]:
    """Characters of token runs `[first, last]` (inclusive): int32 `[spans]` each.

    White space at a run's ends is left out. Raises `TokenRangeError`.
    """
    tokens = len(passage)
    wrong = np.flatnonzero((first > last) | (last >= tokens) | (first < 0))
    if len(wrong):
        index = int(wrong[0])
        raise TokenRangeError(
            f"spans[{index}]",
            f"tokens {int(first[index])} to {int(last[index])} of a passage of {tokens}; "
            f"0 <= first <= last < {tokens} must hold",
        )
    visible = passage.ends > passage.starts
    if not visible.all():
        positions = np.arange(tokens, dtype=np.int32)
        ahead = np.minimum.accumulate(np.where(visible, positions, tokens)[::-1])[::-1]
        behind = np.maximum.accumulate(np.where(visible, positions, -1))
        shown = ahead[first] <= last
        last = np.where(shown, behind[last], first)
        first = np.where(shown, ahead[first], first)
    return passage.starts[first], passage.ends[last]
