"""A text together with where each of its characters comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int32]

# Replace [start, end) by a text. Edits are sorted, do not overlap, and are not empty.
Edit = tuple[int, int, str]


@dataclass(frozen=True, slots=True, eq=False)
class AlignedText:
    """A text derived from a source text, with an alignment of its characters.

    `starts` and `ends` are int32 `[characters]`: character i of `text` stands for
    `source[starts[i]:ends[i]]`, in code points; ranges are never empty, both arrays never
    fall. Several characters may share one range (a ligature taken apart), and a range may
    be longer than one (an accent composed with its letter). None: characters correspond
    one to one.
    """

    text: str
    source_length: int
    starts: IntArray | None = None
    ends: IntArray | None = None

    @classmethod
    def of(cls, source: str) -> AlignedText:
        """The source itself, unchanged."""
        return cls(source, len(source))

    def edit(self, edits: Sequence[Edit]) -> AlignedText:
        """The text with `edits` made; costs O(characters), nothing where there are none.

        All characters of a replacement stand for the whole of what they replace.
        """
        if not edits:
            return self
        text = self.text
        pieces: list[str] = []
        position = 0
        for start, end, new in edits:
            pieces.append(text[position:start])
            pieces.append(new)
            position = end
        pieces.append(text[position:])

        length = len(text)
        first = np.fromiter((edit[0] for edit in edits), np.int32, len(edits))
        past = np.fromiter((edit[1] for edit in edits), np.int32, len(edits))
        sizes = np.fromiter((len(edit[2]) for edit in edits), np.int32, len(edits))
        # +1 where an edit begins, -1 where it ends: the running sum marks what it covers.
        covered = np.zeros(length + 1, np.int32)
        np.add.at(covered, first, 1)
        np.add.at(covered, past, -1)
        copies = 1 - np.cumsum(covered[:length], dtype=np.int32)
        copies[first] = sizes
        origin = np.arange(length, dtype=np.int32)
        origin_end = origin + 1
        origin_end[first] = past
        starts = np.repeat(origin, copies)
        ends = np.repeat(origin_end, copies)
        if self.starts is not None and self.ends is not None:
            starts, ends = self.starts[starts], self.ends[ends - 1]
        return AlignedText("".join(pieces), self.source_length, starts, ends)

    def to_source(self, starts: IntArray, ends: IntArray) -> tuple[IntArray, IntArray]:
        """Ranges of this text (int32 `[n]` each) to ranges of the source.

        An empty range stays empty.
        """
        if self.starts is None or self.ends is None:
            return starts, ends
        empty = starts >= ends
        bounded = np.append(self.starts, np.int32(self.source_length))
        source_starts = bounded[starts]
        if len(self.text) == 0:
            return source_starts, source_starts.copy()
        source_ends = self.ends[np.maximum(ends - 1, 0)]
        return source_starts, np.where(empty, source_starts, source_ends)

    def source_span(self, start: int, end: int) -> tuple[int, int]:
        """One range of this text to its range of the source."""
        starts, ends = self.to_source(np.array([start], np.int32), np.array([end], np.int32))
        return int(starts[0]), int(ends[0])
