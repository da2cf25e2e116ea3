"""A collection's file: SQLite in write-ahead mode. What was committed survives a kill -9.

Rows are numbered upwards and never renumbered, so that whoever keeps an index of them in
memory, in this process or another, catches up by reading what has a higher number.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from miaotui.retrieval.encoder import Vectors
from miaotui.retrieval.errors import StoreError
from miaotui.retrieval.lexical import IdArray
from miaotui.retrieval.passages import PASSAGES_VERSION
from miaotui.retrieval.prepare import Prepared
from miaotui.retrieval.stored import (
    DOCUMENT_COLUMNS,
    Document,
    Marks,
    StoredPassage,
    compressed,
    decompressed,
    read_marks,
    written_marks,
)
from miaotui.retrieval.terms import TERMS_VERSION, Terms, count_terms

_LAYOUT = 1
_BUSY_SECONDS = 30.0
# Files of before have no such index.
_LATER = "CREATE INDEX IF NOT EXISTS passages_by_chinese ON passages (chinese)"
_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE documents (
  number INTEGER PRIMARY KEY AUTOINCREMENT,
  id TEXT NOT NULL UNIQUE,
  source TEXT NOT NULL,
  title TEXT NOT NULL,
  sha256 TEXT NOT NULL,
  size INTEGER NOT NULL,
  characters INTEGER NOT NULL,
  passages INTEGER NOT NULL,
  cutting INTEGER NOT NULL,
  added REAL NOT NULL,
  marks TEXT NOT NULL,
  text BLOB NOT NULL
);
CREATE TABLE passages (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  document INTEGER NOT NULL REFERENCES documents (number),
  start INTEGER NOT NULL,
  "end" INTEGER NOT NULL,
  chinese REAL NOT NULL,
  text TEXT NOT NULL,
  hashes BLOB NOT NULL,
  counts BLOB NOT NULL
);
CREATE INDEX passages_of_document ON passages (document);
CREATE TABLE vectors (
  seq INTEGER PRIMARY KEY AUTOINCREMENT,
  passage INTEGER NOT NULL UNIQUE,
  vector BLOB NOT NULL
);
CREATE TABLE removals (
  seq INTEGER PRIMARY KEY AUTOINCREMENT,
  first INTEGER NOT NULL,
  last INTEGER NOT NULL
);
"""


