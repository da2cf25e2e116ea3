"""Tokens to words: nothing is lost, in English and Chinese."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miaotui.explain.words import TokenValue, sum_by_word


def words(text: str, *pieces: str) -> list[tuple[str, float]]:
    """The words of a text whose tokens are `pieces`, worth 1, 2, 4, …"""
    tokens, place = [], 0
    for index, piece in enumerate(pieces):
        start = text.index(piece, place) if piece else place
        place = start + len(piece)
        tokens.append(TokenValue(start, place, 2.0**index))
    return [(text[word.start : word.end], word.value) for word in sum_by_word(text, tokens)]


def test_subwords_add_up() -> None:
    assert words("The unbelievable end.", "The", "un", "believ", "able", "end", ".") == [
        ("The", 1),
        ("unbelievable", 14),
        ("end", 16),
        (".", 32),
    ]


def test_chinese_by_character_and_by_token() -> None:
    assert words("鲁迅生于1881年", "鲁", "迅", "生", "于", "18", "##81"[2:], "年") == [
        ("鲁", 1),
        ("迅", 2),
        ("生", 4),
        ("于", 8),
        ("1881", 48),
        ("年", 64),
    ]
    # A token of several characters makes one word of them.
    assert words("鲁迅生于浙江", "鲁迅", "生", "于", "浙江") == [
        ("鲁迅", 1),
        ("生", 2),
        ("于", 4),
        ("浙江", 8),
    ]


def test_a_window_holds_a_part_only() -> None:
    assert words("one two three four", "two", "three") == [("two", 1), ("three", 2)]


def test_marks_and_mixtures() -> None:
    assert words("It's GPT-2的e-mail!", "It", "'", "s", "GPT", "-2", "的", "e-mail", "!") == [
        ("It's", 7),
        ("GPT-2", 24),
        ("的", 32),
        ("e-mail", 64),
        ("!", 128),
    ]


def test_tokens_without_characters_count_for_a_neighbour() -> None:
    assert words("a b", "", "a", "", "b") == [("a", 7), ("b", 8)]


@given(st.text(max_size=60), st.data())
def test_the_sum_stays(text: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=12)) | {0, len(text)})
    tokens = [
        TokenValue(start, end, float(index + 1))
        for index, (start, end) in enumerate(pairwise(cuts))
    ]
    found = sum_by_word(text, tokens)
    if any(token.start < token.end for token in tokens):
        assert sum(word.value for word in found) == pytest.approx(
            sum(token.value for token in tokens)
        )
    for one, other in pairwise(found):
        assert one.end <= other.start
