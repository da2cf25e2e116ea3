"""`python -m tests.bench.retrieval`: retrieval's speed and quality, and answers from collections.

Quality: every passage of the question sets becomes a document of one collection; held-out
questions are asked. A passage is right if it holds an annotated answer at its place. Speed: a
collection of 100,000 passages, the sets' own and recombinations of their sentences, whose
vectors are the sets' own ones with noise (encoding all would take an hour and change nothing
about the time of a search). Vectors come from an encoder's stage in a process of its own, by the
gateway's way. `--work` keeps the collections for the next run.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from miaotui.retrieval.answers import SpanReading, is_answer, language_of, rank_spans
from miaotui.retrieval.collection import (
    DENSE_WEIGHT,
    DEPTH,
    Found,
    SqliteCollection,
    document_id,
)
from miaotui.retrieval.encoder import Vectors
from miaotui.retrieval.fusion import Ranked, fuse, fuse_ranks
from miaotui.retrieval.lexical import NO_HITS
from miaotui.retrieval.prepare import prepare_text
from miaotui.retrieval.terms import count_terms
from miaotui.training.data import Corpus, Split
from miaotui.training.scorer import best_scores
from tests.bench.reader import Reader
from tests.bench.squad import Asked, add_all, add_vectors, read_questions, sample, source_of
from tests.encoder import EncoderStage, StageVectors

BUNDLED = Path(__file__).resolve().parents[2] / "miaotui" / "bundled" / "qa"
DOMAINS = ("wiki", "amazon", "reddit", "cmrc", "drcd")
LARGE = 100_000
READ = 5


@dataclass(frozen=True)
class Speed:
    """Milliseconds of one way to retrieve, over the large collection."""

    what: str
    p50: float
    p99: float


@dataclass(frozen=True)
class Quality:
    """Of one domain and way to retrieve, in percent."""

    domain: str
    what: str
    questions: int
    recall_at_1: float
    recall_at_5: float
    f1: float | None


def lists(
    collection: SqliteCollection, asked: Asked, vector: Vectors | None
) -> dict[str, list[Ranked]]:
    """The ranking of each way to retrieve."""
    lexical = collection.lexical.search(count_terms(asked.text), DEPTH)
    dense = NO_HITS
    if vector is not None and collection.dense is not None:
        dense = collection.dense.search(vector, DEPTH)
    weight = DENSE_WEIGHT
    return {
        "lexical": fuse(lexical, NO_HITS, dense_weight=0.0, limit=READ),
        "dense": fuse(NO_HITS, dense, dense_weight=1.0, limit=READ),
        "fused": fuse(lexical, dense, dense_weight=weight, limit=READ),
        "fused by ranks": fuse_ranks(lexical, dense, dense_weight=weight, limit=READ),
    }


def encode(encoder: StageVectors, asked: Asked) -> Vectors | None:
    """The question's vector; none for Chinese, as in the product."""
    if language_of(asked.text) == "zh":
        return None
    row: Vectors = encoder.encode([asked.text])[0]
    return row


def answer(reader: Reader, asked: Asked, found: Sequence[Found]) -> tuple[str, bool]:
    """The best answer, and whether it is given."""
    if not found:
        return "", False
    reads = reader.read(asked.text, [one.passage.text for one in found])
    spans = [
        SpanReading(i, read.start, read.end, read.logit, 1.0, read.logit + read.no_answer_score)
        for i, read in enumerate(reads)
    ]
    best = rank_spans(spans, [one.ranked for one in found])[0].reading
    text = found[best.passage].passage.text[best.start : best.end]
    language = language_of(asked.text)
    threshold = reader.thresholds[language]
    return text, is_answer(best, found[best.passage].ranked, threshold, language)


def quality(
    collection: SqliteCollection,
    encoder: StageVectors,
    reader: Reader,
    asked: Sequence[Asked],
    read: int,
) -> tuple[list[Quality], float]:
    """Figures of each way over the questions, the first `read` of which are also answered;
    and the share of these that get "no answer"."""
    ranks: dict[str, list[int]] = {}
    scores: dict[str, list[float]] = {}
    refused = 0
    for number, one in enumerate(asked):
        for what, ranked in lists(collection, one, encode(encoder, one)).items():
            found = collection.look_up(ranked)
            right = [place for place, f in enumerate(found) if one.is_answered_by(f)]
            ranks.setdefault(what, []).append(right[0] if right else READ)
            if number < read and what != "fused by ranks":
                text, given = answer(reader, one, found)
                f1 = best_scores(text, one.truths, one.language)[1] if text else 0.0
                scores.setdefault(what, []).append(f1)
                refused += what == "fused" and not given
    count = len(asked)
    return [
        Quality(
            asked[0].domain,
            what,
            count,
            100 * sum(place == 0 for place in places) / count,
            100 * sum(place < READ for place in places) / count,
            100 * statistics.fmean(scores[what]) if what in scores else None,
        )
        for what, places in ranks.items()
    ], 100 * refused / min(read, count)


