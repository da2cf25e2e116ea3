"""Cleaning and normalisation: what comes out, and where it came from."""

from __future__ import annotations

import sys
import time
import unicodedata
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miaotui.text.alignment import AlignedText
from miaotui.text.cleaning import TextOptions, clean
from miaotui.text.graphemes import widen
from miaotui.text.normalization import Normalization, normalize
from tests.text.strategies import FAMILY, anything, hard_texts, markup_texts, texts

options = st.builds(TextOptions, st.sampled_from(Normalization), st.booleans())
FORMS: list[tuple[Normalization, Literal["NFC", "NFKC"]]] = [
    (Normalization.NFC, "NFC"),
    (Normalization.NFKC, "NFKC"),
]


def sources(aligned: AlignedText, source: str) -> list[str]:
    """What each character of a cleaned text stands for."""
    if aligned.starts is None or aligned.ends is None:
        assert len(aligned.text) == len(source)
        return list(source)
    return [source[a:b] for a, b in zip(aligned.starts, aligned.ends, strict=True)]


def check_alignment(aligned: AlignedText, source: str) -> None:
    assert aligned.source_length == len(source)
    if aligned.starts is None or aligned.ends is None:
        assert len(aligned.text) == len(source)
        return
    assert aligned.starts.dtype == aligned.ends.dtype == np.int32
    assert len(aligned.starts) == len(aligned.ends) == len(aligned.text)
    assert (aligned.starts < aligned.ends).all()
    assert (aligned.starts >= 0).all()
    assert (aligned.ends <= len(source)).all()
    assert (np.diff(aligned.starts) >= 0).all()
    assert (np.diff(aligned.ends) >= 0).all()


@given(st.one_of(texts, markup_texts), options)
def test_alignment_is_sound(source: str, options: TextOptions) -> None:
    aligned = clean(source, options)
    check_alignment(aligned, source)
    aligned.text.encode()  # no surrogate is left


@given(texts, st.sampled_from(Normalization), st.data())
def test_a_cut_of_the_source_cleans_to_the_cut_of_the_clean_text(
    source: str, form: Normalization, data: st.DataObject
) -> None:
    check_cut(source, TextOptions(form), data)


@given(markup_texts, st.sampled_from(Normalization), st.data())
@settings(max_examples=300)
def test_the_same_with_markup(source: str, form: Normalization, data: st.DataObject) -> None:
    check_cut(source, TextOptions(form, strip_markup=True), data)


def check_cut(source: str, options: TextOptions, data: st.DataObject) -> None:
    aligned = clean(source, options)
    if not aligned.text:
        return
    first = data.draw(st.integers(0, len(aligned.text) - 1), "first")
    last = data.draw(st.integers(first, len(aligned.text) - 1), "last")
    # As tokens are: whole clusters, so that no flag or family is taken apart …
    firsts, pasts = np.array([first], np.int32), np.array([last + 1], np.int32)
    firsts, pasts = widen(aligned.text, firsts, pasts)
    first, past = int(firsts[0]), int(pasts[0])
    begin, end = aligned.source_span(first, past)
    if aligned.starts is not None and aligned.ends is not None:
        # … and whole source ranges: of characters that share one, all.
        first = int(np.searchsorted(aligned.starts, begin))
        past = int(np.searchsorted(aligned.ends, end, side="right"))
    # At the edges, a joiner's meaning depends on the neighbour that is cut off, and so does
    # whether a tag parts two words; tokens do not begin or end in white space.
    edges = "\u200c\u200d" + "".join(c for c in aligned.text if c.isspace())
    cut = clean(source[begin:end], options).text.strip(edges)
    assert cut == aligned.text[first:past].strip(edges)


@given(texts, st.sampled_from(Normalization))
def test_cleaning_twice_changes_nothing(source: str, form: Normalization) -> None:
    once = clean(source, TextOptions(form)).text
    again = clean(once, TextOptions(form))
    assert again.text == once
    assert again.starts is None  # and costs no alignment


@given(st.one_of(hard_texts, anything), st.sampled_from(FORMS))
def test_normalisation_equals_the_standard_librarys(
    source: str, form: tuple[Normalization, Literal["NFC", "NFKC"]]
) -> None:
    aligned = normalize(AlignedText.of(source), form[0])
    assert aligned.text == unicodedata.normalize(form[1], source)
    check_alignment(aligned, source)


@pytest.mark.parametrize(("form", "name"), FORMS)
def test_normalisation_of_every_character_among_neighbours(
    form: Normalization, name: Literal["NFC", "NFKC"]
) -> None:
    """Each code point after a base, and before marks of several classes and Hangul vowels."""
    # But for what is unassigned or one of many alike: ideographs, Hangul syllables.
    same = [*range(0x3400, 0x9FFF), *range(0xAC20, 0xD7A0), *range(0x17000, 0x18D00)]
    same += [*range(0x20000, 0x2F800), *range(0x30000, sys.maxunicode + 1)]
    assigned = sorted(set(range(0x30000)) - set(same))
    characters = [chr(code) for code in assigned if unicodedata.category(chr(code))[0] != "C"]
    for context in ("a{}\u0301", "\u1100{}\u11a8", "\u0323{}\u0307", "\u0915{}\u093c"):
        source = " ".join(map(context.format, characters))
        assert normalize(AlignedText.of(source), form).text == unicodedata.normalize(name, source)


