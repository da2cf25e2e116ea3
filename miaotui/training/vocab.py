"""Extending the base's WordPiece vocabulary with Chinese characters.

The tokenizer already splits Chinese text into single characters, but knows few of them. New
characters take the ``[unusedN]`` places first and then follow the vocabulary's end.

While training, characters that differ by script only (traditional, simplified) share one row of
the embedding; the export copies it to each. ``Vocabulary.rows`` is that map.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from miaotui.training.glosses import Entry, is_han, simplifications

_STOP = frozenset(
    ["-", ",", ";", ".", "'", "s", "a", "an", "and", "be", "in", "of", "on", "or", "the", "to"]
)


@dataclass
class Vocabulary:
    """A tokenizer with its characters' shared rows.

    tokenizer: without padding and truncation.
    tokens: the new characters in the order of ``row`` numbers' first use.
    base_size: how many rows the base embedding has; new rows are numbered from there.
    rows: int64 [vocabulary], the training row of each token id.
    row_chars: one list per new row: the characters that share it.
    """

    tokenizer: Tokenizer
    base_size: int
    rows: Tensor
    row_chars: list[list[str]]

    @property
    def size(self) -> int:
        """How many token ids there are."""
        return int(self.rows.numel())


def choose_characters(
    texts: Iterable[str], entries: list[Entry], known: set[str], limit: int
) -> list[list[str]]:
    """Groups of characters that get a common row, at most ``limit`` characters in all.

    Groups go by how often any of their forms occurs in ``texts``; a form enters if the texts or at
    least three dictionary words use it. What is left of the limit goes to the dictionary's most
    used characters. Signs other than ideographs enter if the tokenizer does not know them and the
    texts use them 20 times.
    """
    seen: Counter[str] = Counter()
    for text in texts:
        seen.update(text)
    in_words: Counter[str] = Counter()
    for entry in entries:
        in_words.update(set(entry.simplified) | set(entry.traditional))
    simple = simplifications(entries)
    groups: dict[str, list[str]] = {}
    for char in sorted(set(seen) | set(in_words)):
        if is_han(char) and (seen[char] or in_words[char] >= 3):
            groups.setdefault(simple.get(char, char), []).append(char)
    signs = [
        [char]
        for char, count in sorted(seen.items())
        if count >= 20
        and not is_han(char)
        and not char.isspace()
        and ord(char) > 0x2000
        and char not in known
    ]

    def weight(group: list[str]) -> tuple[int, int, str]:
        return (-sum(seen[c] for c in group), -sum(in_words[c] for c in group), group[0])

    chosen = signs
    left = limit - len(signs)
    for group in sorted(groups.values(), key=weight):
        part = sorted(group, key=lambda c: (-seen[c], -in_words[c], c))[:left]
        if not part:
            break
        chosen.append(part)
        left -= len(part)
    return chosen


def extend(tokenizer_file: Path, groups: list[list[str]]) -> Vocabulary:
    """The base tokenizer with every character of ``groups`` in its vocabulary."""
    state = json.loads(tokenizer_file.read_text(encoding="utf-8"))
    state["padding"] = state["truncation"] = None
    vocab: dict[str, int] = state["model"]["vocab"]
    base_size = len(vocab)
    unused = sorted((i, t) for t, i in vocab.items() if re.fullmatch(r"\[unused\d+\]", t))
    rows = list(range(base_size))
    free = iter(unused)
    for row, group in enumerate(groups):
        for char in group:
            if char not in vocab:
                place = next(free, None)
                if place is None:
                    vocab[char] = len(rows)
                    rows.append(0)
                else:
                    del vocab[place[1]]
                    vocab[char] = place[0]
            rows[vocab[char]] = base_size + row
    state["model"]["vocab"] = dict(sorted(vocab.items(), key=lambda item: item[1]))
    tokenizer = Tokenizer.from_str(json.dumps(state))
    return Vocabulary(tokenizer, base_size, torch.tensor(rows), groups)


def initial_rows(
    vocabulary: Vocabulary, entries: list[Entry], base_rows: Tensor, base_tokenizer: Tokenizer
) -> Tensor:
    """Rows for the new characters, float32 [groups, hidden], from their English glosses.

    A character's row is the mean of its gloss's rows and, at a smaller weight, of the glosses of
    the words it is part of, brought to the mean length of the base rows. Signs start as the row of
    their compatibility form where that is known, characters without any gloss at random.
    """
    glosses = gloss_vectors(entries, base_rows, base_tokenizer)
    index = {c: row for row, group in enumerate(vocabulary.row_chars) for c in group}
    total = torch.zeros(len(vocabulary.row_chars), base_rows.shape[1])
    for entry, vector in zip(entries, glosses, strict=True):
        if vector is None:
            continue
        size = len(entry.simplified)
        weight = 1.0 if size == 1 else 0.15 / size**2
        for new, old in zip(entry.simplified, entry.traditional, strict=False):
            row = index.get(new, index.get(old))
            if row is not None:
                total[row] += weight * vector
    generator = torch.Generator().manual_seed(0)
    center = base_rows[1000:].mean(dim=0)
    length = (base_rows[1000:] - center).norm(dim=1).mean()
    noise = torch.randn(total.shape, generator=generator)
    lengths = total.norm(dim=1, keepdim=True)
    total = torch.where(
        lengths > 0, total / lengths.clamp_min(1e-6), noise / noise.norm(dim=1)[:, None]
    )
    total = center + length * torch.nn.functional.normalize(
        total + 0.3 * noise / noise.norm(dim=1, keepdim=True), dim=1
    )
    first: Tensor = total
    for char, row in index.items():
        plain = base_tokenizer.token_to_id(unicodedata.normalize("NFKC", char))
        if plain is not None and not is_han(char):
            first[row] = base_rows[plain]
    return first


def gloss_vectors(
    entries: list[Entry], base_rows: Tensor, tokenizer: Tokenizer
) -> list[Tensor | None]:
    """For each entry the mean centred row of its senses' words, or None without a sense."""
    center = base_rows[1000:].mean(dim=0)
    stop = {tokenizer.token_to_id(word) for word in _STOP}
    encoded = tokenizer.encode_batch(
        [" ".join(e.senses[:2]) for e in entries], add_special_tokens=False
    )
    vectors: list[Tensor | None] = []
    for item in encoded:
        ids = [i for i in item.ids if i not in stop][:8] or item.ids[:8]
        vectors.append(base_rows[ids].mean(dim=0) - center if ids else None)
    return vectors


def save_vocabulary(vocabulary: Vocabulary, folder: Path) -> None:
    """Write ``tokenizer.json`` and ``rows.json`` (what the shared rows are)."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary.tokenizer.save(str(folder / "tokenizer.json"))
    rows: Mapping[str, object] = {
        "base_size": vocabulary.base_size,
        "rows": vocabulary.rows.tolist(),
        "row_chars": vocabulary.row_chars,
    }
    (folder / "rows.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")


def load_vocabulary(folder: Path) -> Vocabulary:
    """What ``save_vocabulary`` wrote. Raises FileNotFoundError if it did not."""
    rows = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
    return Vocabulary(
        Tokenizer.from_file(str(folder / "tokenizer.json")),
        rows["base_size"],
        torch.tensor(rows["rows"]),
        rows["row_chars"],
    )
