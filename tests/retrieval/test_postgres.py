"""The PostgreSQL store where it is not as SQLite: ranking in SQL, many writers, a server that is
away or not as it should be."""

from __future__ import annotations

import random
import threading
from uuid import uuid4

import numpy as np
import psycopg
import pytest

from miaotui.retrieval.collection import document_id
from miaotui.retrieval.errors import StoreError
from miaotui.retrieval.library import open_store
from miaotui.retrieval.postgres.location import PostgresLocation
from miaotui.retrieval.prepare import prepare_text
from tests.postgres import PASSWORD, PostgresServer
from tests.retrieval.stores import Place

WORDS = "river bridge stone king water valley market ship 长江 黄河 大桥 国王 市场".split()  # noqa: SIM905


def database(server: PostgresServer, *statements: str) -> str:
    """A new database's URL, after these statements in it."""
    url = server.make(f"d{uuid4().hex}")
    with psycopg.connect(url, autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement)
    return url


def fault(url: str) -> str:
    """What is said of a store that cannot be used."""
    store = open_store(url, encoder="")
    with pytest.raises(StoreError) as caught:
        store.check()
    store.close()
    assert PASSWORD not in str(caught.value)
    return str(caught.value)


def near(one: float | None, other: float | None) -> bool:
    """Whether both are missing, or about the same."""
    return one == (None if other is None else pytest.approx(other, rel=1e-4))


