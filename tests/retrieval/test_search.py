"""Terms, BM25, vectors and their fusion, against plain computations."""

from __future__ import annotations

import math
import random
from collections import Counter

import numpy as np
import pytest

from miaotui.retrieval.answers import SpanReading, is_answer, rank_spans
from miaotui.retrieval.fusion import Ranked, fuse, fuse_ranks
from miaotui.retrieval.lexical import K1, NO_HITS, B, Hits, LexicalIndex
from miaotui.retrieval.terms import Terms, chinese_share, count_terms, hash_term, split_terms
from miaotui.retrieval.vectors import VectorIndex


def terms(text: str) -> list[str]:
    return list(split_terms(text))


def test_words_are_folded_and_stemmed() -> None:
    assert terms("The Cafés were RUNNING，ｆｕｌｌ of ﬁsh.") == ["cafe", "run", "full", "fish"]
    assert terms("When was it?") == []
    assert terms("Straße 1949 x_y") == ["strass", "1949", "x_y"] or "1949" in terms("Straße 1949")


def test_chinese_becomes_pairs_and_characters_without_question_words() -> None:
    assert terms("长江在哪里？") == ["长江", "江在", "在哪", "长", "江", "里"]
    assert "什么" not in terms("什么是河流")
    assert terms("BERT模型2018年") == ["bert", "模型", "模", "型", "2018", "年"]


def test_traditional_and_simplified_characters_meet() -> None:
    assert set(terms("國立故宮博物院")) == set(terms("国立故宫博物院"))


def test_share_of_chinese() -> None:
    assert chinese_share("hello") == 0
    assert chinese_share("长江") == 1
    assert chinese_share("长江ab") == 0.5
    assert chinese_share("?!") == 0


def plain_bm25(passages: dict[int, str], query: str) -> dict[int, float]:
    """The textbook's formula, term by term (without the constant factor k1 + 1)."""
    counted = {number: Counter(terms(text)) for number, text in passages.items()}
    lengths = {number: sum(counts.values()) for number, counts in counted.items()}
    average = sum(lengths.values()) / len(lengths)
    scores: dict[int, float] = {}
    for term in set(terms(query)):
        df = sum(term in counts for counts in counted.values())
        idf = math.log(1 + (len(passages) - df + 0.5) / (df + 0.5))
        for number, counts in counted.items():
            norm = K1 * (1 - B + B * lengths[number] / average)
            score = idf * counts[term] / (counts[term] + norm)
            scores[number] = scores.get(number, 0.0) + score
    return {number: score for number, score in scores.items() if score > 0}


WORDS = "river bridge stone king water valley market ship harbour 长江 黄河 大桥 国王 市场".split()  # noqa: SIM905


def test_bm25_is_the_textbooks_through_adding_merging_and_removing() -> None:
    rng = random.Random(5)
    index = LexicalIndex()
    kept: dict[int, str] = {}
    number = 0
    for step in range(60):
        added = []
        for _ in range(rng.randint(1, 30)):
            number += 1
            kept[number] = " ".join(rng.choices(WORDS, k=rng.randint(1, 40)))
            added.append((number, count_terms(kept[number])))
        index.add(added)
        if step % 3 == 2:
            gone = rng.sample(sorted(kept), rng.randint(1, 20))
            for one in gone:
                del kept[one]
            index.remove(np.array(sorted(gone), np.int64))
        if step % 10 == 9:
            assert len(index) == len(kept)
            query = " ".join(rng.choices(WORDS, k=3))
            expected = plain_bm25(kept, query)
            hits = index.search(count_terms(query), len(kept))
            assert dict(zip(hits.ids.tolist(), hits.scores.tolist(), strict=True)) == (
                pytest.approx(expected, rel=1e-4)
            )
            assert hits.scores.tolist() == sorted(hits.scores.tolist(), reverse=True)
            assert float(hits.scores[0]) < hits.ceiling
            best = index.search(count_terms(query), 5)
            assert best.ids.tolist() == hits.ids.tolist()[:5]


def test_empty_index_and_unknown_words() -> None:
    index = LexicalIndex()
    assert len(index.search(count_terms("river"), 5).ids) == 0
    index.add([(1, count_terms("bridge"))])
    assert len(index.search(count_terms("river"), 5).ids) == 0
    assert len(index.search(count_terms("the of"), 5).ids) == 0
    index.remove(np.array([1], np.int64))
    assert len(index.search(count_terms("bridge"), 5).ids) == 0


def test_counts_are_capped_not_wrapped() -> None:
    found = count_terms("river " * 1000)
    assert found.counts.tolist() == [255]
    assert found.hashes.tolist() == [hash_term("river")]
    assert isinstance(found, Terms)