def refusals(
    collection: SqliteCollection, encoder: StageVectors, reader: Reader, asked: Sequence[Asked]
) -> float:
    """Share of the questions that get "no answer" from a collection, in percent."""
    refused = 0
    for one in asked:
        found = collection.search(one.text, partial(encode, encoder, one), READ)
        refused += not answer(reader, one, found)[1]
    return 100 * refused / len(asked)


def make_large(
    path: Path, corpus: Corpus, small: SqliteCollection, size: int = LARGE, seed: int = 1
) -> float:
    """The large collection, of `size` passages or some more; returns passages ingested a second
    (0: it was there)."""
    if path.exists():
        return 0.0
    rng = random.Random(seed)
    texts = [passage.text for passage in corpus.passages]
    groups: dict[str, list[str]] = {"en": [], "zh": []}
    for passage in corpus.passages:
        pieces = re.split(r"(?<=[.!?。！？])\s*", passage.text)
        groups[passage.language] += [piece for piece in pieces if 10 < len(piece) < 300]
    collection = SqliteCollection(path, "large", encoder="bench")
    passages = documents = 0
    spent = 0.0
    while passages < size:
        if documents < len(texts):
            text = texts[documents]
        else:
            language = "en" if rng.random() < 0.7 else "zh"
            # A document of several passages, about as long each as the sets' own.
            sentences = rng.sample(groups[language], 80)
            text = "\n".join(" ".join(sentences[i : i + 8]) for i in range(0, 80, 8))
        began = time.perf_counter()
        collection.add(prepare_text(f"document/{documents}", text))
        spent += time.perf_counter() - began
        documents += 1
        passages = collection.counts().passages if documents % 200 == 0 else passages
    _, _, known = small.vectors()
    assert known is not None
    noise = np.random.default_rng(seed)
    after = 0
    while waiting := collection.without_vector(after, 5000, most_chinese=1.0):
        ids = [identifier for identifier, _ in waiting]
        rows = known[noise.integers(0, len(known), len(ids))]
        rows = rows + noise.normal(0, 0.03, rows.shape).astype(np.float32)
        collection.add_vectors(ids, rows / np.linalg.norm(rows, axis=1, keepdims=True))
        after = ids[-1]
    passages = collection.counts().passages
    collection.close()
    return passages / spent


def speed(
    path: Path, encoder: StageVectors, asked: Sequence[Asked]
) -> tuple[list[Speed], float, str]:
    """Times over the large collection, seconds to open it, and what it holds."""
    began = time.perf_counter()
    collection = SqliteCollection(path)
    opened = time.perf_counter() - began
    counts = collection.counts()
    times: dict[str, list[float]] = {}

    def timed(what: str, begin: float) -> None:
        times.setdefault(what, []).append((time.perf_counter() - begin) * 1000)

    encoding = ThreadPoolExecutor(1)
    found = 0
    for one in asked:
        vector = encoder.encode([one.text])[0]
        assert collection.dense is not None
        begin = time.perf_counter()
        collection.lexical.search(count_terms(one.text), DEPTH)
        timed(f"lexical, {one.language}", begin)
        begin = time.perf_counter()
        dense = collection.dense.search(vector, DEPTH)
        timed("dense, without encoding", begin)
        begin = time.perf_counter()
        exact = collection.dense.search(vector, DEPTH, exact=True)
        timed("dense, exact, without encoding", begin)
        found += len(set(dense.ids[:READ].tolist()) & set(exact.ids[:READ].tolist()))
        begin = time.perf_counter()
        encoder.encode([one.text])
        timed("encoding", begin)
    # In a pass of its own: the exact search would push the encoder out of the caches.
    for one in asked:
        begin = time.perf_counter()
        # As the gateway does it: encoding goes on beside the lexical search.
        asking = encoding.submit(encode, encoder, one) if one.language == "en" else None
        collection.search(one.text, asking.result if asking else None, READ)
        timed(f"all, {one.language}", begin)
    shared = 100 * found / (READ * len(asked))
    holds = (
        f"{counts.passages:,} passages, {counts.vectors:,} vectors; {shared:.1f} % of the exact "
        f"dense top {READ} found"
    )
    collection.close()
    figures = []
    for what, values in times.items():
        values.sort()
        p99 = values[min(len(values) - 1, int(len(values) * 0.99))]
        figures.append(Speed(what, statistics.median(values), p99))
    return figures, opened, holds


