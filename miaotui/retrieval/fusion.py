"""One ranking out of a lexical and a dense one: a weighted sum of normalised scores.

BM25 scores are divided by the best one, cosines are taken as they are (Bruch, Gai and Ingber,
"An Analysis of Fusion Functions for Hybrid Retrieval", TOIS 2023: TM2C2). Reciprocal rank
fusion (Cormack, Clarke and Büttcher, SIGIR 2009) was measured, too, and put fewer right
passages on top: it throws away by how much one passage is better than the next. See
`tests/bench/retrieval.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from miaotui.retrieval.lexical import Hits

# The constant of the paper on reciprocal rank fusion: how little the first ranks stand out.
RANK_CONSTANT = 60


@dataclass(frozen=True, slots=True)
class Ranked:
    """A passage found: its fused score, and for each retriever rank (from 1) and score.

    `None` where the retriever did not find it among its best. `coverage`: the lexical score as
    a share of what it could be, 0 to 1: how much of what the question asks about is there.
    """

    passage: int
    score: float
    lexical_rank: int | None = None
    lexical_score: float | None = None
    dense_rank: int | None = None
    dense_score: float | None = None
    coverage: float = 0.0


_Places = dict[int, tuple[int, float]]


def fuse(lexical: Hits, dense: Hits, *, dense_weight: float, limit: int) -> list[Ranked]:
    """The best passages of both rankings; the lexical one has weight 1.

    A passage that one of them did not find counts there like the worst that it found.
    """
    places = _places(lexical), _places(dense)
    best = max((score for _, score in places[0].values()), default=1.0)
    worst = [min((score for _, score in place.values()), default=0.0) for place in places]

    def score(passage: int) -> float:
        first = places[0].get(passage, (0, worst[0]))[1] / best
        return first + dense_weight * places[1].get(passage, (0, worst[1]))[1]

    return _ranked(places, score, lexical.ceiling, limit)


def fuse_ranks(lexical: Hits, dense: Hits, *, dense_weight: float, limit: int) -> list[Ranked]:
    """The same by reciprocal rank fusion, for comparison."""
    places = _places(lexical), _places(dense)

    def score(passage: int) -> float:
        return sum(
            weight / (RANK_CONSTANT + place[passage][0])
            for weight, place in zip((1.0, dense_weight), places, strict=True)
            if passage in place
        )

    return _ranked(places, score, lexical.ceiling, limit)


def _ranked(
    places: tuple[_Places, _Places],
    score: Callable[[int], float],
    ceiling: float,
    limit: int,
) -> list[Ranked]:
    scored = [(score(passage), passage) for passage in {**places[0], **places[1]}]
    scored.sort(key=lambda pair: (-pair[0], pair[1]))
    found = []
    for value, passage in scored[:limit]:
        lexical_rank, lexical_score = places[0].get(passage, (None, None))
        dense_rank, dense_score = places[1].get(passage, (None, None))
        coverage = (lexical_score or 0.0) / (ceiling or 1.0)
        found.append(
            Ranked(passage, value, lexical_rank, lexical_score, dense_rank, dense_score, coverage)
        )
    return found


def _places(hits: Hits) -> _Places:
    pairs = zip(hits.ids.tolist(), hits.scores.tolist(), strict=True)
    return {passage: (rank, score) for rank, (passage, score) in enumerate(pairs, start=1)}
