"""Text to search terms, for English, Chinese and whatever else has words.

Words are folded (compatibility forms, case, accents) and reduced to their stem (Porter2).
Chinese has no spaces: its runs become overlapping pairs of characters and the characters
themselves, with traditional characters folded to simplified ones. Pairs need no dictionary
and retrieve about as well as segmented words (Nie et al., "On the use of words and n-grams
for Chinese information retrieval", IRAL 2000).
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from zlib import crc32

import numpy as np
import numpy.typing as npt
import snowballstemmer

from miaotui.retrieval.chinese import simplified

# Part of what a store keeps: raise it whenever equal text may give other terms.
TERMS_VERSION = 1

HashArray = npt.NDArray[np.uint32]
CountArray = npt.NDArray[np.uint8]

_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
_KANA = "\u3040-\u30ff"
_RUNS = re.compile(f"[{_HAN}{_KANA}]+|[^\\W_{_HAN}{_KANA}]+")
_CJK = re.compile(f"[{_HAN}{_KANA}]")
_LONGEST_WORD = 40

_stemmer = snowballstemmer.stemmer("english")


def _words(listed: str) -> frozenset[str]:
    return frozenset(listed.split())


# Words that say how something is asked and not what about.
_STOP_WORDS = _words(
    "a about after all also am an and any are as at be been before being between both but by can "
    "could did do does doing during each for from had has have having he her here hers him his "
    "how i if in into is it its just me more most my no nor not of on one or other our out over "
    "own s same she should so some such t than that the their them then there these they this "
    "those through to too under until up very was we were what when where which while who whom "
    "whose why will with would you your"
)
# The same in Chinese: pairs and single characters of questions and particles.
_STOP_PAIRS = _words(
    "什么 哪些 哪个 哪里 哪一 哪年 哪位 哪种 哪儿 多少 怎么 怎样 为何 如何 是谁 是什 的是 是哪 "
    "有什 有哪 有多 了什 么时 何时 请问 谁是 是否 是多"
)
_STOP_CHARACTERS = frozenset("的了是在和与及或之于被把从这那其为以而何哪谁么吗呢吧什都也就还")


@dataclass(frozen=True, slots=True)
class Terms:
    """A text's distinct terms: `hashes` ascending, `counts` their numbers (at most 255)."""

    hashes: HashArray
    counts: CountArray

    @property
    def total(self) -> int:
        """Terms in the text, with repetitions: its length for BM25."""
        return int(self.counts.sum(dtype=np.int64))


def split_terms(text: str) -> Iterator[str]:
    """The text's terms in their order, without stop words."""
    folded = unicodedata.normalize("NFKD", text).casefold()
    if not folded.isascii():
        # Accents go; composing again puts together what is one letter (kana, hangul).
        bare = "".join(c for c in folded if unicodedata.category(c) != "Mn" or c in "\u3099\u309a")
        folded = unicodedata.normalize("NFC", bare)
        if _CJK.search(folded):
            folded = simplified(folded)
    for match in _RUNS.finditer(folded):
        run = match.group()
        if _CJK.match(run):
            yield from _characters(run)
        elif run not in _STOP_WORDS:
            yield _stem(run[:_LONGEST_WORD])


def _characters(run: str) -> Iterator[str]:
    for first, second in pairwise(run):
        pair = first + second
        if pair not in _STOP_PAIRS:
            yield pair
    for character in run:
        if character not in _STOP_CHARACTERS:
            yield character


@lru_cache(maxsize=65536)
def _stem(word: str) -> str:
    return str(_stemmer.stemWord(word)) if word.isascii() else word


def hash_term(term: str) -> int:
    """The term's name in stores and indexes: equal for equal terms, on every machine.

    Of a million different terms about a hundred share their 32 bits with another one, which
    blurs their ranking a little and loses nothing.
    """
    return crc32(term.encode())


def count_terms(text: str) -> Terms:
    """The text's distinct terms and their numbers."""
    counted = Counter(map(hash_term, split_terms(text)))
    hashes = np.fromiter(counted.keys(), np.uint32, len(counted))
    counts = np.fromiter((min(n, 255) for n in counted.values()), np.uint8, len(counted))
    order = np.argsort(hashes)
    return Terms(hashes[order], counts[order])


def chinese_share(text: str) -> float:
    """Share of Chinese (and Japanese) characters among the letters and digits, 0 to 1."""
    chinese = len(_CJK.findall(text))
    if not chinese:
        return 0.0
    return chinese / max(1, sum(map(str.isalnum, text)))
