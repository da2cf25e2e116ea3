"""Nearest vectors by cosine: signs choose candidates, dot products rank them.

A vector's signs are 384 bits; that they differ in few places says that the vectors are near
(Charikar, STOC 2002). Comparing them with all is a few passes over 5 MB for 100,000 vectors,
where the exact product reads 154 MB. The best candidates are then ranked exactly; how many of
the exact best come out is part of `tests/bench/retrieval.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from miaotui.retrieval.encoder import Vectors
from miaotui.retrieval.lexical import NO_HITS, Hits, IdArray, best

# So many are ranked exactly, and all of them where there are no more than a few times as many.
CANDIDATES = 2000
_EXACT = 4 * CANDIDATES
_FIRST_ROOM = 1024
_NOBODY = -1

_Bits = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class _View:
    """What a search reads: rows, ids and signs (uint64 [words, room]: word w of row r's bits
    is at [w, r]) up to `used`; what lies behind is being written."""

    rows: Vectors
    ids: IdArray
    signs: _Bits
    used: int

    @classmethod
    def empty(cls, room: int, dimensions: int) -> _View:
        """Room for `room` vectors."""
        return cls(
            np.empty((room, dimensions), np.float32),
            np.full(room, _NOBODY, np.int64),
            np.empty((-(-dimensions // 64), room), np.uint64),
            0,
        )


class VectorIndex:
    """Changes are the owner's to serialise; `search` may run beside them."""

    def __init__(self, dimensions: int) -> None:
        """`dimensions`: length of a vector."""
        self._dimensions = dimensions
        self._view = _View.empty(0, dimensions)
        self._dead = 0

    def __len__(self) -> int:
        return self._view.used - self._dead

    def add(self, ids: IdArray, vectors: Vectors) -> None:
        """Adds vectors, [ids, dimensions], of length 1."""
        if self._view.used + len(ids) > len(self._view.rows):
            self._rebuild(max(_FIRST_ROOM, 2 * (len(self) + len(ids))))
        self._view = _appended(self._view, ids, vectors)

    def remove(self, ids: IdArray) -> None:
        """Removes vectors; ids that are not there do not matter."""
        view = self._view
        gone = np.isin(view.ids[: view.used], ids)
        if not gone.any():
            return
        renamed = view.ids.copy()  # a search under way keeps the old names
        renamed[: view.used][gone] = _NOBODY
        self._view = _View(view.rows, renamed, view.signs, view.used)
        self._dead += int(gone.sum())
        if self._dead > max(_FIRST_ROOM, view.used // 4):
            self._rebuild(len(view.rows))

    def _rebuild(self, room: int) -> None:
        """Moves the living to new arrays with room for `room`."""
        view = self._view
        living = np.flatnonzero(view.ids[: view.used] != _NOBODY)
        moved = _View.empty(room, self._dimensions)
        self._view = _appended(moved, view.ids[living], view.rows[living])
        self._dead = 0

    def search(self, query: Vectors, limit: int, *, exact: bool = False) -> Hits:
        """The vectors nearest to `query` ([dimensions], of length 1), by cosine.

        `exact`: rank all of them, which takes many times as long where there are many.
        """
        view = self._view
        if not view.used:
            return NO_HITS
        ids, rows = view.ids[: view.used], view.rows[: view.used]
        if not exact and view.used > _EXACT:
            wanted = _signs(query[None])[:, 0]
            distances = np.zeros(view.used, np.uint16)
            for word, bits in zip(wanted, view.signs, strict=True):
                distances += np.bitwise_count(bits[: view.used] ^ word)
            near = np.argpartition(distances, CANDIDATES)[:CANDIDATES]
            ids, rows = ids[near], rows[near]
        scores = rows @ query
        scores[ids == _NOBODY] = -1.0
        return best(ids, scores, limit)


def _appended(view: _View, ids: IdArray, vectors: Vectors) -> _View:
    end = view.used + len(ids)
    view.rows[view.used : end] = vectors
    view.ids[view.used : end] = ids
    view.signs[:, view.used : end] = _signs(vectors)
    return _View(view.rows, view.ids, view.signs, end)


def _signs(vectors: Vectors) -> _Bits:
    """uint64 [words, vectors] of float [vectors, dimensions]."""
    packed = np.packbits(vectors > 0, axis=1)
    padded = np.pad(packed, ((0, 0), (0, -packed.shape[1] % 8)))
    return np.ascontiguousarray(padded.view(np.uint64).T)