def test_it_ranks_as_sqlite_does(
    postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rng = random.Random(3)
    numbers = np.random.default_rng(3)
    places = [Place(postgres.url()), Place(str(tmp_path_factory.mktemp("documents")))]
    collections = [place.collection() for place in places]
    for step in range(60):
        prepared = prepare_text(
            f"d{rng.randint(0, 30)}", " ".join(rng.choices(WORDS, k=rng.randint(1, 60)))
        )
        gone = document_id(f"d{rng.randint(0, 30)}")
        assert len({collection.add(prepared) for collection in collections}) == 1
        assert len({collection.delete(gone) for collection in collections}) == 1
        if step % 10 == 5:
            waiting = [collection.without_vector(0, 100, 1.0) for collection in collections]
            assert len({tuple(text for _, text in one) for one in waiting}) == 1
            vectors = numbers.normal(size=(len(waiting[0]), 8)).astype(np.float32)
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
            vectors = vectors.astype(np.float16).astype(np.float32)  # as SQLite keeps them
            for collection, one in zip(collections, waiting, strict=True):
                collection.add_vectors([number for number, _ in one], vectors)
    assert len({collection.counts() for collection in collections}) == 1
    for number in range(20):
        query = " ".join(rng.choices([*WORDS, "unknown"], k=3))
        vector = numbers.normal(size=8).astype(np.float32)
        vector /= np.linalg.norm(vector)
        given = (lambda v=vector: v) if number % 2 else None
        found = [collection.search(query, given, 30) for collection in collections]
        scores = [{one.passage.document.source: one.ranked for one in each} for each in found]
        assert scores[0].keys() == scores[1].keys()
        for source, ours in scores[0].items():
            theirs = scores[1][source]
            assert ours.score == pytest.approx(theirs.score, rel=1e-4)
            assert ours.coverage == pytest.approx(theirs.coverage, rel=1e-4)
            assert near(ours.lexical_score, theirs.lexical_score)
            assert near(ours.dense_score, theirs.dense_score)
    for place in places:
        place.close()


def test_many_writers_of_one_collection(postgres: PostgresServer) -> None:
    place = Place(postgres.url())
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        try:
            collection = place.collection()
            for _ in range(12):
                source = f"d{rng.randint(0, 5)}"
                collection.add(prepare_text(source, f"River {rng.randint(0, 3)} flows. " * 30))
                waiting = collection.without_vector(0, 5)
                ids = [number for number, _ in waiting]
                collection.add_vectors(ids, np.full((len(ids), 4), 0.5, np.float32))
                if rng.random() < 0.3:
                    collection.delete(document_id(source))
        except BaseException as error:  # noqa: BLE001 - shown by the test's own thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    collection = place.collection()
    counts = collection.counts()
    documents = collection.documents(100)
    assert counts.documents == len(documents) == len({d.source for d in documents})
    assert counts.passages == sum(document.passages for document in documents)
    found = collection.search("river", lambda: np.full(4, 0.5, np.float32), 100)
    assert len(found) == counts.passages
    lacking = len(collection.without_vector(0, 1000))
    assert counts.vectors == counts.passages - lacking
    assert counts.waiting == lacking
    assert sum(one.ranked.dense_rank is not None for one in found) == counts.vectors
    place.close()


def test_terms_counted_in_another_way_are_counted_anew(postgres: PostgresServer) -> None:
    url = database(postgres)
    place = Place(url)
    place.collection().add(prepare_text("a", "The river flows. 长江很长。"))
    place.close()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("UPDATE miaotui.postings SET term = term + 1, length = 1")
        connection.execute("UPDATE miaotui.passages SET terms = '{}', length = 1")
        connection.execute("UPDATE miaotui.collections SET terms = 0, length = 1")
    collection = place.collection()
    assert len(collection.search("river", None, 5)) == 1
    assert len(collection.search("長江", None, 5)) == 1
    assert collection.delete(document_id("a"))
    with psycopg.connect(url) as connection:
        left = connection.execute("SELECT count(*) FROM miaotui.postings").fetchone()
        kept = connection.execute("SELECT terms, length FROM miaotui.collections").fetchone()
    assert left == (0,)
    assert kept == (1, 0)
    place.close()


def test_a_database_that_is_not_as_it_should_be(postgres: PostgresServer) -> None:
    url = database(postgres)
    open_store(url, encoder="").check()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("UPDATE miaotui.meta SET value = '7' WHERE key = 'layout'")
        connection.execute("DROP ROLE IF EXISTS visitor")
        connection.execute("CREATE ROLE visitor LOGIN")
    assert "another version of Miaotui (layout 7, this one reads 1)" in fault(url)
    visiting = database(postgres).replace("postgres:", "visitor:", 1)
    assert "may not create the extension pgvector; run CREATE EXTENSION vector" in fault(visiting)
    with psycopg.connect(visiting.replace("visitor", "postgres"), autocommit=True) as connection:
        connection.execute("CREATE EXTENSION vector")
    assert "permission denied for database" in fault(visiting)
    assert 'database "nowhere" does not exist' in fault(postgres.url("nowhere"))


def test_a_database_emptied_meanwhile_is_set_up_again(postgres: PostgresServer) -> None:
    url = database(postgres)
    place = Place(url)
    library = place.library()
    made = library.get("c", create=True)
    assert made is not None
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("DROP SCHEMA miaotui CASCADE")
    with pytest.raises(StoreError):
        made.counts()
    made = library.get("c", create=True)
    assert made is not None
    made.add(prepare_text("a", "The river flows."))
    assert made.counts().documents == 1
    place.close()


def test_tables_of_before_get_their_index(postgres: PostgresServer) -> None:
    url = database(postgres)
    open_store(url, encoder="").check()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("DROP INDEX miaotui.passages_by_chinese")
        open_store(url, encoder="").check()
        made = connection.execute("SELECT to_regclass('miaotui.passages_by_chinese')").fetchone()
    assert made == ("miaotui.passages_by_chinese",)


def test_a_server_that_is_away() -> None:
    told = fault(f"postgresql://me:{PASSWORD}@127.0.0.1:1/db")
    assert "PostgreSQL at 127.0.0.1:1, database db" in told
    assert "refused" in told


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://me:{PASSWORD}@x@host/db",
        f"postgresql://me:{PASSWORD}/x@host/db",
        f"postgresql://me:12{PASSWORD}@host:{PASSWORD}/db",
        f"postgresql://me:{PASSWORD}#x@host/db",
        f"postgresql://me:{PASSWORD}?x@host/db",
        f"postgresql://me:{PASSWORD}",
        f"postgresql://host/db?{PASSWORD}",
        f"postgresql://[{PASSWORD}/db",
    ],
)
def test_a_url_that_is_none_is_refused_without_quoting_it(url: str) -> None:
    with pytest.raises(ValueError, match="is named as") as caught:
        PostgresLocation.parse(url)
    assert PASSWORD not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://me:p%40ss@host/db", "PostgreSQL at host, database db"),
        ("postgres://me@[::1]:5432/db", "PostgreSQL at [::1]:5432, database db"),
        ("postgresql://me:pw@a:1,b:2/db", "PostgreSQL at a:1,b:2, database db"),
        ("postgresql:///db?host=/run/pg&password=pw", "PostgreSQL at /run/pg, database db"),
        ("postgresql://me:pw@", "PostgreSQL at localhost"),
    ],
)
def test_a_location_is_shown_without_its_password(url: str, shown: str) -> None:
    parsed = PostgresLocation.parse(url)
    assert parsed.shown == shown
    assert parsed.password in ("", "p@ss", "pw")
    assert "pw" not in repr(parsed)
