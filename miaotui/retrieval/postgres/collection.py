"""A collection on a PostgreSQL server, which also searches it."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from psycopg import sql

from miaotui.retrieval.collection import (
    DENSE_WEIGHT,
    DEPTH,
    MOST_CHINESE,
    Counts,
    Found,
    Outcome,
    VectorOf,
    document_id,
)
from miaotui.retrieval.encoder import Vectors
from miaotui.retrieval.errors import StoreError
from miaotui.retrieval.fusion import Ranked, fuse
from miaotui.retrieval.lexical import K1, NO_HITS, B, Hits, best
from miaotui.retrieval.passages import PASSAGES_VERSION
from miaotui.retrieval.postgres.postings import insert_postings, signed
from miaotui.retrieval.postgres.server import Connection, Server
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

_RENEWED_AT_ONCE = 500
_MOST_INDEXED_DIMENSIONS = 2000  # of pgvector's HNSW
# BM25 as `LexicalIndex.search` computes it; the weights' sum is the ceiling of found terms.
_BM25 = f"""
WITH hits AS MATERIALIZED (
  SELECT term, passage, count::float8 AS tf, length FROM postings
  WHERE collection = %(collection)s AND term = ANY(%(terms)s::integer[])
), weights AS MATERIALIZED (
  SELECT term, ln(1 + (%(size)s - count(*) + 0.5)::float8 / (count(*) + 0.5)) AS idf
  FROM hits GROUP BY term
)
SELECT passage, sum(idf * tf / (tf + {K1} * (1 - {B} + {B} / %(average)s::float8 * length))),
  (SELECT count(*) FROM weights), (SELECT sum(idf) FROM weights)
FROM hits JOIN weights USING (term) GROUP BY passage ORDER BY 2 DESC, 1 LIMIT %(limit)s
"""


@dataclass(frozen=True, slots=True)
class _State:
    """A collection's own row. `length`: terms of all passages; `dimensions` 0: no vectors yet."""

    encoder: str
    dimensions: int
    terms: int
    documents: int
    passages: int
    vectors: int
    length: int


