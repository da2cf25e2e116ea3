"""Labels found by offsets give back the answers; windows cover; crops hold their answer."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from miaotui.training.data import Answer
from miaotui.training.features import Encoded, token_span, windows
from miaotui.training.maker import Draw, Maker, crop_around
from miaotui.training.vocab import Vocabulary


def test_token_spans_give_back_the_answers(encoded: Encoded) -> None:
    whole = 0
    for number, question in enumerate(encoded.corpus.questions):
        passage = encoded.passages[question.passage]
        text = encoded.corpus.passages[question.passage].text
        for answer, (first, last) in zip(question.answers, encoded.spans[number], strict=True):
            span = text[passage.starts[first] : passage.ends[last]]
            assert text[answer.start : answer.end] in span
            whole += span == text[answer.start : answer.end]
    assert whole == sum(len(q.answers) for q in encoded.corpus.questions)


def test_an_answer_within_a_token_takes_the_token(encoded: Encoded) -> None:
    passage = encoded.passages[0]
    start, end = int(passage.starts[5]), int(passage.ends[5])
    assert token_span(passage, Answer(start + 1, end)) == (5, 5)
    assert token_span(passage, Answer(10_000, 10_001)) is None


@pytest.mark.parametrize(("tokens", "room", "overlap"), [(5, 10, 3), (100, 30, 10), (31, 30, 29)])
def test_windows_cover_and_overlap(tokens: int, room: int, overlap: int) -> None:
    found = windows(tokens, room, overlap)
    assert found[0][0] == 0
    assert found[-1][1] == tokens
    assert all(high - low <= room for low, high in found)
    assert all(a[1] - b[0] >= min(overlap, room - 1) for a, b in pairwise(found))


def test_crops_hold_the_answer() -> None:
    rng = random.Random(1)
    for _ in range(500):
        length = rng.randint(1, 60)
        first = rng.randrange(length)
        last = min(length - 1, first + rng.randint(0, 20))
        size = rng.randint(1, 40)
        low, high = crop_around(length, first, last, size, rng)
        assert 0 <= low <= first <= last < high <= length
        assert high - low <= max(size, last - first + 1)


def test_examples_keep_their_answers_text(
    maker: Maker, encoded: Encoded, vocabulary: Vocabulary
) -> None:
    rng = random.Random(2)
    for number, question in enumerate(encoded.corpus.questions):
        if encoded.corpus.passages[question.passage].split != "train":
            continue
        example = maker.make(number, Draw(4, 12, 0.0, 0.0), rng)
        answer = question.answers[0]
        text = encoded.corpus.passages[question.passage].text[answer.start : answer.end]
        ids = example.ids[example.starts[0] : example.ends[0] + 1]
        assert vocabulary.tokenizer.decode(ids).replace(" ", "") == text.lower().replace(" ", "")
        assert example.starts[0] >= example.passage_at


def test_wrong_passages_are_labelled_cls_and_lack_the_answer(
    maker: Maker, encoded: Encoded, vocabulary: Vocabulary
) -> None:
    rng = random.Random(3)
    numbers = [
        n
        for n, q in enumerate(encoded.corpus.questions)
        if encoded.corpus.passages[q.passage].split == "train"
    ]
    for number in numbers:
        example = maker.make(number, Draw(40, 40, 1.0, 0.0), rng)
        assert example.starts == example.ends == [0]
        question = encoded.corpus.questions[number]
        answer = question.answers[0]
        text = encoded.corpus.passages[question.passage].text[answer.start : answer.end].lower()
        passage = vocabulary.tokenizer.decode(example.ids[example.passage_at :])
        assert text not in passage.replace(" ", "")


def test_only_chinese_tokens_outside_the_answer_are_masked(
    maker: Maker, encoded: Encoded, vocabulary: Vocabulary
) -> None:
    rng = random.Random(4)
    mask = vocabulary.tokenizer.token_to_id("[MASK]")
    seen = 0
    for number, question in enumerate(encoded.corpus.questions):
        example = maker.make(number, Draw(40, 40, 0.0, 0.5), rng)
        if encoded.corpus.passages[question.passage].language == "en":
            assert not example.masked
        for position, target in zip(example.masked, example.targets, strict=True):
            assert example.ids[position] == mask
            assert 0 <= target < len(vocabulary.row_chars)
            assert not example.starts[0] <= position <= example.ends[0]
            seen += 1
    assert seen > 20
