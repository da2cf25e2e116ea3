"""Ways to disturb a question or a passage without changing what the answer is to a person.

The kinds are those of the literature: keyboard and swap noise (Belinkov and Bisk 2018), sentences
that distract (Jia and Liang 2017), and invisible characters, homoglyphs and reorderings
(Boucher et al. 2022); for Chinese, characters of like shape or sound, full-width forms, and the
other script.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from miaotui.robustness.lookalikes import FULL_WIDTH, HOMOGLYPHS, NEIGHBOURS, SHAPES, SOUNDS

Language = Literal["en", "zh"]


@dataclass(frozen=True, slots=True)
class Item:
    """A question over a passage, and what may be answered; `answers` may be empty."""

    question: str
    context: str
    answers: tuple[str, ...] = ()

    @property
    def language(self) -> Language:
        """Chinese where the question holds ideographs."""
        return "zh" if any("\u3400" <= char <= "\u9fff" for char in self.question) else "en"


Disturb = Callable[[Item, random.Random], Item | None]


@dataclass(frozen=True, slots=True)
class Perturbation:
    """A way to disturb an item; `disturb` returns None where there is nothing to disturb."""

    name: str
    does: str
    disturb: Disturb


def _question(change: Callable[[str, random.Random], str]) -> Disturb:
    """Changes the question only: the answer's own words stay as they are."""

    def disturb(item: Item, chance: random.Random) -> Item | None:
        changed = change(item.question, chance)
        if changed == item.question:
            return None
        return Item(changed, item.context, item.answers)

    return disturb


def _both(change: Callable[[str, random.Random], str]) -> Disturb:
    def disturb(item: Item, chance: random.Random) -> Item | None:
        question, context = change(item.question, chance), change(item.context, chance)
        if (question, context) == (item.question, item.context):
            return None
        return Item(question, context, item.answers)

    return disturb


def _typos(text: str, chance: random.Random) -> str:
    """One slip of a finger in about every third word: neighbour, swap, drop or double."""
    words = text.split(" ")
    places = [i for i, word in enumerate(words) if len(word) > 3 and word.isascii()]
    for place in chance.sample(places, min(len(places), max(1, len(places) // 3))):
        word = words[place]
        at = chance.randrange(1, len(word) - 1)
        kind = chance.randrange(4)
        if kind == 0 and word[at].lower() in NEIGHBOURS:
            word = word[:at] + chance.choice(NEIGHBOURS[word[at].lower()]) + word[at + 1 :]
        elif kind == 1:
            word = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
        elif kind == 2:
            word = word[:at] + word[at + 1 :]
        else:
            word = word[:at] + word[at] + word[at:]
        words[place] = word
    return " ".join(words)


def _swapped_words(text: str, chance: random.Random) -> str:
    """Two neighbouring words change places; in Chinese, two characters."""
    units, glue = (text.split(" "), " ") if " " in text.strip() else (list(text), "")
    last = len(units) - 2
    if last < 1:
        return text
    at = chance.randrange(last)
    units[at], units[at + 1] = units[at + 1], units[at]
    return glue.join(units)


def _replaced(text: str, chance: random.Random, others: Mapping[str, str], share: float) -> str:
    places = [i for i, char in enumerate(text) if char in others]
    chars = list(text)
    for place in chance.sample(places, min(len(places), max(1, round(share * len(places))))):
        chars[place] = chance.choice(others[chars[place]])
    return "".join(chars)


def _invisible(text: str, chance: random.Random) -> str:
    """A zero-width character within about every fourth word or ideograph."""
    places = [i for i in range(1, len(text)) if not text[i - 1 : i + 1].isspace()]
    chars = list(text)
    for place in sorted(chance.sample(places, len(places) // 8 + bool(places)), reverse=True):
        chars.insert(place, chance.choice("\u200b\u2060\ufeff\u00ad"))
    return "".join(chars)


def _homoglyphs(text: str, chance: random.Random) -> str:
    """About a tenth of the Latin letters."""
    places = [i for i, char in enumerate(text) if ord(char) in HOMOGLYPHS]
    chars = list(text)
    for place in chance.sample(places, len(places) // 10 + bool(places)):
        chars[place] = chars[place].translate(HOMOGLYPHS)
    return "".join(chars)


def _full_width(text: str, _: random.Random) -> str:
    return text.translate(FULL_WIDTH)


@cache
def _converter(way: str) -> Any:
    from opencc import OpenCC

    return OpenCC(way)


def _other_script(text: str, _: random.Random) -> str:
    """Simplified to traditional; what stays as it is, is taken to be traditional."""
    changed: str = _converter("s2t").convert(text)
    if changed == text:
        changed = _converter("t2s").convert(text)
    return changed


_DISTRACTORS: Mapping[Language, tuple[str, ...]] = {
    "en": (
        "In an unrelated matter, the harbour of Larnswick was widened in 1807.",
        "The gardener Edwin Thorpe, by contrast, kept some 240 kinds of roses in Velden.",
        "Nobody knows how many letters the clerk Maria Oduya wrote that winter.",
        "A map from 1623 shows a mill, two bridges and the town of Brackenfeld.",
    ),
    "zh": (
        "与此无关的是，青石渡的码头在1807年被加宽。",
        "而园丁陆文舟在柳河镇种了二百四十种月季。",
        "没有人知道文书沈一鸣那年冬天写了多少封信。",
        "1623年的一张地图上画着一座磨坊、两座桥和白杨镇。",
    ),
}


def _distracted(item: Item, chance: random.Random) -> Item:
    """Two sentences that have nothing to do with it, one before and one after."""
    before, after = chance.sample(_DISTRACTORS[item.language], 2)
    glue = " " if item.language == "en" else ""
    return Item(item.question, f"{before}{glue}{item.context}{glue}{after}", item.answers)


def _only(language: Language, disturb: Disturb) -> Disturb:
    return lambda item, chance: disturb(item, chance) if item.language == language else None


PERTURBATIONS: tuple[Perturbation, ...] = (
    Perturbation("typos", "slips of the finger in the question", _question(_typos)),
    Perturbation("swapped words", "two neighbours in the question", _question(_swapped_words)),
    Perturbation("distracting sentences", "one before and one after the passage", _distracted),
    Perturbation("invisible characters", "in question and passage", _both(_invisible)),
    Perturbation("homoglyphs", "Cyrillic letters in the question", _question(_homoglyphs)),
    Perturbation(
        "full-width forms", "letters, digits, marks of the question", _question(_full_width)
    ),
    Perturbation(
        "similar characters",
        "Chinese characters of like shape, in the question",
        _only("zh", _question(lambda text, chance: _replaced(text, chance, SHAPES, 0.5))),
    ),
    Perturbation(
        "like-sounding characters",
        "as input methods confuse them, in the question",
        _only("zh", _question(lambda text, chance: _replaced(text, chance, SOUNDS, 0.3))),
    ),
    Perturbation(
        "other script",
        "simplified for traditional or the reverse, in the question",
        _only("zh", _question(_other_script)),
    ),
)