class PostgresCollection:
    """A `Collection` in tables. Whoever changes it holds the lock of its row in `collections`,
    so that its passages' ids grow in the order in which they can be seen."""

    def __init__(self, server: Server, number: int, name: str) -> None:
        """`number`: its row's."""
        self.name = name
        self._server = server
        self._number = number
        # A table of vectors each: an index of all would have to leave out other collections'.
        self._vectors = sql.Identifier(f"vectors_{number}")

    # -- changes --------------------------------------------------------------------------

    def has(self, source: str, sha256: str) -> bool:
        """See `Collection.has`."""
        with self._server.reading() as connection:
            return self._is_current(connection, document_id(source), sha256)

    def add(self, prepared: Prepared) -> tuple[Outcome, str]:
        """See `Collection.add`."""
        identifier = document_id(prepared.source)
        with self._server.writing() as connection:
            state = self._locked(connection)
            if self._is_current(connection, identifier, prepared.sha256):
                return Outcome.UNCHANGED, identifier
            replaced = self._remove(connection, identifier, state)
            self._insert(connection, identifier, prepared)
        return Outcome.REPLACED if replaced else Outcome.ADDED, identifier

    def delete(self, identifier: str) -> bool:
        """See `Collection.delete`."""
        with self._server.writing() as connection:
            return self._remove(connection, identifier, self._locked(connection))

    def add_vectors(self, ids: Sequence[int], vectors: Vectors) -> None:
        """See `Collection.add_vectors`."""
        with self._server.writing() as connection:
            dimensions = self._locked(connection).dimensions
            if not dimensions:
                dimensions = vectors.shape[1]
                self._make_vectors(connection, dimensions)
            if vectors.shape[1] != dimensions:
                raise StoreError(f"{self.name}: vectors have {dimensions} numbers here")
            added = connection.execute(
                sql.SQL(
                    "INSERT INTO {} (passage, vector) SELECT p.id, v.written::vector "
                    "FROM unnest(%s::bigint[], %s::text[]) v (id, written) "
                    "JOIN passages p ON p.id = v.id AND p.collection = %s "
                    "ON CONFLICT (passage) DO NOTHING"
                ).format(self._vectors),
                (list(ids), [_written(row) for row in vectors], self._number),
            ).rowcount
            self._count(connection, vectors=added)

    def renew(self, encoder: str) -> None:
        """Forgets vectors of another encoder, and counts terms anew where they were counted in
        another way."""
        with self._server.writing() as connection:
            state = self._locked(connection)
            if encoder and state.encoder != encoder:
                connection.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(self._vectors))
                connection.execute(
                    "UPDATE collections SET encoder = %s, dimensions = 0, vectors = 0 "
                    "WHERE number = %s",
                    (encoder, self._number),
                )
            if state.terms != TERMS_VERSION:
                self._renew_terms(connection)

    # -- looks ----------------------------------------------------------------------------

    def documents(self, limit: int, after: str = "") -> list[Document]:
        """See `Collection.documents`."""
        where = "d.collection = %(collection)s"
        if after:
            where += (
                " AND (d.source, d.id) > (SELECT source, id FROM documents "
                "WHERE collection = %(collection)s AND id = %(after)s)"
            )
        with self._server.reading() as connection:
            rows = connection.execute(
                f"SELECT {DOCUMENT_COLUMNS} FROM documents d WHERE {where} "
                "ORDER BY d.source, d.id LIMIT %(limit)s",
                {"collection": self._number, "after": after, "limit": limit},
            ).fetchall()
        return [_document(*row) for row in rows]

    def document(self, identifier: str) -> tuple[Document, Marks] | None:
        """See `Collection.document`."""
        with self._server.reading() as connection:
            row = connection.execute(
                f"SELECT {DOCUMENT_COLUMNS}, d.marks FROM documents d "
                "WHERE d.collection = %s AND d.id = %s",
                (self._number, identifier),
            ).fetchone()
        return (_document(*row[:-1]), read_marks(row[-1])) if row else None

    def text(self, identifier: str) -> str | None:
        """See `Collection.text`."""
        with self._server.reading() as connection:
            row = connection.execute(
                "SELECT text FROM documents WHERE collection = %s AND id = %s",
                (self._number, identifier),
            ).fetchone()
        return decompressed(row[0]) if row else None

    def counts(self) -> Counts:
        """See `Collection.counts`."""
        with self._server.reading() as connection:
            state = self._state(connection)
            row = connection.execute(
                "SELECT count(*) FROM passages WHERE collection = %s AND chinese <= %s",
                (self._number, MOST_CHINESE),
            ).fetchone()
        assert row is not None
        waiting = max(0, row[0] - state.vectors)
        return Counts(state.documents, state.passages, state.vectors, waiting)

    def without_vector(
        self, after: int, limit: int, most_chinese: float = MOST_CHINESE
    ) -> list[tuple[int, str]]:
        """See `Collection.without_vector`."""
        with self._server.reading() as connection:
            lacking: sql.Composable = sql.SQL("")
            if self._state(connection).dimensions:
                lacking = sql.SQL(
                    "AND NOT EXISTS (SELECT 1 FROM {} v WHERE v.passage = p.id)"
                ).format(self._vectors)
            rows = connection.execute(
                sql.SQL(
                    "SELECT p.id, p.text FROM passages p WHERE p.collection = %s AND p.id > %s "
                    "AND p.chinese <= %s {} ORDER BY p.id LIMIT %s"
                ).format(lacking),
                (self._number, after, most_chinese, limit),
            ).fetchall()
        return [(row[0], _text(row[1])) for row in rows]

    # -- search ---------------------------------------------------------------------------

    def rank(self, query: str, vector: VectorOf | None, limit: int) -> list[Ranked]:
        """The best passages' ids and scores."""
        depth = max(DEPTH, limit)
        with self._server.reading() as connection:
            state = self._state(connection)
            lexical = self._lexical(connection, state, count_terms(query), depth)
        dense = NO_HITS
        if vector is not None and state.dimensions:
            # No connection is held while the query's vector is waited for.
            encoded = vector()
            if encoded is not None:
                with self._server.reading() as connection:
                    dense = self._dense(connection, encoded, depth)
        return fuse(lexical, dense, dense_weight=DENSE_WEIGHT, limit=limit)

    def search(self, query: str, vector: VectorOf | None, limit: int) -> list[Found]:
        """See `Collection.search`."""
        return self.look_up(self.rank(query, vector, limit))

    def look_up(self, ranked: Sequence[Ranked]) -> list[Found]:
        """The passages of a ranking; those that are gone meanwhile are left out."""
        if not ranked:
            return []
        with self._server.reading() as connection:
            rows = connection.execute(
                f"SELECT p.id, p.begins, p.ends, p.text, p.chinese, d.marks, {DOCUMENT_COLUMNS} "
                "FROM passages p JOIN documents d ON d.number = p.document "
                "WHERE p.collection = %s AND p.id = ANY(%s::bigint[])",
                (self._number, [one.passage for one in ranked]),
            ).fetchall()
        passages = {
            row[0]: StoredPassage(
                row[0],
                _document(*row[6:]),
                read_marks(row[5]),
                row[1],
                row[2],
                _text(row[3]),
                row[4],
            )
            for row in rows
        }
        return [Found(passages[r.passage], r) for r in ranked if r.passage in passages]

    def _lexical(self, connection: Connection, state: _State, query: Terms, limit: int) -> Hits:
        if not state.passages or not len(query.hashes):
            return NO_HITS
        rows = connection.execute(
            _BM25,
            {
                "collection": self._number,
                "terms": signed(query.hashes).tolist(),
                "size": state.passages,
                "average": state.length / state.passages or 1.0,
                "limit": limit,
            },
        ).fetchall()
        if not rows:
            return NO_HITS
        unknown = len(query.hashes) - rows[0][2]
        ceiling = rows[0][3] + unknown * math.log1p((state.passages + 0.5) / 0.5)
        return replace(_hits(rows, limit), ceiling=ceiling)

    def _dense(self, connection: Connection, query: Vectors, limit: int) -> Hits:
        rows = connection.execute(
            sql.SQL(
                "SELECT passage, -(vector <#> %(query)s::vector) FROM {} "
                "ORDER BY vector <#> %(query)s::vector LIMIT %(limit)s"
            ).format(self._vectors),
            {"query": _written(query), "limit": limit},
        ).fetchall()
        return _hits(rows, limit)

    # -- statements -----------------------------------------------------------------------

    def _state(self, connection: Connection, lock: str = "") -> _State:
        row = connection.execute(
            "SELECT encoder, dimensions, terms, documents, passages, vectors, length "
            f"FROM collections WHERE number = %s {lock}",
            (self._number,),
        ).fetchone()
        if row is None:
            raise StoreError(f"{self._server.shown}: the collection {self.name!r} is gone")
        return _State(*row)

    def _locked(self, connection: Connection) -> _State:
        return self._state(connection, "FOR UPDATE")

    def _count(
        self, connection: Connection, documents: int = 0, passages: int = 0, vectors: int = 0,
        length: int = 0,
    ) -> None:  # fmt: skip
        connection.execute(
            "UPDATE collections SET documents = documents + %s, passages = passages + %s, "
            "vectors = vectors + %s, length = length + %s WHERE number = %s",
            (documents, passages, vectors, length, self._number),
        )

    def _is_current(self, connection: Connection, identifier: str, sha256: str) -> bool:
        row = connection.execute(
            "SELECT 1 FROM documents "
            "WHERE collection = %s AND id = %s AND sha256 = %s AND cutting = %s",
            (self._number, identifier, sha256, PASSAGES_VERSION),
        ).fetchone()
        return row is not None

    def _insert(self, connection: Connection, identifier: str, prepared: Prepared) -> None:
        extracted, passages = prepared.extracted, prepared.passages
        row = connection.execute(
            "INSERT INTO documents (collection, id, source, title, sha256, size, characters, "
            "passages, cutting, added, marks, text) "
            "VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s) RETURNING number",
            (
                self._number,
                identifier,
                _bytes(prepared.source),
                _bytes(extracted.title),
                prepared.sha256,
                prepared.size,
                len(extracted.text),
                len(passages),
                PASSAGES_VERSION,
                time.time(),
                written_marks(extracted),
                compressed(extracted.text),
            ),
        ).fetchone()
        assert row is not None
        sequence = "pg_get_serial_sequence('miaotui.passages', 'id')"
        numbered = connection.execute(
            f"SELECT nextval({sequence}) FROM generate_series(1, %s)", (len(passages),)
        ).fetchall()
        ids = [identity for (identity,) in numbered]
        with connection.cursor().copy(
            "COPY passages (id, collection, document, begins, ends, chinese, length, text, terms) "
            "FROM STDIN"
        ) as copy:
            for identity, one in zip(ids, passages, strict=True):
                text = _bytes(extracted.text[one.start : one.end])
                terms = signed(one.terms.hashes).tolist()
                head = (identity, self._number, row[0], one.start, one.end, one.chinese)
                copy.write_row((*head, one.terms.total, text, terms))
        counted = [one.terms for one in passages]
        insert_postings(connection, self._number, ids, counted)
        length = sum(terms.total for terms in counted)
        self._count(connection, documents=1, passages=len(ids), length=length)

    def _remove(self, connection: Connection, identifier: str, state: _State) -> bool:
        row = connection.execute(
            "SELECT number FROM documents WHERE collection = %s AND id = %s",
            (self._number, identifier),
        ).fetchone()
        if row is None:
            return False
        connection.execute(
            "DELETE FROM postings p USING "
            "(SELECT id, unnest(terms) AS term FROM passages WHERE document = %s) gone "
            "WHERE p.collection = %s AND p.term = gone.term AND p.passage = gone.id",
            (row[0], self._number),
        )
        gone = connection.execute(
            "DELETE FROM passages WHERE document = %s RETURNING id, length", row
        ).fetchall()
        vectors = 0
        if state.dimensions:
            vectors = connection.execute(
                sql.SQL("DELETE FROM {} WHERE passage = ANY(%s::bigint[])").format(self._vectors),
                ([identity for identity, _ in gone],),
            ).rowcount
        connection.execute("DELETE FROM documents WHERE number = %s", row)
        length = sum(length for _, length in gone)
        self._count(connection, -1, -len(gone), -vectors, -length)
        return True

    def _make_vectors(self, connection: Connection, dimensions: int) -> None:
        connection.execute(
            sql.SQL(
                "CREATE TABLE miaotui.{} (passage bigint PRIMARY KEY, vector vector({}) NOT NULL)"
            ).format(self._vectors, sql.Literal(dimensions))
        )
        if dimensions <= _MOST_INDEXED_DIMENSIONS:
            connection.execute(
                sql.SQL("CREATE INDEX ON miaotui.{} USING hnsw (vector vector_ip_ops)").format(
                    self._vectors
                )
            )
        connection.execute(
            "UPDATE collections SET dimensions = %s WHERE number = %s", (dimensions, self._number)
        )

    def _renew_terms(self, connection: Connection) -> None:
        connection.execute("DELETE FROM postings WHERE collection = %s", (self._number,))
        after, total = 0, 0
        while rows := connection.execute(
            "SELECT id, text FROM passages WHERE collection = %s AND id > %s ORDER BY id LIMIT %s",
            (self._number, after, _RENEWED_AT_ONCE),
        ).fetchall():
            counted = [count_terms(_text(text)) for _, text in rows]
            for (identity, _), terms in zip(rows, counted, strict=True):
                connection.execute(
                    "UPDATE passages SET terms = %s::integer[], length = %s WHERE id = %s",
                    (signed(terms.hashes).tolist(), terms.total, identity),
                )
            insert_postings(connection, self._number, [row[0] for row in rows], counted)
            after, total = rows[-1][0], total + sum(terms.total for terms in counted)
        connection.execute(
            "UPDATE collections SET terms = %s, length = %s WHERE number = %s",
            (TERMS_VERSION, total, self._number),
        )


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


def _written(vector: Vectors) -> str:
    """pgvector's notation; nine digits are all that a float32 has."""
    return f"[{','.join(f'{value:.9g}' for value in vector.tolist())}]"


def _document(identifier: str, source: bytes, title: bytes, *rest: Any) -> Document:
    return Document(identifier, _text(source), _text(title), *rest)


def _hits(rows: Sequence[tuple[Any, ...]], limit: int) -> Hits:
    """The first two columns: passages and scores."""
    ids = np.array([row[0] for row in rows], np.int64)
    return best(ids, np.array([row[1] for row in rows], np.float32), limit)
