"""Times of the PostgreSQL store beside SQLite's: `python -m tests.bench.postgres_store`.

Documents of several passages, from the sentences of `../shared/qa`, English and Chinese;
vectors are random ones in groups, so that only their number is like real ones'.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psycopg

from miaotui.retrieval.collection import SqliteCollection
from miaotui.retrieval.encoder import Vectors
from miaotui.retrieval.library import open_store
from miaotui.retrieval.postgres.collection import PostgresCollection
from miaotui.retrieval.prepare import Prepared, prepare_text
from tests.bench.squad import read_questions, sample
from tests.postgres import PostgresServer

DIMENSIONS = 384
_SEED = 1
_Measured = SqliteCollection | PostgresCollection


def documents(folder: Path, passages: int) -> tuple[list[Prepared], list[str]]:
    """Documents with about so many passages, and 200 questions."""
    corpus = read_questions(folder)
    rng = random.Random(_SEED)
    groups: dict[str, list[str]] = {"en": [], "zh": []}
    for passage in corpus.passages:
        pieces = re.split(r"(?<=[.!?。！？])\s*", passage.text)
        groups[passage.language] += [piece for piece in pieces if 10 < len(piece) < 300]
    made: list[Prepared] = []
    count = 0
    while count < passages:
        sentences = rng.sample(groups["en" if rng.random() < 0.7 else "zh"], 80)
        text = "\n".join(" ".join(sentences[i : i + 8]) for i in range(0, 80, 8))
        made.append(prepare_text(f"document/{len(made)}", text))
        count += len(made[-1].passages)
    domains = sorted({passage.domain for passage in corpus.passages})
    asked = [one.text for domain in domains for one in sample(corpus, "heldout", domain, 200)]
    return made, rng.sample(asked, min(200, len(asked)))


def vectors(count: int, seed: int) -> Vectors:
    """[count, 384], of length 1, in groups."""
    rng = np.random.default_rng(_SEED)
    centres = rng.normal(size=(500, DIMENSIONS))
    rng = np.random.default_rng(seed)
    rows = centres[rng.integers(0, 500, count)] + rng.normal(size=(count, DIMENSIONS))
    normalised: Vectors = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    return normalised


def measure(
    collection: _Measured, made: Sequence[Prepared], asked: Sequence[str]
) -> dict[str, float]:
    """Rates of adding, and milliseconds of searches at p50 and p99."""
    began = time.perf_counter()
    for one in made:
        collection.add(one)
    adding = time.perf_counter() - began
    total = collection.counts().passages
    after = count = 0
    began = time.perf_counter()
    while waiting := collection.without_vector(after, 256, most_chinese=1.0):
        ids = [number for number, _ in waiting]
        collection.add_vectors(ids, vectors(len(ids), ids[0]))
        after, count = ids[-1], count + len(ids)
    embedding = time.perf_counter() - began
    report = {
        "passages": total,
        "passages_added_a_second": total / adding,
        "vectors_added_a_second": count / embedding,
    }
    if isinstance(collection, PostgresCollection):
        with collection._server.reading() as connection:
            connection.execute("VACUUM ANALYZE")  # as autovacuum does within minutes
    queries = vectors(len(asked), 7)
    for kind in ("lexical", "fused"):
        times = []
        for question, vector in zip(asked, queries, strict=True):
            given = (lambda row=vector: row) if kind == "fused" else None
            began = time.perf_counter()
            collection.search(question, given, 5)
            times.append((time.perf_counter() - began) * 1000)
        report[f"{kind}_p50_ms"], report[f"{kind}_p99_ms"] = np.percentile(times, [50, 99])
    began = time.perf_counter()
    for one in made[:50]:
        collection.add(prepare_text(one.source, one.extracted.text + " Changed."))
    report["replace_ms"] = (time.perf_counter() - began) * 1000 / len(made[:50])
    return report


def agreement(ours: _Measured, theirs: _Measured, asked: Sequence[str]) -> float:
    """Share of the questions with the same five passages first, in the same order."""
    same = 0
    for question in asked:
        places = [
            [(f.passage.document.source, f.passage.start) for f in one.search(question, None, 5)]
            for one in (ours, theirs)
        ]
        same += places[0] == places[1]
    return same / len(asked)


def main() -> None:
    """Measures both stores, and prints a report as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--qa", type=Path, default=Path("../shared/qa"))
    parser.add_argument("--passages", type=int, default=10_000)
    options = parser.parse_args()
    made, asked = documents(options.qa, options.passages)
    server = PostgresServer()
    report: dict[str, object] = {}
    try:
        with tempfile.TemporaryDirectory() as folder:
            stores = [open_store(place, encoder="bench") for place in (folder, server.url())]
            opened = [store.library("").get("bench", create=True) for store in stores]
            both = [one for one in opened if isinstance(one, SqliteCollection | PostgresCollection)]
            for store, collection in zip(stores, both, strict=True):
                report[store.kind] = measure(collection, made, asked)
            report["same_five_passages"] = agreement(both[0], both[1], asked)
            with psycopg.connect(server.url()) as connection:
                size = "SELECT pg_database_size(current_database()) / 1e6"
                row = connection.execute(size).fetchone()
                report["database_mb"] = float(row[0]) if row else 0.0
    finally:
        server.close()
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
