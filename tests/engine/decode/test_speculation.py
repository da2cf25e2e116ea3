"""Drafts from what the text says already."""

from __future__ import annotations

import math
import random
import time

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from miaotui.engine.decode.speculation import Drafter, PromptIndex
from tests.engine.decode.ring import ids


def _guess(tokens: list[int], prompt: int, most: int = 8, room: int = 100) -> list[int]:
    drafter = Drafter(most, prompt)
    index = PromptIndex(ids(*tokens[:prompt]))
    guess = drafter.draft(ids(*tokens), index, room)
    return [] if guess is None else guess.tolist()


def test_the_longest_match_counts_and_then_the_last() -> None:
    # "1 2 3" came before with 4 after it; "2 3" later, with 5; "3" last, with 6.
    tokens = [1, 2, 3, 4, 7, 2, 3, 5, 7, 3, 6, 9, 1, 2, 3]
    assert _guess(tokens, 12)[:3] == [4, 7, 2]
    assert _guess([0, *tokens[1:12], 8, 2, 3], 12)[:1] == [5]
    assert _guess([*tokens[:12], 8, 8, 3], 12)[:1] == [6]
    assert _guess([1, 2, 3, 4, 0, 1, 2, 3, 5, 0, 1, 2, 3], 10)[:2] == [5, 0]


def test_no_match_no_draft() -> None:
    assert _guess([1, 2, 3, 4, 5], 4) == []
    assert _guess([1, 2], 1) == []


def test_what_was_written_counts_like_the_prompt() -> None:
    assert _guess([9, 1, 2, 3, 4, 5, 1, 2, 3], 1)[:2] == [4, 5]


def test_a_text_that_repeats_itself_is_continued_past_its_end() -> None:
    assert _guess([0, 1, 2, 0, 1, 2, 0], 6) == [1, 2, 0, 1, 2, 0, 1, 2]
    assert _guess([0, 1, 2, 0, 1, 2, 0], 6, room=2) == [1, 2]


@given(st.lists(st.integers(0, 2), min_size=2, max_size=60), st.integers(1, 59), st.integers(1, 7))
def test_the_index_kept_up_step_by_step_finds_what_a_search_finds(
    tokens: list[int], prompt: int, step: int
) -> None:
    prompt = min(prompt, len(tokens) - 1)
    drafter = Drafter(4, prompt)
    index = PromptIndex(ids(*tokens[:prompt]))
    for length in range(prompt + 1, len(tokens) + 1, step):
        guess = drafter.draft(ids(*tokens[:length]), index, 4)
        for n in (3, 2, 1):
            tail = tokens[length - n : length]
            ends = [e for e in range(n, length) if len(tail) == n and tokens[e - n : e] == tail]
            if ends:
                assert guess is not None
                known = tokens[ends[-1] : length]
                assert guess.tolist() == [known[i % len(known)] for i in range(len(guess))]
                break
        else:
            assert guess is None


def _write(truth: list[int], prompt: int, most: int) -> tuple[int, int, int]:
    """Steps, drafted and accepted tokens until `truth` is written."""
    drafter = Drafter(most, prompt)
    index = PromptIndex(ids(*truth[:prompt]))
    array = ids(*truth)
    length = prompt + 1
    steps = drafted = right = 0
    while length < len(truth):
        steps += 1
        guess = drafter.draft(array[:length], index, len(truth) - length)
        accepted = 0
        if guess is not None:
            while accepted < len(guess) and guess[accepted] == truth[length + accepted]:
                accepted += 1
            drafter.learn(len(guess), accepted)
            drafted += len(guess)
            right += accepted
        length += accepted + 1
    return steps, drafted, right


def test_copying_takes_few_steps() -> None:
    passage = [random.Random(1).randrange(1000) for _ in range(300)]
    steps, drafted, right = _write([*passage, *passage[50:250]], 300, 8)
    assert steps < 200 / 4
    assert right > 0.9 * drafted


def test_a_text_without_repetition_costs_nearly_nothing() -> None:
    generator = random.Random(2)
    # Single tokens come again all the time, as in any language, but nothing follows from it.
    steps, drafted, _ = _write([generator.randrange(200) for _ in range(2300)], 300, 8)
    assert steps > 1900
    assert drafted < 0.1 * steps


def test_a_copy_is_found_again_after_long_misses() -> None:
    generator = random.Random(3)
    passage = [generator.randrange(500) for _ in range(300)]
    noise = [generator.randrange(500) for _ in range(500)]
    before, _, _ = _write([*passage, *noise], 300, 8)
    both, _, _ = _write([*passage, *noise, *passage[:200]], 300, 8)
    assert both - before < 200 / 3


def test_a_step_costs_microseconds() -> None:
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, 30_000, 10_000).astype(np.int32)
    # Of this thread's own time, the best of several: other work shares the cores.
    built = step = math.inf
    for _ in range(3):
        begin = time.thread_time()
        index = PromptIndex(tokens[:8000])
        built = min(built, time.thread_time() - begin)
        drafter = Drafter(8, 8000)
        begin = time.thread_time()
        for length in range(8001, 10_000):
            drafter.draft(tokens[:length], index, 8)
        step = min(step, (time.thread_time() - begin) / 2000)
    # Ten times what it takes on a slow core; a search of the text would be slower yet.
    assert built < 0.1
    assert step < 100e-6
