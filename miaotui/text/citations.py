"""Which parts of a passage a written answer rests on, as ranges of its characters."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeAlias

Range: TypeAlias = tuple[int, int]

MAX_PASSAGES = 200

# The end of a sentence: full stops of Chinese, and those of others before white space; with
# closing quotes and brackets. A line's end ends a sentence, too.
_END = re.compile("(?:[。！？；…]+[”’」』）〉》】\"']*)|(?:[.!?]+[\"'”’)\\]]*(?=\\s))|(?:\\n+)")
# What ends in a full stop and ends no sentence.
_ABBREVIATION = re.compile(
    r"(?:\b(?:[A-Za-z]|Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|etc|e\.g|i\.e|cf|ca|approx|No|Fig|Vol"
    r"|Inc|Ltd|Co|Corp|Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec)|\b(?:[A-Za-z]\.)+[A-Za-z])$"
)
_MARKS = re.compile(r"\s*[\[［【]\s*(\d{1,4}(?:\s*[,，、;；]\s*\d{1,4})*)\s*[\]］】]")
_WORD = re.compile(r"[^\W_]")
_CJK = re.compile("[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]")

# A common run of characters is a citation from so many on: letters say less than Han characters.
_LEAST_LETTERS = 14
_LEAST_CJK = 5


def split_passages(text: str, most: int = MAX_PASSAGES) -> list[Range]:
    """The sentences of a text, without surrounding white space; neighbours are joined where
    there are more than `most`."""
    ranges: list[Range] = []
    begin = 0
    for end in _END.finditer(text):
        if end[0].startswith(".") and _ABBREVIATION.search(
            text[max(0, end.start() - 12) : end.start()]
        ):
            continue
        _add(ranges, text, begin, end.end())
        begin = end.end()
    _add(ranges, text, begin, len(text))
    if len(ranges) > most:
        size = -(-len(ranges) // most)
        groups = [ranges[at : at + size] for at in range(0, len(ranges), size)]
        ranges = [(group[0][0], group[-1][1]) for group in groups]
    return ranges


def _add(ranges: list[Range], text: str, begin: int, end: int) -> None:
    while begin < end and text[begin].isspace():
        begin += 1
    while end > begin and text[end - 1].isspace():
        end -= 1
    if _WORD.search(text, begin, end):
        ranges.append((begin, end))
    elif ranges and begin < end:
        # A rest without words, such as a closing bracket, belongs to what stands before it.
        ranges[-1] = (ranges[-1][0], end)


def read_marks(answer: str, passages: int) -> tuple[str, list[int]]:
    """The answer without its marks ("[2]", "【1、3】"), and the passages they name, from 0."""
    named: dict[int, None] = {}
    for mark in _MARKS.finditer(answer):
        for number in re.findall(r"\d+", mark[1]):
            if 1 <= int(number) <= passages:
                named[int(number) - 1] = None
    return _MARKS.sub("", answer).strip(), list(named)


def common_runs(answer: str, context: str, preferred: Sequence[Range] = ()) -> list[Range]:
    """Where the context holds the answer's own words: the longest common runs of characters.

    Of several places, one within `preferred` is taken, else the first. Runs are cut to whole
    words. By matching statistics: for each place in the answer the longest run from there that
    the context holds, whose end never moves back.
    """
    found: list[Range] = []
    end = 0
    for begin in range(len(answer)):
        end = max(end, begin)
        before = end
        while end < len(answer) and answer[begin : end + 1] in context:
            end += 1
        if begin and end == before:
            continue  # within the run before it
        words = _whole_words(answer, begin, end)
        if words is not None:
            found.append(_place(answer[words[0] : words[1]], context, preferred))
    return found


def _whole_words(text: str, begin: int, end: int) -> Range | None:
    """The run without parts of words and without what is no word at its ends; None: too short."""
    if 0 < begin < end and _joined(text[begin - 1], text[begin]):
        while begin < end and _joined(text[begin - 1], text[begin]):
            begin += 1
    while begin < end < len(text) and _joined(text[end - 1], text[end]):
        end -= 1
    while begin < end and not _WORD.match(text[begin]):
        begin += 1
    while end > begin and not _WORD.match(text[end - 1]):
        end -= 1
    run = text[begin:end]
    cjk = len(_CJK.findall(run))
    weight = cjk / _LEAST_CJK + (len(run) - cjk) / _LEAST_LETTERS
    return (begin, end) if weight >= 1 else None


def _joined(left: str, right: str) -> bool:
    """Whether a word goes on from one character to the next."""
    return bool(
        _WORD.match(left) and _WORD.match(right) and not _CJK.match(left) and not _CJK.match(right)
    )


def _place(run: str, context: str, preferred: Sequence[Range]) -> Range:
    for begin, end in preferred:
        at = context.find(run, begin, end)
        if at >= 0:
            return at, at + len(run)
    at = context.find(run)
    return at, at + len(run)


def cite(answer: str, context: str, passages: Sequence[Range]) -> tuple[str, list[Range]]:
    """The answer without marks, and what it rests on, in the context's order.

    That is each passage that a mark names, and each longer run of the passage's own words
    outside of those.
    """
    plain, named = read_marks(answer, len(passages))
    marked = [passages[index] for index in named]
    ranges = list(marked)
    for begin, end in common_runs(plain, context, marked):
        if not any(first <= begin and end <= last for first, last in marked):
            ranges.append((begin, end))
    merged: list[Range] = []
    for begin, end in sorted(ranges):
        if merged and begin < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return plain, merged
