"""What one answer costs over the bare model call, and how many a second there are.

Both sides run in turns, in processes of their own. Before each timed call of a single question
the machine lies idle for `PAUSE_SECONDS`, so that both sides start on equally cold cores and
neither meets the other's spinning threads: that is what a lone request meets in practice.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import track

from tests.bench.child import Child
from tests.bench.figures import Figure
from tests.bench.questions import questions

PAUSE_SECONDS = 0.03
WARM_UP = 10
_progress = Console(stderr=True)


def layers(peer: Child, count: int) -> Figure:
    """Our layers against transformers', unsplit, both in one process."""
    ours: list[float] = []
    bare: list[float] = []
    for question in track(questions(count, seed=4), "layers", console=_progress):
        peer("prepare", body=question.body)
        for times, what in ((bare, "call"), (ours, "stage")):
            time.sleep(PAUSE_SECONDS)
            times.append(peer(what))
    return _medians("layers of one question, one process, p50", ours, bare, "transformers' layers")


def overhead(client: Child, peer: Child, count: int) -> tuple[Figure, dict[str, float]]:
    """One uncached question over HTTP against the bare model call, in turns.

    Beside the figure, the median milliseconds of each hop; "http" is what the client waited
    beyond the answer's own total.
    """
    ours: list[float] = []
    bare: list[float] = []
    hops: list[dict[str, float]] = []
    for question in track(questions(count, seed=1), "overhead", console=_progress):
        peer("prepare", body=question.body)
        time.sleep(PAUSE_SECONDS)
        seconds, timings = client("ask", body=question.body)
        ours.append(seconds)
        hops.append({**timings, "http": seconds * 1e3 - timings["total"]})
        time.sleep(PAUSE_SECONDS)
        bare.append(peer("call"))
    medians = {
        hop: statistics.median(timings[hop] for timings in hops[WARM_UP:]) for hop in hops[0]
    }
    return _medians("one uncached question, p50", ours, bare, "bare transformers call"), medians


def cached(client: Child, count: int) -> Figure:
    """A cached answer against the same server's health check, in turns."""
    (question,) = questions(1, seed=2)
    client("ask", body=question.body)
    hits: list[float] = []
    bare: list[float] = []
    for _ in track(range(count), "cached", console=_progress):
        hits.append(client("ask", body=question.body)[0])
        bare.append(client("healthz"))
    return _medians("a cached answer, p50", hits, bare, "GET /healthz of the same server")


def throughput(client: Child, peer: Child, count: int, concurrency: int) -> Figure:
    """Uncached questions a second over HTTP against transformers in batches, in turns."""
    ours: list[float] = []
    bare: list[float] = []
    for turn in track(range(4), "throughput", console=_progress):
        bodies = [question.body for question in questions(count, seed=10 + turn)]
        rates = (
            client("load", bodies=bodies, concurrency=concurrency),
            peer("throughput", bodies=bodies, batch=16),
        )
        if turn:  # the first warms both up
            ours.append(rates[0])
            bare.append(rates[1])
    return Figure(
        f"uncached questions a second, concurrency {concurrency}",
        statistics.median(ours),
        statistics.median(bare),
        "transformers, batches of 16 by length",
        "1/s",
    )


def _medians(what: str, ours: Sequence[float], bare: Sequence[float], peer_is: str) -> Figure:
    return Figure(
        what,
        statistics.median(ours[WARM_UP:]) * 1e3,
        statistics.median(bare[WARM_UP:]) * 1e3,
        peer_is,
        "ms",
    )
