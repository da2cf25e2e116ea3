"""Tokens back to text while they come: whole characters only, many sequences at once."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from miaotui.text.alignment import IntArray
from miaotui.text.errors import MalformedTokensError
from miaotui.text.tokenizer import LONG_TEXT

REPLACEMENT = "\ufffd"
# A character has at most four bytes: of what waits, three tokens may begin one (and one that
# has no text may lie among them).
_OPEN_TOKENS = 4
_LONGEST_WAIT = 8
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True)
class Growth:
    """A sequence with new tokens: `ids` int32 [tokens], of which the first `read_offset` are
    read and serve as context; `flush`: none follow."""

    ids: IntArray
    read_offset: int
    flush: bool = False


@dataclass(frozen=True, slots=True)
class Gained:
    """The text that a sequence has gained, and where the next growth begins.

    Its `ids` are this one's from `prefix_offset` on, followed by new ones; of this one's,
    those before `read_offset` are read.
    """

    text: str
    prefix_offset: int
    read_offset: int


class Detokenizer:
    """Incremental decoding with a few tokens of context, by the scheme that Hugging Face's
    text-generation-inference and vLLM use: the text of context and new tokens, less the text
    of the context. It is held back while it ends within a character. Stateless, thread-safe.
    """

    def __init__(self, backend: Any) -> None:
        """`backend`: a `tokenizers.Tokenizer`."""
        self._backend = backend
        self._added = {
            token: entry.content for token, entry in backend.get_added_tokens_decoder().items()
        }
        kinds = set(_decoder_kinds(backend.decoder))
        self._byte_level = "ByteLevel" in kinds
        self._spaces = bool(kinds & {"Metaspace", "Replace"})

    def read(self, growths: Sequence[Growth], *, keep_special_tokens: bool = False) -> list[Gained]:
        """What each sequence has gained. Raises `MalformedTokensError`."""
        runs: list[list[int]] = []
        for index, growth in enumerate(growths):
            if growth.read_offset > len(growth.ids):
                raise MalformedTokensError(
                    f"items[{index}].read_offset",
                    f"{growth.read_offset}, but there are {len(growth.ids)} tokens",
                )
            # Ids are int32 on the wire; a negative one is none, like one beyond the vocabulary.
            ids = (growth.ids & 0x7FFFFFFF).tolist()
            runs += (ids[: growth.read_offset], ids)
        skip = not keep_special_tokens
        texts = self._decoded(runs, skip)
        gained = []
        for index, growth in enumerate(growths):
            before, text = texts[2 * index], texts[2 * index + 1]
            whole = len(text) > len(before) and not text.endswith(REPLACEMENT)
            end = len(growth.ids)
            if not whole:
                ids = runs[2 * index + 1]
                cut, head = self._cut(growth, ids, before, text, skip)
                if not growth.flush:
                    end, text = cut, head
                elif growth.read_offset < cut < end:
                    # Decoders of byte tokens make U+FFFD of a whole run of them where one
                    # character in it is cut short.
                    text = head + self._backend.decode(ids[cut:], skip_special_tokens=skip)
            if end == growth.read_offset:
                gained.append(Gained("", 0, end))
            else:
                gained.append(Gained(text[len(before) :], growth.read_offset, end))
        return gained

    def _decoded(self, runs: Sequence[list[int]], skip: bool) -> list[str]:
        if sum(map(len, runs)) < LONG_TEXT:
            # A batch goes to threads, which costs more than a few tokens do (16 µs against 1 µs
            # for one run of 5, a third more for 64 runs of 12).
            return [self._backend.decode(run, skip_special_tokens=skip) for run in runs]
        # This binding releases the GIL.
        texts: list[str] = self._backend.decode_batch(runs, skip_special_tokens=skip)
        return texts

    def _cut(
        self, growth: Growth, ids: list[int], before: str, text: str, skip: bool
    ) -> tuple[int, str]:
        """Where to cut tokens whose text is not whole, and the text up to there.

        Several tokens that came at once may hold whole characters before the open one. After
        a longer wait, what is open is garbage, but for the last tokens, which may be the
        beginning of a character: exactly if they alone make up the last U+FFFD.
        """
        waiting = len(ids) - growth.read_offset
        best = (growth.read_offset, before)
        for count in range(1, min(waiting, _OPEN_TOKENS + 1)):
            head = self._backend.decode(ids[:-count], skip_special_tokens=skip)
            if len(head) > len(before) and not head.endswith(REPLACEMENT):
                return len(ids) - count, head
            if waiting > _LONGEST_WAIT and text == head + REPLACEMENT:
                best = (len(ids) - count, head)
        if waiting > _LONGEST_WAIT and best[0] == growth.read_offset:
            return len(ids), text
        return best

    def piece(self, token: int) -> bytes:
        """The bytes that a token stands for, which may be a part of a character's."""
        if token in self._added:
            return str(self._added[token]).encode()
        text: str | None = self._backend.id_to_token(token)
        if text is None:
            return b""
        if self._byte_level:
            # A character outside of the alphabet belongs to no byte-level vocabulary.
            return b"".join(
                bytes((_BYTES[char],)) if char in _BYTES else char.encode() for char in text
            )
        if (byte := _BYTE_TOKEN.fullmatch(text)) is not None:
            return bytes((int(byte[1], 16),))
        return (text.replace("▁", " ") if self._spaces else text).encode()


def _decoder_kinds(decoder: Any) -> Iterator[str]:
    if decoder is None:
        return
    description = json.loads(decoder.__getstate__())
    yield description["type"]
    for part in description.get("decoders", ()):
        yield part["type"]


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable characters for the 256 bytes (Radford et al., 2019, its encoder.py)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + number): byte for number, byte in enumerate(others)}


_BYTES = _byte_alphabet()