def test_vectors_through_adding_and_removing() -> None:
    rng = np.random.default_rng(3)
    index = VectorIndex(8)
    kept: dict[int, np.ndarray[tuple[int], np.dtype[np.float32]]] = {}
    number = 0
    for _ in range(40):
        rows = rng.normal(size=(100, 8)).astype(np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        ids = np.arange(number, number + 100)
        number += 100
        index.add(ids, rows)
        kept.update(zip(ids.tolist(), rows, strict=True))
        gone = rng.choice(sorted(kept), 40, replace=False)
        index.remove(gone.astype(np.int64))
        for one in gone.tolist():
            del kept[one]
    assert len(index) == len(kept)
    query = np.ones(8, np.float32) / np.sqrt(np.float32(8))
    hits = index.search(query, 10)
    expected = sorted(kept, key=lambda one: -float(kept[one] @ query))[:10]
    assert hits.ids.tolist() == expected


def test_many_vectors_are_ranked_by_their_signs_first() -> None:
    rng = np.random.default_rng(4)
    centres = rng.normal(size=(500, 384))
    rows = (centres[rng.integers(0, 500, 20_000)] + rng.normal(size=(20_000, 384))).astype(
        np.float32
    )
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    index = VectorIndex(384)
    index.add(np.arange(20_000), rows)
    index.remove(np.arange(0, 20_000, 3))
    found = 0
    for number in range(1, 3000, 60):
        hits, exact = (index.search(rows[number], 10, exact=exact) for exact in (False, True))
        assert exact.ids[0] == hits.ids[0] == number
        assert all(identifier % 3 for identifier in hits.ids.tolist())
        found += len(set(hits.ids.tolist()) & set(exact.ids.tolist()))
    assert found >= 0.99 * 500


def _hits(*pairs: tuple[int, float], ceiling: float = 10.0) -> Hits:
    ids, scores = zip(*pairs, strict=True)
    return Hits(np.array(ids, np.int64), np.array(scores, np.float32), ceiling)


def test_fusion_adds_normalised_scores() -> None:
    lexical = _hits((1, 8.0), (2, 4.0))
    dense = _hits((2, 0.75), (3, 0.5))
    ranked = fuse(lexical, dense, dense_weight=1.0, limit=5)
    # Unseen counts as the worst seen: 1 has 1 + 0.5, 2 has 0.5 + 0.75, 3 has 0.5 + 0.5.
    assert [(one.passage, one.score) for one in ranked] == [(1, 1.5), (2, 1.25), (3, 1.0)]
    assert ranked[1] == Ranked(2, 1.25, 2, 4.0, 1, 0.75, 0.4)
    assert ranked[2].coverage == 0
    only = fuse(lexical, NO_HITS, dense_weight=1.0, limit=1)
    assert [(one.passage, one.score) for one in only] == [(1, 1.0)]
    assert fuse(NO_HITS, NO_HITS, dense_weight=1.0, limit=5) == []


def test_rank_fusion_is_the_papers() -> None:
    ranked = fuse_ranks(
        _hits((1, 8.0), (2, 4.0)), _hits((2, 0.7), (3, 0.5)), dense_weight=1.0, limit=5
    )
    assert [one.passage for one in ranked] == [2, 1, 3]
    assert ranked[0].score == pytest.approx(1 / 62 + 1 / 61)


def test_answers_of_passages_are_ranked_together() -> None:
    found = [Ranked(7, 1.5, coverage=0.8), Ranked(8, 1.4, coverage=0.1)]
    spans = [
        SpanReading(0, 0, 3, 5.0, 0.6, 0.0),
        SpanReading(0, 4, 6, 4.0, 0.2, 0.0),
        SpanReading(1, 0, 3, 5.5, 0.9, 0.0),
    ]
    ranked = rank_spans(spans, found)
    # The second passage is 0.1 behind, which is worth 1.2 logits.
    assert [one.reading for one in ranked] == [spans[0], spans[2], spans[1]]
    assert 0 < sum(one.score for one in ranked) < 1
    better = rank_spans(spans[:1], found[:1])[0]
    total = math.exp(5.0) / 0.6
    assert better.score == pytest.approx(math.exp(5.0) / (1 + total))
    assert rank_spans([], found) == []


def test_no_answer_by_the_reader_or_for_want_of_the_questions_words() -> None:
    span = SpanReading(0, 0, 3, 5.0, 0.6, 4.0)
    assert is_answer(span, Ranked(1, 1.0, coverage=0.5), -1.0, "en")
    assert not is_answer(span, Ranked(1, 1.0, coverage=0.5), -1.5, "en")
    assert not is_answer(span, Ranked(1, 1.0, coverage=0.2), -1.0, "en")
    assert is_answer(span, Ranked(1, 1.0, coverage=0.2), -1.0, "zh")
    assert is_answer(span, Ranked(1, 1.0, dense_score=0.7, coverage=0.2), -1.0, "en")