class Database:
    """One connection's statements. Not thread-safe; open one each for reading and writing."""

    def __init__(self, path: Path, collection: str = "") -> None:
        """Opens the file; makes it where there is none and a collection's name is given.

        Raises `StoreError`.
        """
        try:
            if not collection and not path.is_file():
                raise StoreError(f"{path} is not there")
            self._sql = sqlite3.connect(
                path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            self._sql.execute("PRAGMA journal_mode = WAL")
            self._sql.execute("PRAGMA synchronous = FULL")
            self._sql.execute("PRAGMA mmap_size = 268435456")
            self._prepare(collection)
        except sqlite3.Error as error:
            raise StoreError(f"{path} cannot be used: {error}") from None
        layout = self.meta("layout")
        if layout != str(_LAYOUT):
            raise StoreError(f"{path} was made by another version of Miaotui (layout {layout})")

    def _prepare(self, collection: str) -> None:
        with self.transaction():
            if self._sql.execute("SELECT 1 FROM sqlite_master").fetchone() is None:
                for statement in _SCHEMA.split(";\n"):
                    self._sql.execute(statement)
                self.set_meta("layout", str(_LAYOUT))
                self.set_meta("collection", collection)
                self.set_meta("terms", str(TERMS_VERSION))
            self._sql.execute(_LATER)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All of it or nothing, on disk when it ends."""
        self._sql.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._sql.execute("ROLLBACK")
            raise
        self._sql.execute("COMMIT")

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Reads in it see one state of the file."""
        self._sql.execute("BEGIN")
        try:
            yield
        finally:
            self._sql.execute("ROLLBACK")

    def close(self) -> None:
        """Closes the connection."""
        self._sql.close()

    def meta(self, key: str) -> str:
        """A property of the collection; empty where it is not set."""
        row = self._sql.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return str(row[0]) if row else ""

    def set_meta(self, key: str, value: str) -> None:
        """Sets a property of the collection."""
        self._sql.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    @property
    def version(self) -> int:
        """Changes whenever another connection, of whatever process, has committed."""
        return int(self._sql.execute("PRAGMA data_version").fetchone()[0])

    # -- documents ------------------------------------------------------------------------

    def is_current(self, identifier: str, sha256: str) -> bool:
        """Whether the document is there in this version, cut as it would be cut now."""
        row = self._sql.execute(
            "SELECT 1 FROM documents WHERE id = ? AND sha256 = ? AND cutting = ?",
            (identifier, sha256, PASSAGES_VERSION),
        ).fetchone()
        return row is not None

    def insert(self, identifier: str, prepared: Prepared) -> None:
        """Adds a document that is not there."""
        extracted = prepared.extracted
        number = self._sql.execute(
            "INSERT INTO documents (id, source, title, sha256, size, characters, passages, "
            "cutting, added, marks, text) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                identifier,
                prepared.source,
                extracted.title,
                prepared.sha256,
                prepared.size,
                len(extracted.text),
                len(prepared.passages),
                PASSAGES_VERSION,
                time.time(),
                written_marks(extracted),
                compressed(extracted.text),
            ),
        ).lastrowid
        self._sql.executemany(
            'INSERT INTO passages (document, start, "end", chinese, text, hashes, counts) '
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                (
                    number,
                    passage.start,
                    passage.end,
                    passage.chinese,
                    extracted.text[passage.start : passage.end],
                    passage.terms.hashes.astype("<u4").tobytes(),
                    passage.terms.counts.tobytes(),
                )
                for passage in prepared.passages
            ),
        )

    def delete(self, identifier: str) -> bool:
        """Removes a document and all that belongs to it; whether it was there."""
        row = self._sql.execute(
            "SELECT number FROM documents WHERE id = ?", (identifier,)
        ).fetchone()
        if row is None:
            return False
        # A document's passages were numbered in one transaction: they follow each other.
        first, last = self._sql.execute(
            "SELECT min(id), max(id) FROM passages WHERE document = ?", row
        ).fetchone()
        if first is not None:
            self._sql.execute("DELETE FROM vectors WHERE passage BETWEEN ? AND ?", (first, last))
            self._sql.execute("DELETE FROM passages WHERE document = ?", row)
            self._sql.execute("INSERT INTO removals (first, last) VALUES (?, ?)", (first, last))
        self._sql.execute("DELETE FROM documents WHERE number = ?", row)
        return True

    def documents(self, limit: int, after: str = "") -> list[Document]:
        """Documents by source, the first `limit` after the document `after`."""
        where = ""
        values: tuple[str, ...] = ()
        if after:
            where = "WHERE (d.source, d.id) > (SELECT source, id FROM documents WHERE id = ?)"
            values = (after,)
        rows = self._sql.execute(
            f"SELECT {DOCUMENT_COLUMNS} FROM documents d {where} ORDER BY d.source, d.id LIMIT ?",
            (*values, limit),
        )
        return [Document(*row) for row in rows]

    def document(self, identifier: str) -> tuple[Document, Marks] | None:
        """A document, or `None`."""
        row = self._sql.execute(
            f"SELECT {DOCUMENT_COLUMNS}, d.marks FROM documents d WHERE d.id = ?", (identifier,)
        ).fetchone()
        return (Document(*row[:-1]), read_marks(row[-1])) if row else None

    def text(self, identifier: str) -> str | None:
        """A document's text, which all offsets are about."""
        row = self._sql.execute("SELECT text FROM documents WHERE id = ?", (identifier,)).fetchone()
        return decompressed(row[0]) if row else None

    def counts(self, most_chinese: float) -> tuple[int, int, int, int]:
        """(documents, passages, vectors, passages with no more Chinese than `most_chinese`)."""
        documents, passages = self._sql.execute(
            "SELECT count(*), coalesce(sum(passages), 0) FROM documents"
        ).fetchone()
        (vectors,) = self._sql.execute("SELECT count(*) FROM vectors").fetchone()
        (readable,) = self._sql.execute(
            "SELECT count(*) FROM passages WHERE chinese <= ?", (most_chinese,)
        ).fetchone()
        return documents, passages, vectors, readable

    # -- passages -------------------------------------------------------------------------

    def passages(self, ids: list[int]) -> dict[int, StoredPassage]:
        """Those of the passages that are there, by id."""
        holes = ",".join("?" * len(ids))
        rows = self._sql.execute(
            f'SELECT p.id, p.start, p."end", p.text, p.chinese, d.marks, {DOCUMENT_COLUMNS} '
            f"FROM passages p JOIN documents d ON d.number = p.document WHERE p.id IN ({holes})",
            ids,
        )
        return {
            row[0]: StoredPassage(
                row[0], Document(*row[6:]), read_marks(row[5]), row[1], row[2], row[3], row[4]
            )
            for row in rows
        }

    def terms_after(self, passage: int) -> list[tuple[int, Terms]]:
        """(id, terms) of the passages with a higher id, ascending."""
        rows = self._sql.execute(
            "SELECT id, hashes, counts FROM passages WHERE id > ? ORDER BY id", (passage,)
        )
        return [
            (row[0], Terms(np.frombuffer(row[1], "<u4"), np.frombuffer(row[2], np.uint8)))
            for row in rows
        ]

    def renew_terms(self) -> None:
        """Counts all terms anew where they were counted in another way."""
        if self.meta("terms") == str(TERMS_VERSION):
            return
        with self.transaction():
            for identifier, text in self._sql.execute("SELECT id, text FROM passages").fetchall():
                terms = count_terms(text)
                self._sql.execute(
                    "UPDATE passages SET hashes = ?, counts = ? WHERE id = ?",
                    (terms.hashes.astype("<u4").tobytes(), terms.counts.tobytes(), identifier),
                )
            self.set_meta("terms", str(TERMS_VERSION))

    # -- vectors --------------------------------------------------------------------------

    def without_vector(self, after: int, limit: int, most_chinese: float) -> list[tuple[int, str]]:
        """(id, text) of passages with a higher id than `after` that still need a vector."""
        rows = self._sql.execute(
            "SELECT p.id, p.text FROM passages p WHERE p.id > ? AND p.chinese <= ? AND NOT EXISTS "
            "(SELECT 1 FROM vectors v WHERE v.passage = p.id) ORDER BY p.id LIMIT ?",
            (after, most_chinese, limit),
        )
        return [(row[0], row[1]) for row in rows]

    def insert_vectors(self, ids: list[int], vectors: Vectors) -> None:
        """Keeps vectors, [ids, dimensions], in half precision; passages that are gone do not
        matter."""
        self._sql.executemany(
            "INSERT INTO vectors (passage, vector) SELECT ?1, ?2 "
            "WHERE EXISTS (SELECT 1 FROM passages WHERE id = ?1) "
            "ON CONFLICT (passage) DO NOTHING",
            zip(ids, (row.tobytes() for row in vectors.astype("<f2")), strict=True),
        )

    def vectors_after(self, seq: int) -> tuple[int, IdArray, Vectors | None]:
        """(highest number, passage ids, vectors) of what has a higher number than `seq`."""
        rows = self._sql.execute(
            "SELECT seq, passage, vector FROM vectors WHERE seq > ? ORDER BY seq", (seq,)
        ).fetchall()
        if not rows:
            return seq, np.empty(0, np.int64), None
        ids = np.array([row[1] for row in rows], np.int64)
        joined = b"".join(row[2] for row in rows)
        vectors = np.frombuffer(joined, "<f2").reshape(len(rows), -1).astype(np.float32)
        return rows[-1][0], ids, vectors

    def renew_vectors(self, encoder: str) -> None:
        """Forgets all vectors where they are of another encoder."""
        if self.meta("encoder") == encoder:
            return
        with self.transaction():
            self._sql.execute("DELETE FROM vectors")
            self.set_meta("encoder", encoder)

    # -- removals -------------------------------------------------------------------------

    def removals_after(self, seq: int) -> tuple[int, IdArray]:
        """(highest number, ids of passages removed) with a higher number than `seq`."""
        rows = self._sql.execute(
            "SELECT seq, first, last FROM removals WHERE seq > ? ORDER BY seq", (seq,)
        ).fetchall()
        if not rows:
            return seq, np.empty(0, np.int64)
        gone = np.concatenate([np.arange(first, last + 1) for _, first, last in rows])
        return rows[-1][0], np.unique(gone).astype(np.int64)
