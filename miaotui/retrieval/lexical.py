"""BM25 over an inverted index in memory (Robertson and Zaragoza, 2009).

Passages lie in immutable segments, as in log-structured merge trees: adding builds a small
segment, and small ones are merged now and then. A posting list is two arrays, so a query is
a few array operations a term however common the term is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from miaotui.retrieval.terms import CountArray, HashArray, Terms

K1 = 1.2
B = 0.75

IdArray = npt.NDArray[np.int64]
ScoreArray = npt.NDArray[np.float32]
_Positions = npt.NDArray[np.int32]

# A segment takes in its right neighbour when that has grown to this share of it.
_MERGE_SHARE = 0.5
_SMALL_SEGMENT = 256


@dataclass(frozen=True, slots=True)
class Hits:
    """Passages, best first: `ids` int64 [n] and `scores` float32 [n].

    `ceiling`: what a score stays below whatever the passage, where there is such a bound.
    """

    ids: IdArray
    scores: ScoreArray
    ceiling: float = 1.0


NO_HITS = Hits(np.empty(0, np.int64), np.empty(0, np.float32))


@dataclass(frozen=True, slots=True)
class Segment:
    """Postings of some passages.

    `terms` ascending; term i's postings are `passages[bounds[i]:bounds[i + 1]]` (places in
    this segment) with their `counts`; `ids` ascending and `lengths` have one entry a passage.
    """

    terms: HashArray
    bounds: IdArray
    passages: _Positions
    counts: CountArray
    ids: IdArray
    lengths: ScoreArray

    @classmethod
    def build(cls, passages: Sequence[tuple[int, Terms]]) -> Segment:
        """A segment of (passage id, terms), ids ascending."""
        sizes = np.array([len(terms.hashes) for _, terms in passages], np.int64)
        places = np.repeat(np.arange(len(passages), dtype=np.int32), sizes)
        return cls._sorted(
            np.concatenate([np.empty(0, np.uint32), *(terms.hashes for _, terms in passages)]),
            places,
            np.concatenate([np.empty(0, np.uint8), *(terms.counts for _, terms in passages)]),
            np.array([identifier for identifier, _ in passages], np.int64),
            np.array([terms.total for _, terms in passages], np.float32),
        )

    @classmethod
    def merge(cls, segments: Sequence[Segment]) -> Segment:
        """One segment in place of several whose ids follow each other."""
        offsets = np.cumsum([0, *(len(segment.ids) for segment in segments)])
        return cls._sorted(
            np.concatenate([np.repeat(s.terms, np.diff(s.bounds)) for s in segments]),
            np.concatenate(
                [s.passages + np.int32(o) for s, o in zip(segments, offsets, strict=False)]
            ),
            np.concatenate([s.counts for s in segments]),
            np.concatenate([s.ids for s in segments]),
            np.concatenate([s.lengths for s in segments]),
        )

    @classmethod
    def _sorted(
        cls,
        hashes: HashArray,
        places: _Positions,
        counts: CountArray,
        ids: IdArray,
        lengths: ScoreArray,
    ) -> Segment:
        order = np.argsort(hashes, kind="stable")
        hashes = hashes[order]
        first = np.flatnonzero(np.diff(hashes, prepend=hashes[:1] ^ np.uint32(1)))
        bounds = np.append(first, len(hashes)).astype(np.int64)
        return cls(hashes[first], bounds, places[order], counts[order], ids, lengths)

    def without(self, dead: IdArray) -> Segment:
        """The segment without these passages."""
        keep = ~np.isin(self.ids, dead)
        renumbered = np.cumsum(keep, dtype=np.int32) - np.int32(1)
        alive = keep[self.passages]
        hashes = np.repeat(self.terms, np.diff(self.bounds))[alive]
        places = renumbered[self.passages[alive]]
        return self._sorted(hashes, places, self.counts[alive], self.ids[keep], self.lengths[keep])

    def postings(self, term: int) -> tuple[_Positions, CountArray]:
        """Places of the passages that hold the term, and how often."""
        place = int(np.searchsorted(self.terms, np.uint32(term)))
        if place == len(self.terms) or self.terms[place] != term:
            return self.passages[:0], self.counts[:0]
        begin, end = self.bounds[place], self.bounds[place + 1]
        return self.passages[begin:end], self.counts[begin:end]


class LexicalIndex:
    """BM25 search. Not thread-safe: the owner serialises changes; `search` only reads."""

    def __init__(self) -> None:
        self._segments: tuple[Segment, ...] = ()
        self._length_sum = 0.0
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def add(self, passages: Sequence[tuple[int, Terms]]) -> None:
        """Adds (passage id, terms); ids ascend, and are above all that were added before."""
        if passages:
            self._replace([*self._segments, Segment.build(passages)])

    def remove(self, ids: IdArray) -> None:
        """Removes passages; ids that are not there do not matter."""
        segments = []
        for segment in self._segments:
            first, last = np.searchsorted(ids, (segment.ids[0], segment.ids[-1] + 1))
            segments.append(segment.without(ids[first:last]) if first < last else segment)
        self._replace([segment for segment in segments if len(segment.ids)])

    def _replace(self, segments: list[Segment]) -> None:
        while len(segments) > 1 and len(segments[-1].ids) >= max(
            _MERGE_SHARE * len(segments[-2].ids), 1 if len(segments[-2].ids) < _SMALL_SEGMENT else 0
        ):
            segments[-2:] = [Segment.merge(segments[-2:])]
        self._length_sum = sum(float(s.lengths.sum(dtype=np.float64)) for s in segments)
        self._size = sum(len(segment.ids) for segment in segments)
        self._segments = tuple(segments)

    def search(self, query: Terms, limit: int) -> Hits:
        """The best passages for the query's terms; each counts once, as in BM25 without k3."""
        segments, size = self._segments, self._size
        if not size or not len(query.hashes):
            return NO_HITS
        average = self._length_sum / size or 1.0
        scores = [np.zeros(len(segment.ids), np.float32) for segment in segments]
        norms = [K1 * (1 - B + B / average * segment.lengths) for segment in segments]
        ceiling = 0.0
        for term in query.hashes.tolist():
            found = [segment.postings(term) for segment in segments]
            df = sum(len(places) for places, _ in found)
            idf = np.float32(np.log1p((size - df + 0.5) / (df + 0.5)))
            ceiling += float(idf)
            for (places, counts), score, norm in zip(found, scores, norms, strict=True):
                if len(places):
                    tf = counts.astype(np.float32)
                    score[places] += idf * (tf / (tf + norm[places]))
        ids = np.concatenate([segment.ids for segment in segments])
        return replace(best(ids, np.concatenate(scores), limit), ceiling=ceiling)


def best(ids: IdArray, scores: ScoreArray, limit: int) -> Hits:
    """The `limit` highest positive scores, descending, ties by id."""
    if len(scores) > limit:
        top = np.argpartition(scores, len(scores) - limit)[len(scores) - limit :]
        ids, scores = ids[top], scores[top]
    positive = scores > 0
    ids, scores = ids[positive], scores[positive]
    order = np.lexsort((ids, -scores))
    return Hits(ids[order], scores[order])
