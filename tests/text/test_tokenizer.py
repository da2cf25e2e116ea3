"""Tokens, windows and offsets: equal to transformers' where the text needs no care."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import regex  # type: ignore[import-untyped]
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from miaotui.text.cleaning import TextOptions, clean
from miaotui.text.errors import (
    EmptyTextError,
    FingerprintMismatchError,
    MalformedTokensError,
    ModelDirectoryError,
    TextTooLargeError,
    TokenRangeError,
    WindowError,
)
from miaotui.text.normalization import Normalization
from miaotui.text.tokenizer import Limits, load_tokenizer
from miaotui.text.tokens import TokenizedText, character_spans
from tests.checkpoints import EXAMPLES, FAMILIES, make_tokenizer
from tests.text.conftest import Pair, tokenizer_directory
from tests.text.strategies import FAMILY, markup_texts, texts

Pairs = Callable[[str], Pair]
AS_SENT = TextOptions(Normalization.NONE)
families = pytest.mark.parametrize("family", FAMILIES)
shared = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None
)
# Nothing that cleaning changes, and no cluster or white space that offsets are changed for.
plain_texts = st.lists(
    st.sampled_from(
        [*"abcXYZ019.,!?«»", " ", " ", "the ", "Eiffel", " tower", "北", "京是", "。", "éü", "Ж",
         "the longest river in the world", "عرب", "日本", "😀", "𠀀", "한국", "x" * 120]
    ),
    min_size=1,
    max_size=60,
).map("".join).filter(str.strip)  # fmt: skip


@families
@shared
@given(
    question=plain_texts,
    passage=plain_texts,
    max_length=st.integers(16, 512),
    share=st.floats(0, 0.9),
)
def test_windows_equal_transformers(
    family: str,
    tokenizer_pair: Pairs,
    question: str,
    passage: str,
    max_length: int,
    share: float,
) -> None:
    check_windows(tokenizer_pair(family), question, passage, max_length, share)


@families
@pytest.mark.parametrize(("question", "passage"), EXAMPLES)
def test_windows_equal_transformers_on_prose(
    family: str, tokenizer_pair: Pairs, question: str, passage: str
) -> None:
    for max_length in (32, 47, 64, 384):
        for share in (0, 0.3, 0.7):
            check_windows(tokenizer_pair(family), question, passage * 5, max_length, share)


def check_windows(pair: Pair, question: str, passage: str, max_length: int, share: float) -> None:
    ours, theirs = pair
    asked, told = ours.tokenize(question, AS_SENT), ours.tokenize(passage, AS_SENT)
    room = max_length - len(asked) - ours.template.special_tokens
    if room < 1:
        with pytest.raises(WindowError, match=r"^question: .*no room"):
            ours.windows(asked, told, max_length=max_length)
        return
    stride = int(share * room)
    expected = theirs(
        question,
        passage,
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    windows = ours.windows(asked, told, max_length=max_length, stride=stride)
    assert [window.input_ids.tolist() for window in windows] == expected["input_ids"]
    types = expected.get("token_type_ids")
    for index, window in enumerate(windows):
        if window.token_type_ids is None:
            assert types is None or not any(types[index])
        else:
            assert window.token_type_ids.tolist() == types[index]
        part = slice(window.passage_position, window.passage_position + window.passage_tokens)
        theirs_passage = [side == 1 for side in expected.sequence_ids(index)]
        assert [i for i, is_passage in enumerate(theirs_passage) if is_passage] == list(
            range(part.start, part.stop)
        )
        inside = slice(window.passage_first, window.passage_first + window.passage_tokens)
        ranges = zip(told.starts[inside].tolist(), told.ends[inside].tolist(), strict=True)
        for ours_range, theirs_range in zip(
            ranges, expected["offset_mapping"][index][part], strict=True
        ):
            assert passage[slice(*ours_range)] == passage[slice(*theirs_range)].strip()


@families
@shared
@given(source=st.one_of(texts, markup_texts), markup=st.booleans())
def test_every_span_is_a_whole_piece_of_the_text_as_sent(
    family: str, tokenizer_pair: Pairs, source: str, markup: bool
) -> None:
    """Spans lie in the text, cut no cluster, and clean to what the model has read."""
    ours, _ = tokenizer_pair(family)
    options = TextOptions(Normalization.NFC, markup)
    try:
        tokens = ours.tokenize(source, options)
    except EmptyTextError:
        return
    tokens.check("text", ours.vocab_size)
    assert tokens.characters == len(source)
    aligned = clean(source, options)
    # Boundaries by Unicode Annex 29; white space is never part of a cluster here.
    clusters = [0]
    for piece in regex.findall(r"\s|\S+", aligned.text):
        for cluster in regex.findall(r"\X", piece):
            clusters.append(clusters[-1] + len(cluster))
    starts = np.arange(len(source)) if aligned.starts is None else aligned.starts
    ends = np.arange(len(source)) + 1 if aligned.ends is None else aligned.ends
    for start, end in zip(tokens.starts.tolist(), tokens.ends.tolist(), strict=True):
        if start == end:
            continue
        # As positions in the clean text: from the first character that begins in the span
        # to the last that ends in it.
        first = int(np.searchsorted(starts, start))
        past = int(np.searchsorted(ends, end, side="right"))
        assert first < past
        assert starts[first] == start
        assert ends[past - 1] == end
        # Of characters that share a range (a ligature), a cluster may begin at any.
        assert any(starts[c] == start for c in clusters if c < len(starts)), "cut at the start"
        assert any(ends[c - 1] == end for c in clusters if c), "cut at the end"
        cut = source[start:end]
        assert not aligned.text[first].isspace()
        edges = "\u200c\u200d"
        assert clean(cut, options).text.strip(edges) == aligned.text[first:past].strip(edges)


@families
def test_answers_come_back_as_sent(family: str, tokenizer_pair: Pairs) -> None:
    """The words of an answer, whatever stands in and around them."""
    ours, _ = tokenizer_pair(family)
    source = (
        "In\u200b the <b>Eif\u00adfel</b> Tower, Cafe\u0301  \ud83d\ude00 " + FAMILY + " 北京。"
    )
    tokens = ours.tokenize(source, TextOptions(strip_markup=True))
    for answer in ("Eif\u00adfel", "Cafe\u0301", "\ud83d\ude00", FAMILY, "北京", "Tower"):
        begin = source.index(answer)
        end = begin + len(answer)
        inside = np.flatnonzero(
            (tokens.starts >= begin) & (tokens.ends <= end) & (tokens.ends > tokens.starts)
        )
        first, last = inside[:1].astype(np.int32), inside[-1:].astype(np.int32)
        starts, ends = character_spans(tokens, first, last)
        assert source[int(starts[0]) : int(ends[0])] == answer


def test_white_space_tokens_are_left_out_of_spans() -> None:
    array = np.array
    tokens = TokenizedText(
        array([1, 2, 3, 4], np.int32),
        array([0, 2, 2, 5], np.int32),
        array([1, 2, 4, 5], np.int32),
        5,
        "",
    )
    first, last = array([0, 1, 0, 2, 1, 3], np.int32), array([1, 2, 3, 3, 1, 3], np.int32)
    starts, ends = character_spans(tokens, first, last)
    assert starts.tolist() == [0, 2, 0, 2, 2, 5]
    assert ends.tolist() == [1, 4, 4, 4, 2, 5]
    for wrong in ((0, 4), (2, 1), (-1, 0)):
        with pytest.raises(TokenRangeError, match=r"spans\[0\]: tokens"):
            character_spans(tokens, array([wrong[0]], np.int32), array([wrong[1]], np.int32))


@families
def test_special_tokens_in_a_text_are_only_text(family: str, tokenizer_pair: Pairs) -> None:
    ours, _ = tokenizer_pair(family)
    template = ours.template
    special = {*template.before.tolist(), *template.between.tolist(), *template.after.tolist()}
    tokens = ours.tokenize("a [SEP] b </s> c [CLS] d <s> e", AS_SENT)
    assert not special & set(tokens.input_ids.tolist())


@families
def test_normalisation_makes_equal_texts_equal(family: str, tokenizer_pair: Pairs) -> None:
    ours, _ = tokenizer_pair(family)
    composed, apart = ours.tokenize("Café Eiffel"), ours.tokenize("Cafe\u0301 Eiffel")
    assert composed.input_ids.tolist() == apart.input_ids.tolist()
    assert composed.starts[-1] + 1 == apart.starts[-1]


@families
def test_decode(family: str, tokenizer_pair: Pairs) -> None:
    ours, theirs = tokenizer_pair(family)
    ids = theirs("the tower", "北京")["input_ids"]
    for skip in (False, True):
        expected = theirs.backend_tokenizer.decode(ids, skip_special_tokens=skip)
        assert ours.decode(ids, skip_special_tokens=skip) == expected
    with pytest.raises(TokenRangeError, match=r"^ids\[1\]: "):
        ours.decode([0, ours.vocab_size])


def test_default_lengths(tmp_path: Path) -> None:
    for family in FAMILIES:
        ours = load_tokenizer(tokenizer_directory(tmp_path / family, family))
        assert (ours.longest, ours.max_length, ours.stride) == (512, 384, 128)
    file = tmp_path / "bert" / "config.json"
    config = json.loads(file.read_text()) | {"miaotui": {"max_length": 256, "stride": 64}}
    file.write_text(json.dumps(config))
    ours = load_tokenizer(tmp_path / "bert")
    assert (ours.longest, ours.max_length, ours.stride) == (512, 256, 64)
    for wrong in ({"max_length": 513}, {"stride": -1}, {"stride": "x"}):
        file.write_text(json.dumps(config | {"miaotui": wrong}))
        with pytest.raises(ModelDirectoryError, match=r"config\.json has miaotui\."):
            load_tokenizer(tmp_path / "bert")


def test_refuses_directories_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ModelDirectoryError, match="no such model directory"):
        load_tokenizer(tmp_path / "missing")
    directory = tokenizer_directory(tmp_path / "model", "bert")
    (directory / "tokenizer.json").write_text("{broken")
    with pytest.raises(ModelDirectoryError, match="cannot be loaded"):
        load_tokenizer(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).unlink()
    with pytest.raises(ModelDirectoryError, match="no tokenizer files"):
        load_tokenizer(directory)
    make_tokenizer("bert").save_pretrained(tmp_path / "only")
    with pytest.raises(ModelDirectoryError, match=r"no config\.json"):
        load_tokenizer(tmp_path / "only")


def test_fingerprints_tell_tokenizers_and_options_apart(
    tokenizer_pair: Pairs, tmp_path: Path
) -> None:
    ours, _ = tokenizer_pair("bert")
    again = load_tokenizer(tokenizer_directory(tmp_path, "bert"))
    every = [TextOptions(form, markup) for form in Normalization for markup in (False, True)]
    prints = [ours.text_fingerprint(options) for options in every]
    assert len(set(prints)) == len(every)
    assert [again.text_fingerprint(options) for options in every] == prints
    assert tokenizer_pair("roberta")[0].text_fingerprint(every[0]) not in prints


def test_checks_a_passage_that_comes_back(tokenizer_pair: Pairs) -> None:
    ours, _ = tokenizer_pair("bert")
    options = TextOptions()
    good = ours.tokenize("The tower.", options)
    ours.check_passage(good, options)
    with pytest.raises(FingerprintMismatchError):
        ours.check_passage(good, AS_SENT)

    def tokens(ids: list[int], starts: list[int], ends: list[int]) -> TokenizedText:
        one, two, three = (np.array(values, np.int32) for values in (ids, starts, ends))
        return TokenizedText(one, two, three, 10, good.fingerprint)

    for bad in (
        tokens([5, 6], [0], [1]),
        tokens([ours.vocab_size], [0], [1]),
        tokens([-1], [0], [1]),
        tokens([5], [0], [11]),
        tokens([5], [-1], [1]),
        tokens([5], [3], [2]),
    ):
        with pytest.raises(MalformedTokensError):
            ours.check_passage(bad, options)
    with pytest.raises(EmptyTextError):
        ours.check_passage(tokens([], [], []), options)


@families
@pytest.mark.parametrize("text", ["", " \n\t ", "\0\u200b\ufeff", "\u3000"])
def test_empty_texts(family: str, tokenizer_pair: Pairs, text: str) -> None:
    ours, _ = tokenizer_pair(family)
    with pytest.raises(EmptyTextError, match=r"^question: (is empty|holds nothing)"):
        ours.tokenize(text, field="question")


def test_limits(tmp_path: Path) -> None:
    directory = tokenizer_directory(tmp_path, "bert")
    ours = load_tokenizer(directory, limits=Limits(max_characters=100, max_window_tokens=300))
    with pytest.raises(TextTooLargeError, match="101 characters; at most 100"):
        ours.tokenize("x" * 101)
    question, passage = ours.tokenize("who?"), ours.tokenize("a " * 50)
    assert len(ours.windows(question, passage, max_length=32, stride=0)) == 2
    with pytest.raises(TextTooLargeError, match="windows of 32 tokens"):
        ours.windows(question, passage, max_length=32, stride=25)
    with pytest.raises(WindowError, match=r"^stride: .*room for"):
        ours.windows(question, passage, max_length=32, stride=40)
    with pytest.raises(WindowError, match=r"^max_length: 513"):
        ours.windows(question, passage, max_length=513)
    with pytest.raises(WindowError, match=r"^max_length: 0"):
        ours.windows(question, passage, max_length=0)


def test_a_long_question_halves_the_default_overlap(tokenizer_pair: Pairs) -> None:
    ours, _ = tokenizer_pair("bert")
    question, passage = ours.tokenize("a " * 300), ours.tokenize("b " * 400)
    first, second, *_ = ours.windows(question, passage)
    assert first.passage_tokens == 384 - 300 - 3
    assert second.passage_first == first.passage_tokens - first.passage_tokens // 2


def test_messages_hold_nothing_of_the_text(tokenizer_pair: Pairs) -> None:
    ours, _ = tokenizer_pair("bert")
    secret = "topsecret " * 400
    with pytest.raises(WindowError) as info:
        ours.windows(ours.tokenize(secret), ours.tokenize("x"))
    assert "secret" not in str(info.value)


@families
def test_a_million_characters(family: str, tokenizer_pair: Pairs) -> None:
    """One word, no spaces: what a tokenizer might be quadratic in."""
    ours, _ = tokenizer_pair(family)
    begin = time.process_time()
    for unit in ("x", "的"):
        assert len(ours.tokenize(unit * 200_000)) >= 1
    assert time.process_time() - begin < 10
