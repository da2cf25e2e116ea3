"""Cutting: every character of words is in a passage, and offsets are those of the text."""

from __future__ import annotations

import re
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from miaotui.retrieval.passages import PassageBounds, count_units, split_passages
from miaotui.retrieval.reading import Extracted, Heading

_BITS = st.sampled_from(
    [
        *("The ", "river ", "ran. ", "Dr. ", "A", "…", "x" * 50, "\n", "\n\n", "  ", "\u3000"),
        *(
            "长江",
            "是中国的河。",
            "为什么？",
            "“引用。”",
            "1949",
            "😀",
            "e\u0301",
            "，",
            "\r\n",
            "\t",
        ),
    ]
)
TEXTS = st.lists(_BITS, max_size=120).map("".join)
BOUNDS = st.builds(
    PassageBounds,
    longest=st.integers(5, 40),
    overlap=st.integers(0, 20),
    section=st.integers(0, 20),
    paragraph=st.integers(1, 40),
)


@given(TEXTS, BOUNDS)
@settings(max_examples=300, deadline=None)
def test_nothing_is_lost_and_nothing_is_too_long(text: str, bounds: PassageBounds) -> None:
    passages = split_passages(Extracted(text), bounds)
    covered = bytearray(len(text))
    for passage in passages:
        part = text[passage.start : passage.end]
        assert part
        assert part == part.strip()
        assert count_units(part) <= bounds.longest
        covered[passage.start : passage.end] = b"\1" * len(part)
    assert all(covered[i] or character.isspace() for i, character in enumerate(text))
    starts = [passage.start for passage in passages]
    assert starts == sorted(set(starts))
    ends = [passage.end for passage in passages]
    assert ends == sorted(set(ends))


def test_sentences_stay_whole_and_overlap_inside_of_a_paragraph() -> None:
    sentences = [f"Sentence number {i} says one more thing." for i in range(40)]
    text = " ".join(sentences)
    passages = split_passages(Extracted(text), PassageBounds(longest=60, overlap=20))
    parts = [text[p.start : p.end] for p in passages]
    for part in parts:
        assert part.startswith("Sentence")
        assert part.endswith("thing.")
    for before, after in pairwise(parts):
        assert before.split(". ")[-1].rstrip(".") in after


def test_chinese_is_cut_at_its_full_stops() -> None:
    text = "长江是中国最长的河流。" * 60
    passages = split_passages(Extracted(text))
    assert len(passages) > 2
    assert all(text[p.start : p.end].endswith("。") for p in passages)
    assert all(text[p.start : p.end].startswith("长江") for p in passages)


def test_passages_begin_at_headings_and_pages() -> None:
    section = "word " * 100
    text = f"One\n\n{section}\n\nTwo\n\n{section}\n\n{section}"
    second = text.index("Two")
    third = text.rindex("word " * 100)
    headings = (Heading(0, 1, "One"), Heading(second, 1, "Two"))
    passages = split_passages(Extracted(text, "", headings, (0, third)))
    assert [p.start for p in passages] == [0, second, third]


def test_short_sections_share_a_passage() -> None:
    text = "\n\n".join(f"Head {i}\n\nA short line." for i in range(4))
    headings = tuple(Heading(m.start(), 1, m.group()) for m in re.finditer(r"Head \d", text))
    assert len(split_passages(Extracted(text, "", headings))) == 1


def test_a_megabyte_without_any_break_takes_no_ages() -> None:
    passages = split_passages(Extracted("字" * 300_000))
    assert {p.end - p.start for p in passages[:-1]} == {256}
