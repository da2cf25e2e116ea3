"""Texts that are hard on offsets."""

from __future__ import annotations

import unicodedata

from hypothesis import strategies as st

FAMILY = "👨\u200d👩\u200d👧\u200d👦"
PIECES = [
    "The Eiffel Tower", "Paris", "a", "I", " ", "  ", "\n", "\t", ".", ",", "don't", "x" * 30,
    "北京", "是", "首都。", "㐀𠀀𰀀", "東京タワー", "ガ", "か\u3099", "カ\uff9e", "ﾊﾟ",
    "한국어", unicodedata.normalize("NFD", "한국어"), "\u1100", "\u1161", "\u11a8", "각\u11a8",
    "مرحبا بالعالم", "می\u200cخواهم", "שָׁלוֹם", "\u202bעברית\u202c", "\u200f", "ﷺ",
    "हिन्दी", "क्\u200dष", "தமிழ்", "ก็", "กำ", "ಕೊ", unicodedata.normalize("NFD", "ಕೊ"),
    "Việt Nam", unicodedata.normalize("NFD", "Việt Nam"), "e\u0301", "\u0301", "q\u0323\u0307",
    "q\u0307\u0323", "\u0344", "a\u0315\u0300\u05ae\u0300b", "İ", "ẞ", "ﬁ", "①", "½", "Ω", "Å",
    FAMILY, "👩🏽\u200d🚀", "❤\ufe0f\u200d🔥", "🇫🇷🇩🇪🇯🇵", "🇫", "😀", "1\ufe0f\u20e3", "\u200d",
    "🏴\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f", "\U000e0067", "\u200b",
    "\0", "\x07", "\x0b", "\x1c", "\x85", "\x9f", "\x7f", "\ufeff", "\u00ad", "\u2060", "\ufffd",
    "\ufffe", "\ufdd0", "\U0001ffff", "\ud800", "\udc00", "\ud83d\ude00", "\udfff\ud800", "\r\n",
    "\u2028", "\u00a0", "\u3000", "\ue000",
]  # fmt: skip
MARKUP = [
    "<p>", "</p>", "<br/>", "<b>", "</b>", "<i class='x'>", '<a href="a>b">', "</a>", "<td>",
    "<!-- c -->", "<!--", "-->", "<script>if (a<b) x()</script>", "<style>p{}</style>", "<", ">",
    "&amp;", "&lt;", "&gt;", "&nbsp;", "&eacute;", "&#x301;", "&#769;", "&#0;", "&copy", "&",
    "&nosuch;", "&#1114112;", "<!DOCTYPE html>", "<?xml version='1.0'?>", "<x", "\"", "'", "=",
    "&fjlig;", "&#55357;", "</script>", "<script>",
]  # fmt: skip

# Any code point that is assigned, surrogates too; and the pieces above, which random draws
# would seldom join.
anything = st.text(st.characters(exclude_categories=["Cn"]), max_size=30)
hard_texts = st.lists(
    st.one_of(st.sampled_from(PIECES), st.text(st.sampled_from("".join(PIECES)), max_size=3)),
    max_size=25,
).map("".join)
texts = st.one_of(hard_texts, anything)
markup_texts = st.lists(st.sampled_from(PIECES + MARKUP * 2), max_size=25).map("".join)
