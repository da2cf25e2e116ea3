"""A collection of documents: kept in a file, searched in memory."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from miaotui.retrieval.database import Database
from miaotui.retrieval.encoder import Vectors
from miaotui.retrieval.errors import StoreError
from miaotui.retrieval.fusion import Ranked, fuse
from miaotui.retrieval.lexical import NO_HITS, Hits, IdArray, LexicalIndex
from miaotui.retrieval.prepare import Prepared
from miaotui.retrieval.stored import Document, Marks, StoredPassage
from miaotui.retrieval.terms import count_terms
from miaotui.retrieval.vectors import VectorIndex

# How many of each retriever's best are fused.
DEPTH = 100
# The encoder knows no Chinese: passages with more of it than this get no vector.
MOST_CHINESE = 0.3
DENSE_WEIGHT = 1.0


# Gives the query's vector, float32 [dimensions], or `None` where there is none; may wait for
# it. It is called late, so that encoding and the lexical search go side by side.
VectorOf = Callable[[], Vectors | None]


class Outcome(StrEnum):
    """What adding a document did."""

    ADDED = "added"
    REPLACED = "replaced"
    UNCHANGED = "unchanged"


@dataclass(frozen=True, slots=True)
class Counts:
    """What a collection holds. `vectors`: passages that dense retrieval finds; `waiting`: those
    that still need a vector for it."""

    documents: int
    passages: int
    vectors: int
    waiting: int


@dataclass(frozen=True, slots=True)
class Found:
    """A passage found, and why."""

    passage: StoredPassage
    ranked: Ranked


class Collection(Protocol):
    """What the product needs of a collection. Another store (a search server) is another class
    with these methods. Thread-safe; every method may block."""

    name: str

    def has(self, source: str, sha256: str) -> bool:
        """Whether adding this version of the document would change nothing."""
        ...

    def add(self, prepared: Prepared) -> tuple[Outcome, str]:
        """Adds or replaces a document; what was done, and its id. On disk, and found by
        lexical searches, when this returns."""
        ...

    def delete(self, identifier: str) -> bool:
        """Removes a document; whether it was there."""
        ...

    def documents(self, limit: int, after: str = "") -> list[Document]:
        """Documents by source, the first `limit` after the document with the id `after`."""
        ...

    def document(self, identifier: str) -> tuple[Document, Marks] | None:
        """A document by its id."""
        ...

    def text(self, identifier: str) -> str | None:
        """A document's text, which all offsets are about."""
        ...

    def counts(self) -> Counts:
        """What it holds."""
        ...

    def search(self, query: str, vector: VectorOf | None, limit: int) -> list[Found]:
        """The best passages, by terms and, with a `vector`, by meaning."""
        ...

    def without_vector(self, after: int, limit: int) -> list[tuple[int, str]]:
        """(id, text) of passages with ids above `after` that still need a vector."""
        ...

    def add_vectors(self, ids: Sequence[int], vectors: Vectors) -> None:
        """Keeps passages' vectors, [ids, dimensions]."""
        ...


