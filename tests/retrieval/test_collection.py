"""Collections: kept through crashes, idempotent, and seen alike by several processes."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from miaotui.retrieval.collection import (
    Collection,
    Counts,
    Outcome,
    SqliteCollection,
    document_id,
)
from miaotui.retrieval.errors import CollectionNameError, StoreError
from miaotui.retrieval.fusion import Ranked
from miaotui.retrieval.library import open_store
from miaotui.retrieval.prepare import prepare_file, prepare_text, sha256_of
from tests.retrieval.stores import Place

TOWER = "The Eiffel Tower was named after the engineer Gustave Eiffel."
VECTOR = np.full((1, 4), 0.5, np.float32)
LUXUN = "鲁迅，原名周树人，1881年出生于浙江绍兴。"


def sources(collection: Collection, query: str) -> list[str]:
    return [found.passage.document.source for found in collection.search(query, None, 10)]


def test_what_is_added_is_found_and_there_after_a_restart(place: Place) -> None:
    collection = place.collection()
    assert collection.add(prepare_text("a", TOWER, "Tower")) == (Outcome.ADDED, document_id("a"))
    collection.add(prepare_text("b", LUXUN))
    for _ in range(2):
        assert sources(collection, "Who was the tower named after?") == ["a"]
        assert sources(collection, "魯迅出生於哪裡？") == ["b"]
        assert [d.source for d in collection.documents(10)] == ["a", "b"]
        assert collection.text(document_id("b")) == LUXUN
        found = collection.document(document_id("a"))
        assert found is not None
        assert (found[0].title, found[0].characters) == ("Tower", len(TOWER))
        place.close()
        collection = place.collection()


def test_adding_again_is_a_no_op_and_a_change_replaces(place: Place) -> None:
    collection = place.collection()
    first = prepare_text("a", TOWER)
    collection.add(first)
    assert collection.has("a", first.sha256)
    assert collection.add(first) == (Outcome.UNCHANGED, document_id("a"))
    assert collection.counts().passages == 1
    assert collection.add(prepare_text("a", LUXUN)) == (Outcome.REPLACED, document_id("a"))
    assert not collection.has("a", first.sha256)
    assert sources(collection, "Eiffel Tower") == []
    assert sources(collection, "鲁迅") == ["a"]
    assert collection.counts().documents == 1


def test_deleting(place: Place) -> None:
    collection = place.collection()
    collection.add(prepare_text("a", TOWER))
    collection.add(prepare_text("b", f"{TOWER} Again."))
    [(number, _), _] = collection.without_vector(0, 10)
    collection.add_vectors([number], VECTOR)
    assert collection.delete(document_id("a"))
    assert not collection.delete(document_id("a"))
    assert sources(collection, "Eiffel") == ["b"]
    assert collection.search("zzz", lambda: VECTOR[0], 5) == []
    assert collection.counts().vectors == 0
    # Vectors that come after their passage has gone are dropped.
    collection.add_vectors([number], VECTOR)
    assert collection.counts().vectors == 0


def test_pages_of_the_list(place: Place) -> None:
    collection = place.collection()
    for name in ("c", "a", "e", "b", "d"):
        collection.add(prepare_text(name, f"{TOWER} {name}"))
    seen: list[str] = []
    after = ""
    while page := collection.documents(2, after):
        seen += [document.source for document in page]
        after = page[-1].id
    assert seen == ["a", "b", "c", "d", "e"]


_TEXT = st.lists(
    st.sampled_from(["One thing. ", "长江很长。", "\n\n", "😀 ", "e\u0301", "x" * 300, "\r\n"]),
    min_size=1,
    max_size=60,
).map("".join)


@given(_TEXT.filter(str.strip), st.sampled_from([".txt", ".md", ".html"]))
@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_a_passage_is_its_documents_text_at_its_offsets(
    place: Place, text: str, suffix: str
) -> None:
    collection = place.collection()
    collection.add(prepare_file(f"f{suffix}", text.encode()))
    numbers = [number for number, _ in collection.without_vector(0, 1000, most_chinese=1.0)]
    found = collection.look_up([Ranked(number, 1.0) for number in numbers])
    assert len(found) == collection.counts().passages
    for stored in (one.passage for one in found):
        whole = collection.text(stored.document.id)
        assert whole is not None
        assert stored.text == whole[stored.start : stored.end]
    place.close()


def test_another_process_sees_what_this_one_does(place: Place) -> None:
    ours = place.collection()
    theirs = place.collection()
    ours.add(prepare_text("a", TOWER))
    assert sources(theirs, "Eiffel") == ["a"]
    [(number, _)] = theirs.without_vector(0, 5)
    theirs.add_vectors([number], VECTOR)
    assert len(ours.search("zzz", lambda: VECTOR[0], 5)) == 1
    theirs.add(prepare_text("a", LUXUN))
    assert sources(ours, "Eiffel") == []
    assert sources(ours, "鲁迅") == ["a"]
    assert ours.delete(document_id("a"))
    assert sources(theirs, "鲁迅") == []


def test_vectors_of_another_encoder_are_made_anew(place: Place) -> None:
    collection = place.collection(encoder="one")
    collection.add(prepare_text("a", TOWER))
    [(number, _)] = collection.without_vector(0, 5)
    collection.add_vectors([number], VECTOR)
    place.close()
    collection = place.collection(encoder="one")
    assert collection.counts().vectors == 1
    place.close()
    collection = place.collection(encoder="two")
    assert len(collection.without_vector(0, 5)) == 1


def test_chinese_passages_get_no_vector(place: Place) -> None:
    collection = place.collection()
    collection.add(prepare_text("a", LUXUN))
    assert collection.without_vector(0, 5) == []
    assert collection.counts() == Counts(documents=1, passages=1, vectors=0, waiting=0)
    collection.add(prepare_text("b", TOWER))
    assert collection.counts() == Counts(documents=2, passages=2, vectors=0, waiting=1)
    [(number, _)] = collection.without_vector(0, 5)
    collection.add_vectors([number], VECTOR)
    assert collection.counts() == Counts(documents=2, passages=2, vectors=1, waiting=0)


def test_a_file_of_before_can_be_counted(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite"
    before = SqliteCollection(path, "c")
    before.add(prepare_text("a", TOWER))
    before.close()
    with closing(sqlite3.connect(path)) as file:
        file.execute("DROP INDEX passages_by_chinese")
    after = SqliteCollection(path)
    assert after.counts().waiting == 1
    after.close()
    with closing(sqlite3.connect(path)) as file:
        query = "EXPLAIN QUERY PLAN SELECT count(*) FROM passages WHERE chinese <= 0.3"
        assert "COVERING INDEX passages_by_chinese" in str(file.execute(query).fetchall())


_WRITER = """
import sys
from miaotui.retrieval.library import open_store
from miaotui.retrieval.prepare import prepare_text
store = open_store(sys.argv[1], encoder="")
collection = store.library(sys.argv[2]).get("c", create=True)
for number in range(100_000):
    text = f"Document {number}. " + f"It has a line about number{number}.\\n" * 40
    collection.add(prepare_text(f"d{number:06}", text))
    print(number, flush=True)
