"""The span reader against a reader that tries every span in plain Python."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miaotui.engine import spans as module
from miaotui.engine.spans import Reading, SpanError, WindowLogits, read_spans

# Few different values, so that ties are common; all exact in float32.
LOGITS = st.integers(-24, 24).map(lambda value: value / 4)


def window(
    start: list[float], end: list[float], position: int, first: int, tokens: int
) -> WindowLogits:
    return WindowLogits(
        np.array(start, np.float32), np.array(end, np.float32), position, first, tokens
    )


@st.composite
def passages(draw: st.DrawFn) -> list[WindowLogits]:
    """Windows with stride over one passage, as the tokenizer service cuts them."""
    tokens = draw(st.integers(1, 24))
    room = draw(st.integers(1, 10))
    step = draw(st.integers(1, room))
    position = draw(st.integers(1, 4))
    windows = []
    for first in range(0, tokens, step):
        size = min(room, tokens - first)
        length = position + size + 1
        values = st.lists(LOGITS, min_size=length, max_size=length)
        windows.append(window(draw(values), draw(values), position, first, size))
        if first + size == tokens:
            break
    return draw(st.permutations(windows))


def brute_force(
    windows: list[WindowLogits], top_k: int, length: int
) -> tuple[list[tuple[int, int, float, float]], float, float]:
    """(n-best as (first, last, logit, score), no-answer score, no-answer probability)."""
    logits: dict[tuple[int, int], float] = {}
    for one in windows:
        for i in range(one.passage_tokens):
            for j in range(i, min(one.passage_tokens, i + length)):
                logit = float(one.start[one.passage_position + i])
                logit += float(one.end[one.passage_position + j])
                key = (one.passage_first + i, one.passage_first + j)
                logits[key] = max(logit, logits.get(key, -math.inf))
    null = min(float(one.start[0]) + float(one.end[0]) for one in windows)
    mass = sum(math.exp(logit) for logit in logits.values()) + math.exp(null)
    ranked = sorted(logits.items(), key=lambda item: (-item[1], item[0]))
    best = [(first, last, logit, math.exp(logit) / mass) for (first, last), logit in ranked[:top_k]]
    return best, null - best[0][2], math.exp(null) / mass


def check_equal(reading: Reading, windows: list[WindowLogits], top_k: int, length: int) -> None:
    best, no_answer, probability = brute_force(windows, top_k, length)
    assert [(span.first, span.last, span.logit) for span in reading.spans] == [
        one[:3] for one in best
    ]
    assert [span.score for span in reading.spans] == pytest.approx(
        [one[3] for one in best], rel=1e-5
    )
    assert reading.no_answer_score == no_answer
    assert reading.no_answer_probability == pytest.approx(probability, rel=1e-5)


@given(passages(), st.integers(1, 12), st.integers(1, 12))
def test_equals_brute_force(windows: list[WindowLogits], top_k: int, length: int) -> None:
    reading = read_spans(windows, top_k=top_k, max_answer_length=length)
    check_equal(reading, windows, top_k, length)


@given(windows=passages(), top_k=st.integers(1, 12), length=st.integers(1, 12), rows=...)
def test_blocks_change_nothing(
    windows: list[WindowLogits], top_k: int, length: int, rows: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK_SPANS", 20 if rows else 1)
        reading = read_spans(windows, top_k=top_k, max_answer_length=length)
    check_equal(reading, windows, top_k, length)


def test_overlapping_windows_count_a_span_once_with_its_best_logit() -> None:
    low = window([0, 1, 2], [0, 1, 2], 1, 0, 2)
    high = window([0, 5], [0, 5], 1, 1, 1)
    reading = read_spans([low, high], top_k=10)
    assert [(s.first, s.last, s.logit) for s in reading.spans] == [
        (1, 1, 10.0),
        (0, 1, 3.0),
        (0, 0, 2.0),
    ]
    assert sum(s.score for s in reading.spans) + reading.no_answer_probability == pytest.approx(1)


def test_answers_do_not_cross_windows_or_leave_the_passage() -> None:
    # The best start is in the first window's last token, the best end in the second window;
    # the special tokens around the passage have higher logits than anything else.
    one = window([9, 9, 0, 3, 9], [9, 9, 0, 0, 9], 2, 0, 2)
    two = window([9, 9, 0, 0, 9], [9, 9, 3, 0, 9], 2, 2, 2)
    assert {(s.first, s.last) for s in read_spans([one, two], top_k=99).spans} == {
        (0, 0), (0, 1), (1, 1), (2, 2), (2, 3), (3, 3),
    }  # fmt: skip


def test_no_answer_is_the_least_of_the_windows_and_compared_with_the_threshold() -> None:
    sure = window([4, 0], [4, 1], 1, 0, 1)
    unsure = window([1, 0], [1, 0], 1, 1, 1)
    reading = read_spans([sure, unsure])
    assert reading.no_answer_score == 1.0  # 2 - 1
    assert reading.answerable
    assert read_spans([sure, unsure], no_answer_threshold=1.0).answerable
    assert not read_spans([sure, unsure], no_answer_threshold=0.99).answerable


def test_huge_logits_do_not_overflow() -> None:
    reading = read_spans([window([-3e4, 1e4, 3e4], [-3e4, 2e4, 3e4], 1, 0, 2)], top_k=2)
    assert [s.score for s in reading.spans] == [1.0, 0.0]
    reading = read_spans([window([3e4, -3e4], [3e4, -3e4], 1, 0, 1)])
    assert (reading.spans[0].score, reading.no_answer_probability) == (0.0, 1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["start", "end"])
def test_refuses_logits_that_are_not_finite(value: float, side: str) -> None:
    good = window([0, 1], [0, 1], 1, 0, 1)
    wrong = np.array([0, value], np.float32)
    bad = replace(good, start=wrong) if side == "start" else replace(good, end=wrong)
    with pytest.raises(SpanError, match="window 1: logits are not finite"):
        read_spans([good, bad])


def test_infinities_of_both_signs_do_not_cancel() -> None:
    with pytest.raises(SpanError, match="not finite"):
        read_spans([window([math.inf, -math.inf], [0, 0], 1, 0, 1)])


@pytest.mark.parametrize(
    ("windows", "arguments", "message"),
    [
        ([], {}, "no windows"),
        ([window([0, 1], [0, 1], 1, 0, 1)], {"top_k": 0}, "top_k is 0"),
        ([window([0, 1], [0, 1], 1, 0, 1)], {"max_answer_length": 0}, "max_answer_length 0"),
        ([window([0, 1], [0], 1, 0, 1)], {}, "2 start logits, 1 end logits"),
        ([window([0, 1], [0, 1], 1, 0, 2)], {}, r"\[1, 3\) of a window of 2"),
        ([window([0, 1], [0, 1], 0, 0, 1)], {}, "after the first token"),
        ([window([0, 1], [0, 1], 1, 0, 0)], {}, "one at least"),
    ],
)
def test_refuses_what_cannot_be_read(
    windows: list[WindowLogits], arguments: dict[str, int], message: str
) -> None:
    with pytest.raises(SpanError, match=message):
        read_spans(windows, **arguments)


def test_is_quick() -> None:
    """Under 0.3 ms of the thread's own time for one window: the fastest of many runs."""
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(2, 384)).astype(np.float32)
    one = [WindowLogits(logits[0], logits[1], 12, 0, 371)]
    best = math.inf
    for _ in range(200):
        begin = time.thread_time()
        read_spans(one)
        best = min(best, time.thread_time() - begin)
    assert best < 0.3e-3


def test_long_passage_with_long_answers() -> None:
    """200,000 tokens: the planted span is found among 20 million."""
    generator = np.random.default_rng(1)
    start, end = generator.normal(size=(2, 200_000)).astype(np.float32)
    start[150_000] = end[150_090] = 50.0
    windows = []
    for first in range(0, 200_000, 256):
        size = min(384, 200_000 - first)
        pad = np.zeros(1, np.float32)
        part = slice(first, first + size)
        windows.append(
            WindowLogits(
                np.concatenate((pad, start[part])), np.concatenate((pad, end[part])), 1, first, size
            )
        )
    reading = read_spans(windows, max_answer_length=100)
    assert (reading.spans[0].first, reading.spans[0].last) == (150_000, 150_090)
    assert reading.spans[0].score == pytest.approx(1.0)