def document_id(source: str) -> str:
    """A document's id: the same for all versions of what comes from one source."""
    return hashlib.blake2b(source.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()


class SqliteCollection:
    """A `Collection` in one SQLite file, which several processes may use at once."""

    def __init__(self, path: Path, name: str = "", *, encoder: str = "") -> None:
        """Opens the file, or makes it where a name is given.

        `encoder`: name of what makes the vectors; vectors of another one are dropped.
        Raises `StoreError`.
        """
        self._write = Database(path, name)
        self._read = Database(path)
        self.name = self._write.meta("collection")
        if name and name != self.name:
            raise StoreError(f"{path} belongs to the collection {self.name!r}")
        self._writing = threading.Lock()
        self._reading = threading.Lock()
        self._syncing = threading.Lock()
        self.lexical = LexicalIndex()
        """Every passage's terms, as far as this process has caught up."""
        self.dense: VectorIndex | None = None
        """The vectors that there are; `None` before the first."""
        self._version = -1
        self._seen_passage = self._seen_vector = self._seen_removal = 0
        self._write.renew_terms()
        if encoder:
            self._write.renew_vectors(encoder)
        self._sync()

    def close(self) -> None:
        """Closes the file."""
        with self._writing, self._reading:
            self._write.close()
            self._read.close()

    # -- changes --------------------------------------------------------------------------

    def has(self, source: str, sha256: str) -> bool:
        """See `Collection.has`."""
        with self._reading:
            return self._read.is_current(document_id(source), sha256)

    def add(self, prepared: Prepared) -> tuple[Outcome, str]:
        """See `Collection.add`."""
        identifier = document_id(prepared.source)
        with self._writing, self._write.transaction():
            if self._write.is_current(identifier, prepared.sha256):
                return Outcome.UNCHANGED, identifier
            replaced = self._write.delete(identifier)
            self._write.insert(identifier, prepared)
        self._sync()
        return Outcome.REPLACED if replaced else Outcome.ADDED, identifier

    def delete(self, identifier: str) -> bool:
        """See `Collection.delete`."""
        with self._writing, self._write.transaction():
            deleted = self._write.delete(identifier)
        self._sync()
        return deleted

    def add_vectors(self, ids: Sequence[int], vectors: Vectors) -> None:
        """See `Collection.add_vectors`."""
        with self._writing, self._write.transaction():
            self._write.insert_vectors(list(ids), vectors)
        self._sync()

    # -- looks ----------------------------------------------------------------------------

    def documents(self, limit: int, after: str = "") -> list[Document]:
        """See `Collection.documents`."""
        with self._reading:
            return self._read.documents(limit, after)

    def document(self, identifier: str) -> tuple[Document, Marks] | None:
        """See `Collection.document`."""
        with self._reading:
            return self._read.document(identifier)

    def text(self, identifier: str) -> str | None:
        """See `Collection.text`."""
        with self._reading:
            return self._read.text(identifier)

    def counts(self) -> Counts:
        """See `Collection.counts`."""
        with self._reading:
            documents, passages, vectors, readable = self._read.counts(MOST_CHINESE)
        return Counts(documents, passages, vectors, max(0, readable - vectors))

    def vectors(self) -> tuple[int, IdArray, Vectors | None]:
        """All vectors: (highest number, passage ids, [ids, dimensions])."""
        with self._reading:
            return self._read.vectors_after(0)

    def without_vector(
        self, after: int, limit: int, most_chinese: float = MOST_CHINESE
    ) -> list[tuple[int, str]]:
        """See `Collection.without_vector`."""
        with self._reading:
            return self._read.without_vector(after, limit, most_chinese)

    # -- search ---------------------------------------------------------------------------

    def rank(self, query: str, vector: VectorOf | None, limit: int) -> list[Ranked]:
        """The best passages' ids and scores."""
        if self._changed() and self._syncing.acquire(blocking=False):
            # Where another thread is at it, the state before is searched instead of waiting.
            try:
                self._catch_up()
            finally:
                self._syncing.release()
        lexical = self.lexical.search(count_terms(query), max(DEPTH, limit))
        dense: Hits = NO_HITS
        if vector is not None and self.dense is not None:
            encoded = vector()
            if encoded is not None:
                dense = self.dense.search(encoded, max(DEPTH, limit))
        return fuse(lexical, dense, dense_weight=DENSE_WEIGHT, limit=limit)

    def search(self, query: str, vector: VectorOf | None, limit: int) -> list[Found]:
        """See `Collection.search`."""
        return self.look_up(self.rank(query, vector, limit))

    def look_up(self, ranked: Sequence[Ranked]) -> list[Found]:
        """The passages of a ranking; those that are gone meanwhile are left out."""
        with self._reading:
            passages = self._read.passages([r.passage for r in ranked])
        return [Found(passages[r.passage], r) for r in ranked if r.passage in passages]

    # -- the index in memory --------------------------------------------------------------

    def _changed(self) -> bool:
        with self._reading:
            return self._read.version != self._version

    def _sync(self) -> None:
        with self._syncing:
            self._catch_up()

    def _catch_up(self) -> None:
        """Takes in what was committed since, by this process or another."""
        with self._reading, self._read.snapshot():
            version = self._read.version
            self._seen_removal, gone = self._read.removals_after(self._seen_removal)
            terms = self._read.terms_after(self._seen_passage)
            self._seen_vector, ids, vectors = self._read.vectors_after(self._seen_vector)
        if len(gone):
            self.lexical.remove(gone)
            if self.dense is not None:
                self.dense.remove(gone)
        if terms:
            self.lexical.add(terms)
            self._seen_passage = terms[-1][0]
        if vectors is not None:
            if self.dense is None:
                self.dense = VectorIndex(vectors.shape[1])
            self.dense.add(ids, vectors)
        self._version = version