"""


def test_nothing_acknowledged_is_lost_on_kill_9(place: Place) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _WRITER, place.location, place.tenant],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    acknowledged = -1
    began = time.monotonic()
    for line in process.stdout:
        acknowledged = int(line)
        if acknowledged >= 20 and time.monotonic() - began > 1.0:
            os.kill(process.pid, signal.SIGKILL)
            break
    acknowledged = max([acknowledged, *map(int, process.stdout.read().split())])
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    collection = place.collection()
    documents = collection.documents(100_000)
    # The one that was being written may be there or not, but then it is whole.
    assert len(documents) in (acknowledged + 1, acknowledged + 2)
    assert collection.counts().passages == sum(document.passages for document in documents)
    for number in (0, acknowledged // 2, acknowledged):
        found = collection.search(f"number{number}", None, 1)[0].passage
        assert found.document.source == f"d{number:06}"
        whole = collection.text(found.document.id)
        assert whole is not None
        assert whole[found.start : found.end] == found.text


def test_searches_go_on_while_documents_come(place: Place) -> None:
    collection = place.collection()
    collection.add(prepare_text("first", TOWER))
    failures: list[BaseException] = []
    done = threading.Event()

    def look() -> None:
        try:
            while not done.is_set():
                assert "first" in sources(collection, "Gustave Eiffel")
        except BaseException as error:  # noqa: BLE001 - shown by the test's own thread
            failures.append(error)

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    for number in range(60):
        collection.add(prepare_text(f"d{number}", f"River number {number} is long. " * 30))
        if number % 3 == 0:
            collection.delete(document_id(f"d{number}"))
    done.set()
    for thread in threads:
        thread.join()
    assert failures == []
    assert collection.counts().documents == 41


def test_library_keeps_collections_apart(place: Place) -> None:
    library = place.library()
    assert library.names() == []
    assert library.get("none") is None
    for name in ("default", "论文 2024", "a.b-c"):
        made = library.get(name, create=True)
        assert made is not None
        made.add(prepare_text("x", f"{TOWER} {name}"))
    assert library.names() == ["a.b-c", "default", "论文 2024"]
    place.close()
    library = place.library()
    again = library.get("论文 2024")
    assert again is not None
    assert again.text(document_id("x")) == f"{TOWER} 论文 2024"
    assert [found.passage.text for found in again.search("Eiffel", None, 9)] == [
        f"{TOWER} 论文 2024"
    ]
    for bad in ("", "..", "a/b", "../x", " a", "x" * 65, "论" * 30, "a\0b", "a\n"):
        with pytest.raises(CollectionNameError):
            library.get(bad, create=True)


def test_tenants_are_kept_apart(place: Place) -> None:
    for tenant in (f"{place.tenant}-1", f"{place.tenant}-2"):
        made = place.library(tenant=tenant).get("c", create=True)
        assert made is not None
        assert made.add(prepare_text("x", f"{TOWER} {tenant}"))[0] is Outcome.ADDED
        assert [found.passage.text for found in made.search("Eiffel", None, 9)] == [
            f"{TOWER} {tenant}"
        ]
    assert place.library(tenant=f"{place.tenant}-3").get("c") is None
    store = open_store(place.location, encoder="")
    assert {f"{place.tenant}-1", f"{place.tenant}-2"} <= set(store.tenants())
    store.close()


def test_any_character_of_a_document_is_kept(place: Place) -> None:
    collection = place.collection()
    text = "A\0bell rings. 😀 \U000e0041"
    collection.add(prepare_text("s\0😀", text, "t\0"))
    assert collection.text(document_id("s\0😀")) == text
    [document] = collection.documents(9)
    assert (document.source, document.title) == ("s\0😀", "t\0")
    [found] = collection.search("bell", None, 9)
    assert found.passage.text == text


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite3"
    path.write_bytes(b"this is not a database at all" * 100)
    with pytest.raises(StoreError):
        SqliteCollection(path, "c")


def test_the_hash_is_of_what_was_given() -> None:
    data = TOWER.encode()
    assert prepare_file("a.txt", data).sha256 == sha256_of(data) == prepare_text("b", TOWER).sha256
