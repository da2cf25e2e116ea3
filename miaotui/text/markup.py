"""Takes HTML/XML markup out of a text and keeps the alignment.

A scanner of its own rather than `html.parser`: that reports lines and columns instead of
offsets, and drops text after malformed markup. What does not parse as markup here is text.
"""

from __future__ import annotations

import html
import re
from html.entities import html5

from miaotui.text.alignment import AlignedText, Edit

# Tags that may stand within a word; any other tag separates words.
_INLINE = frozenset(
    (
        "a",
        "abbr",
        "acronym",
        "b",
        "bdi",
        "bdo",
        "big",
        "cite",
        "code",
        "data",
        "del",
        "dfn",
        "em",
        "font",
        "i",
        "ins",
        "kbd",
        "mark",
        "nobr",
        "q",
        "s",
        "samp",
        "small",
        "span",
        "strike",
        "strong",
        "sub",
        "sup",
        "time",
        "tt",
        "u",
        "var",
        "wbr",
    )
)
_HIDDEN = frozenset(("script", "style"))

_SPECIAL = re.compile(r"[<&]")
# Possessive throughout: a failed match costs no backtracking. A "<" outside of quotes ends
# the attempt, which keeps the scan linear in practice; so does the bound on the pieces.
_TAG = re.compile(r"<(/?)([A-Za-z][^\s<>/\"']*+)((?:[^<>\"']++|\"[^\"]*+\"|'[^']*+'){0,256}+)>")
_CARELESS_TAG = re.compile(r"<(/?)([A-Za-z][^\s<>/\"']*+)[^<>]*+>")  # unbalanced quotes
_DECLARATION = re.compile(r"<(?:![A-Za-z]|\?)[^<>]*+>")  # <!DOCTYPE …>, <?xml …?>
_ENTITY = re.compile(r"&(?:#[0-9]{1,8}+;?|#[xX][0-9a-fA-F]{1,8}+;?|[A-Za-z][A-Za-z0-9]{1,31}+;?)")
_CLOSING = {name: re.compile(rf"</{name}(?=[\s/>])[^>]*+>", re.IGNORECASE) for name in _HIDDEN}


def strip_markup(aligned: AlignedText) -> AlignedText:
    """The text without tags, comments, declarations, scripts and styles, entities resolved.

    Where a tag other than an inline one stood between two words, a space separates them,
    aligned to that tag. Contents of CDATA sections are taken literally. Unclosed tags and
    comments, stray "<" and "&" stay as they are.
    """
    text = aligned.text
    if "<" not in text and "&" not in text:
        return aligned
    return aligned.edit(_Scanner(text).scan())


class _Scanner:
    def __init__(self, text: str) -> None:
        self.text = text
        self.edits: list[Edit] = []
        self.last_close = text.rfind(">")  # no tag can begin after it
        self.missing: set[str] = set()  # closing marks that do not occur any more
        self.separator: int | None = None  # index in `edits` of a tag that parts words
        self.kept_to = 0  # end of the markup last removed

    def scan(self) -> list[Edit]:
        text, position = self.text, 0
        while (found := _SPECIAL.search(text, position)) is not None:
            start = found.start()
            end = self._entity(start) if text[start] == "&" else self._markup(start)
            position = start + 1 if end is None else end
        self._keep(len(text), "")
        return self.edits

    def _keep(self, start: int, ahead: str) -> None:
        """Takes note that the text up to `start`, and then `ahead`, stays."""
        kept = self.text[self.kept_to : self.kept_to + 1] if start > self.kept_to else ahead
        if kept and self.separator is not None:
            begin, end, _ = self.edits[self.separator]
            before = self._last_kept(self.separator)
            if before and not before.isspace() and not kept.isspace():
                self.edits[self.separator] = (begin, end, " ")
            self.separator = None

    def _last_kept(self, index: int) -> str:
        """The character that stays before edit `index`, or nothing."""
        while index >= 0:
            begin = self.edits[index][0]
            past = self.edits[index - 1][1] if index else 0
            if begin > past:
                return self.text[begin - 1]
            index -= 1
            if index >= 0 and self.edits[index][2]:
                return self.edits[index][2][-1]
        return ""

    def _remove(self, start: int, end: int, *, parts: bool) -> int:
        self._keep(start, "")
        if parts and self.separator is None:
            self.separator = len(self.edits)
        self.edits.append((start, end, ""))
        self.kept_to = end
        return end

    def _entity(self, start: int) -> int | None:
        match = _ENTITY.match(self.text, start)
        if match is None:
            return None
        entity, end = match.group(), match.end()
        if entity[1] == "#":
            character = html.unescape(entity)
        else:
            character = html5.get(entity[1:], "")
            # "&copy=1" in an address is no ©: without ";" only before a delimiter.
            if not entity.endswith(";") and self.text[end : end + 1] == "=":
                character = ""
            if not character:
                return None
        self._keep(start, character[:1])
        self.edits.append((start, end, character))
        self.kept_to = end
        return end

    def _markup(self, start: int) -> int | None:
        text = self.text
        if start > self.last_close:
            return None
        if text.startswith("<!--", start):
            end = self._find("-->", start + 4)
            return None if end is None else self._remove(start, end, parts=False)
        if text.startswith("<![CDATA[", start):
            end = self._find("]]>", start + 9)
            if end is None:
                return None
            self._remove(start, start + 9, parts=False)
            return self._remove(end - 3, end, parts=False)
        declaration = _DECLARATION.match(text, start)
        if declaration is not None:
            return self._remove(start, declaration.end(), parts=True)
        tag = _TAG.match(text, start) or _CARELESS_TAG.match(text, start)
        if tag is None:
            return None
        name, end = tag.group(2).lower(), tag.end()
        if name in _HIDDEN and not tag.group(1) and name not in self.missing:
            closing = _CLOSING[name].search(text, end)
            if closing is None:
                self.missing.add(name)
            else:
                end = closing.end()
        return self._remove(start, end, parts=name not in _INLINE)

    def _find(self, mark: str, start: int) -> int | None:
        """One past the next `mark`. Remembers a miss: text full of openings stays linear."""
        if mark in self.missing:
            return None
        found = self.text.find(mark, start)
        if found < 0:
            self.missing.add(mark)
            return None
        return found + len(mark)