def without_split(
    path: Path, small: Path, corpus: Corpus, split: Split, encoder: StageVectors
) -> SqliteCollection:
    """A copy of the small collection without all passages of a split's articles."""
    path.unlink(missing_ok=True)
    with closing(sqlite3.connect(small)) as whole:
        whole.execute("VACUUM INTO ?", (str(path),))
    collection = SqliteCollection(path, encoder=encoder.name)
    for number, passage in enumerate(corpus.passages):
        if passage.split == split:
            collection.delete(document_id(source_of(corpus, number)))
    return collection


def main() -> None:
    """Measures, prints tables, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--data", type=Path, default=Path("../shared/qa"))
    parser.add_argument("--work", type=Path, help="folder to keep the collections in")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--questions", type=int, default=300, help="a domain, for recall")
    parser.add_argument("--read", type=int, default=60, help="of these, answered, too")
    parser.add_argument("--split", default="heldout", choices=("train", "dev", "heldout"))
    parser.add_argument("--large", type=int, default=LARGE, help="passages to measure speed over")
    parser.add_argument("--only", choices=("build", "speed", "quality", "refusals"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        stage = EncoderStage(Path(scratch))
        stage.start()
        try:
            encoder = StageVectors(stage.address)
            run(options, work, encoder, Console(width=110))
            encoder.close()
        finally:
            stage.stop()


def run(options: argparse.Namespace, work: Path, encoder: StageVectors, console: Console) -> None:
    """All that the options ask for, over collections in `work`."""

    def wanted(part: str) -> bool:
        return options.only in (None, part)

    corpus = read_questions(options.data)
    small = SqliteCollection(work / "small.sqlite3", "small", encoder=encoder.name)
    if not small.counts().documents:
        add_all(small, corpus)
    began = time.perf_counter()
    encoded = add_vectors(small, encoder)
    results: dict[str, object] = {}
    if encoded > 100:
        results["vectors a second"] = encoded / (time.perf_counter() - began)
    ingested = make_large(work / "large.sqlite3", corpus, small, options.large)
    if ingested:
        results["passages ingested a second"] = ingested
    asked = {domain: sample(corpus, options.split, domain, options.questions) for domain in DOMAINS}
    if wanted("speed"):
        every = [one for domain in DOMAINS for one in asked[domain][:60]]
        speeds, opened, holds = speed(work / "large.sqlite3", encoder, every)
        results["speed"] = [asdict(one) for one in speeds]
        results["seconds to open"] = opened
        table = Table("retrieval", "p50 ms", "p99 ms", title=f"{holds}, opened in {opened:.1f} s")
        for one in speeds:
            table.add_row(one.what, f"{one.p50:.1f}", f"{one.p99:.1f}")
        console.print(table)
    if wanted("quality"):
        reader = Reader(BUNDLED)
        table = Table("domain", "retrieval", "questions", "recall@1", "recall@5", "F1 of answers")
        rows = []
        given = {}
        for domain in DOMAINS:
            figures, given[domain] = quality(small, encoder, reader, asked[domain], options.read)
            rows += figures
            for row in figures:
                f1 = "" if row.f1 is None else f"{row.f1:.1f}"
                recall = f"{row.recall_at_1:.1f}", f"{row.recall_at_5:.1f}"
                table.add_row(row.domain, row.what, str(row.questions), *recall, f1)
        results["quality"] = [asdict(row) for row in rows]
        results["refused with the answer there"] = given
        console.print(table)
        console.print("no answer said, though it is there:", given)
    if wanted("refusals"):
        reader = Reader(BUNDLED)
        copy = work / "rest.sqlite3"
        rest = without_split(copy, work / "small.sqlite3", corpus, options.split, encoder)
        refused = {
            domain: refusals(rest, encoder, reader, asked[domain][: options.read])
            for domain in DOMAINS
        }
        results["refused with the article gone"] = refused
        console.print("no answer said, with the question's article not there:", refused)
    console.print({k: v for k, v in results.items() if isinstance(v, float)})
    if options.json:
        options.json.write_text(json.dumps(results, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