def test_normalised_characters_keep_their_places() -> None:
    source = "e\u0301a ﬁ \u1112\u1161\u11abb"
    aligned = clean(source, TextOptions(Normalization.NFKC))
    assert aligned.text == "éa fi 한b"
    assert sources(aligned, source) == [
        "e\u0301", "a", " ", "ﬁ", "ﬁ", " ", "\u1112\u1161\u11ab", "b"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("nul\0l", "null"),
        ("bell\x07, del\x7f, c1\x9f", "bell, del, c1"),
        ("a\x0bb\x0cc\x85d\x1ce", "a b c d e"),
        ("tab\tline\r\n", "tab\tline\r\n"),
        ("\ufeffbom", "bom"),
        ("zero\u200bwidth soft\u00adhyphen word\u2060joiner", "zerowidth softhyphen wordjoiner"),
        ("\u202babc\u202c \u2066x\u2069 \u200ey\u200f", "abc x y"),
        ("caf\ufffd\ufffe\U0010ffff\ufdd0", "caf"),
        ("lone \ud83d surrogate", "lone  surrogate"),
        ("pair \ud83d\ude00", "pair 😀"),
        (FAMILY + " 👩🏽\u200d🚀", FAMILY + " 👩🏽\u200d🚀"),
        ("no\u200dword 👨\u200d", "noword 👨"),
        ("👨\u200d\u200e👩", "👨\u200d👩"),
        ("می\u200cخواهم", "می\u200cخواهم"),
        ("می\u200c", "می"),
        ("क्\u200dष", "क्\u200dष"),
        (
            "🏴\U000e0067\U000e0062\U000e0065\U000e007f!",
            "🏴\U000e0067\U000e0062\U000e0065\U000e007f!",
        ),
        ("hidden\U000e0068\U000e0069", "hidden"),
    ],
)
def test_characters(source: str, expected: str) -> None:
    assert clean(source, TextOptions()).text == expected


@pytest.mark.parametrize("source", ["plain text\n", "北京是中国的首都。", "Việt", FAMILY])
def test_clean_text_is_passed_through(source: str) -> None:
    aligned = clean(source, TextOptions())
    assert aligned.text is source
    assert aligned.starts is None


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("<p>One</p><p>two</p>", "One two"),
        ("<b>H</b>ello<br/>world", "Hello world"),
        ("a <!-- no --> b", "a  b"),
        ("x<script type='a'>var a = '<p>';</script>y<STYLE>p{}</STYLE >z", "x y z"),
        ("&lt;b&gt; &amp; &eacute;&#233;&#xE9; &fjlig;", "<b> & ééé fj"),
        ("&copy 2020, ?a=1&copy=2", "© 2020, ?a=1&copy=2"),
        ('<a title="x > y" href=z>link</a>', "link"),
        ("<!DOCTYPE html><?xml version='1.0'?>text", "text"),
        ("<![CDATA[a < b &amp; <i>c</i>]]>", "a < b &amp; <i>c</i>"),
        # Malformed markup loses no text.
        ("1 < 2 and 3 > 2", "1 < 2 and 3 > 2"),
        ("a <b unclosed", "a <b unclosed"),
        ("<!-- unclosed", "<!-- unclosed"),
        ("<script>unclosed", "unclosed"),
        ("<p class=it's>text</p>", "text"),
        ("AT&T &nosuch; &#; &#xZ;", "AT&T &nosuch; &#; &#xZ;"),
        ("<3 </> <>", "<3 </> <>"),
    ],
)
def test_markup(source: str, expected: str) -> None:
    assert clean(source, TextOptions(strip_markup=True)).text == expected
    assert clean(source, TextOptions()).text == source


def test_what_replaces_markup_stands_for_it() -> None:
    source = "<p>Caf&eacute;</p><p>x"
    aligned = clean(source, TextOptions(strip_markup=True))
    assert sources(aligned, source) == ["C", "a", "f", "&eacute;", "</p>", "x"]


@pytest.mark.parametrize(
    "unit",
    ["<a ", "<!--", "<script>", '<a "', "<a '\"<a \"' ", "<a x=\"<a y='", "&", "<", '<a b="" ',
     "<![CDATA[", "<p>", "</", "<?", "<!D ", "\u200d", "\0a", "e\u0301", "\u0301", "\ud800"],
)  # fmt: skip
def test_no_input_is_slow(unit: str) -> None:
    """Linear time: 200,000 characters take well under the minutes that quadratic ones would."""
    source = (unit * 200_000)[:200_000] + ">"
    begin = time.process_time()
    clean(source, TextOptions(Normalization.NFKC, strip_markup=True))
    assert time.process_time() - begin < 5
