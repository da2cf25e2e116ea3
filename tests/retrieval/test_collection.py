"""Collections: kept through crashes, idempotent, and seen alike by several processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from miaotui.retrieval.collection import Outcome, SqliteCollection, document_id
from miaotui.retrieval.errors import CollectionNameError, StoreError
from miaotui.retrieval.library import Library
from miaotui.retrieval.prepare import prepare_file, prepare_text, sha256_of

TOWER = "The Eiffel Tower was named after the engineer Gustave Eiffel."
VECTOR = np.full((1, 4), 0.5, np.float32)
LUXUN = "鲁迅，原名周树人，1881年出生于浙江绍兴。"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "c.sqlite3"


def sources(collection: SqliteCollection, query: str) -> list[str]:
    return [found.passage.document.source for found in collection.search(query, None, 10)]


def test_what_is_added_is_found_and_there_after_a_restart(path: Path) -> None:
    collection = SqliteCollection(path, "c")
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
        collection.close()
        collection = SqliteCollection(path)


def test_adding_again_is_a_no_op_and_a_change_replaces(path: Path) -> None:
    collection = SqliteCollection(path, "c")
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


def test_deleting(path: Path) -> None:
    collection = SqliteCollection(path, "c")
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


def test_pages_of_the_list(path: Path) -> None:
    collection = SqliteCollection(path, "c")
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
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_passage_is_its_documents_text_at_its_offsets(
    tmp_path: Path, text: str, suffix: str
) -> None:
    collection = SqliteCollection(tmp_path / "p.sqlite3", "p")
    collection.add(prepare_file(f"f{suffix}", text.encode()))
    numbers = [number for number, _ in collection._read.terms_after(0)]
    for stored in collection._read.passages(numbers).values():
        whole = collection.text(stored.document.id)
        assert whole is not None
        assert stored.text == whole[stored.start : stored.end]
    collection.close()


def test_another_process_sees_what_this_one_does(path: Path) -> None:
    ours = SqliteCollection(path, "c")
    theirs = SqliteCollection(path)
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


def test_vectors_of_another_encoder_are_made_anew(path: Path) -> None:
    collection = SqliteCollection(path, "c", encoder="one")
    collection.add(prepare_text("a", TOWER))
    [(number, _)] = collection.without_vector(0, 5)
    collection.add_vectors([number], VECTOR)
    collection.close()
    collection = SqliteCollection(path, encoder="one")
    assert collection.counts().vectors == 1
    collection.close()
    collection = SqliteCollection(path, encoder="two")
    assert len(collection.without_vector(0, 5)) == 1


def test_chinese_passages_get_no_vector(path: Path) -> None:
    collection = SqliteCollection(path, "c")
    collection.add(prepare_text("a", LUXUN))
    assert collection.without_vector(0, 5) == []


_WRITER = """
import sys
from pathlib import Path
from miaotui.retrieval.collection import SqliteCollection
from miaotui.retrieval.prepare import prepare_text
collection = SqliteCollection(Path(sys.argv[1]), "c")
for number in range(100_000):
    text = f"Document {number}. " + f"It has a line about number{number}.\\n" * 40
    collection.add(prepare_text(f"d{number:06}", text))
    print(number, flush=True)
"""


def test_nothing_acknowledged_is_lost_on_kill_9(path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(path)], stdout=subprocess.PIPE, text=True
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
    collection = SqliteCollection(path)
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


def test_searches_go_on_while_documents_come(path: Path) -> None:
    collection = SqliteCollection(path, "c")
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


def test_library_keeps_collections_apart(tmp_path: Path) -> None:
    library = Library(tmp_path / "documents")
    assert library.names() == []
    assert library.get("none") is None
    for name in ("default", "论文 2024", "a.b-c"):
        made = library.get(name, create=True)
        assert made is not None
        made.add(prepare_text("x", f"{TOWER} {name}"))
    assert library.names() == ["a.b-c", "default", "论文 2024"]
    library.close()
    library = Library(tmp_path / "documents")
    again = library.get("论文 2024")
    assert again is not None
    assert again.text(document_id("x")) == f"{TOWER} 论文 2024"
    for bad in ("", "..", "a/b", "../x", " a", "x" * 65, "论" * 30, "a\0b", "a\n"):
        with pytest.raises(CollectionNameError):
            library.get(bad, create=True)
    library.close()


def test_a_file_that_is_none_is_refused(path: Path) -> None:
    path.write_bytes(b"this is not a database at all" * 100)
    with pytest.raises(StoreError):
        SqliteCollection(path, "c")


def test_the_hash_is_of_what_was_given() -> None:
    data = TOWER.encode()
    assert prepare_file("a.txt", data).sha256 == sha256_of(data) == prepare_text("b", TOWER).sha256
