"""Prompt-lookup decoding: what followed the last few tokens before may follow them again.

After Saxena, "Prompt Lookup Decoding" (2023): a draft model that is nothing but the text so
far. Whether a draft is right the last stage decides; a wrong one costs only its computation.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from miaotui.engine.decode.types import TokenIds

_LONGEST = 3
# Three ids fit a 63-bit key.
_ID_BITS = 21
MAX_VOCABULARY = 1 << _ID_BITS
_MAX_PAUSE = 32


class PromptIndex:
    """Where a prompt's n-grams continue; shared by a request's texts."""

    __slots__ = ("maps",)

    def __init__(self, prompt: TokenIds) -> None:
        self.maps: list[dict[int, int]] = [{} for _ in range(_LONGEST)]
        """By n - 1: the n-gram's key, and the index after its last place."""
        ids = keys = prompt.astype(np.int64)
        for n, places in enumerate(self.maps, start=1):
            if n > 1:
                keys = (keys[:-1] << _ID_BITS) | ids[n - 1 :]
            # Where one stands several times, the last place stays.
            places.update(zip(keys.tolist(), range(n, len(ids) + 1), strict=True))


@dataclass(slots=True)
class _Pace:
    """How far ahead to guess from matches of one length: it grows and shrinks with success."""

    size: int
    pause: int = 0
    """So many matches to let pass."""
    misses: int = 0

    def learn(self, drafted: int, accepted: int, most: int) -> None:
        if accepted:
            self.misses = 0
            if accepted == drafted:
                # Not from a draft that was cut short: it proves nothing about longer ones.
                self.size = min(max(self.size, 2 * drafted), most)
            else:
                self.size = max(1, min(self.size, accepted + 1))
            return
        self.size = max(1, self.size // 2)
        self.misses += 1
        if self.misses > 1:
            self.pause = min(1 << (self.misses - 2), _MAX_PAUSE)


@dataclass(eq=False, slots=True)
class Drafter:
    """Guesses a text's next tokens, as many as have lately been worth it."""

    most: int
    """Longest draft; 0: none."""
    prompt_length: int
    _index: list[dict[int, int]] = field(default_factory=lambda: [{} for _ in range(_LONGEST)])
    _indexed: int = 0
    """N-grams that end before this index are in one of the indices."""
    _paces: list[_Pace] = field(default_factory=list)
    _matched: int = 0
    """Length of the match of the last draft."""

    def __post_init__(self) -> None:
        self._indexed = self.prompt_length
        self._paces = [_Pace(max(1, self.most >> shift)) for shift in (2, 1, 0)]

    def draft(self, tokens: TokenIds, prompt: PromptIndex, room: int) -> TokenIds | None:
        """What may follow `tokens` (int32, prompt and text), at most `room` (> 0) of them.

        The longest n-gram that has been there before counts, at its last place. None where
        there is none, or where such matches have lately been no good.
        """
        length = len(tokens)
        if length - 1 > self._indexed:
            self._extend(tokens)
        tail = tokens[-_LONGEST:].tolist()
        keys: list[int] = []
        key = 0
        for n, token in enumerate(reversed(tail)):
            key |= token << (_ID_BITS * n)
            keys.append(key)
        for n in range(len(keys), 0, -1):
            key = keys[n - 1]
            place = self._index[n - 1].get(key)
            if place is None:
                place = prompt.maps[n - 1].get(key)
                if place is None:
                    continue
            pace = self._paces[n - 1]
            if pace.pause:
                pace.pause -= 1
                return None
            self._matched = n
            count = min(pace.size, room)
            if place + count <= length:
                return tokens[place : place + count].copy()
            # The text repeats itself: so does the draft.
            return np.resize(tokens[place:], count)
        return None

    def learn(self, drafted: int, accepted: int) -> None:
        """How the last draft fared."""
        self._paces[self._matched - 1].learn(drafted, accepted, self.most)

    def _extend(self, tokens: TokenIds) -> None:
        """Indexes all n-grams but those that end with the last token: nothing follows them."""
        base = max(self._indexed - _LONGEST + 1, 0)
        ids: list[int] = tokens[base:-1].tolist()
        for end in range(self._indexed - base, len(ids)):
            key = 0
            for n, places in enumerate(self._index[: end + 1]):
                key |= ids[end - n] << (_ID_BITS * n)
                places[key] = base + end + 1
        self._indexed = len(tokens) - 1
