"""Model inputs: special tokens, the question, and as much of the passage as fits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miaotui.text.alignment import IntArray
from miaotui.text.errors import ModelDirectoryError, TextTooLargeError, WindowError

ByteArray = NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """One model input.

    `input_ids` is int32 `[tokens]`; `token_type_ids` uint8 `[tokens]`, None where the model
    has no token types. The passage's tokens `passage_first` and following stand at
    `passage_position` and following, `passage_tokens` of them.
    """

    input_ids: IntArray
    token_type_ids: ByteArray | None
    passage_position: int
    passage_first: int
    passage_tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class Template:
    """What a model wants around a question and a passage.

    `before`, `between` and `after` are int32 ids of special tokens; `*_types` their token
    types, uint8.
    """

    before: IntArray
    between: IntArray
    after: IntArray
    before_types: ByteArray
    between_types: ByteArray
    after_types: ByteArray
    question_type: int
    passage_type: int

    @property
    def special_tokens(self) -> int:
        """How many special tokens a window holds."""
        return len(self.before) + len(self.between) + len(self.after)

    @classmethod
    def of(cls, backend: Any, where: object) -> Template:
        """Reads the template off a pair that the tokenizer's own post-processor has built.

        Raises `ModelDirectoryError`; `where` is named in it.
        """
        for probe in ("a", "的", ".", "the"):
            pair = backend.encode(probe, probe, add_special_tokens=True)
            sides = pair.sequence_ids
            if 0 in sides and 1 in sides:
                break
        else:
            raise ModelDirectoryError(f"{where}: its tokenizer makes no tokens of plain text")
        question = [index for index, side in enumerate(sides) if side == 0]
        passage = [index for index, side in enumerate(sides) if side == 1]
        if passage[0] < question[-1] or question[0] == 0:
            raise ModelDirectoryError(
                f"{where}: its tokenizer does not put a classification token first and the "
                "question before the passage; extractive models need both"
            )
        ids = np.array(pair.ids, np.int32)
        types = np.array(pair.type_ids, np.uint8)
        before, after = slice(0, question[0]), slice(passage[-1] + 1, None)
        between = slice(question[-1] + 1, passage[0])
        return cls(
            ids[before],
            ids[between],
            ids[after],
            types[before],
            types[between],
            types[after],
            int(types[question[0]]),
            int(types[passage[0]]),
        )


def make_windows(
    template: Template,
    question: IntArray,
    passage: IntArray,
    *,
    max_length: int,
    stride: int | None,
    default_stride: int,
    token_types: bool,
    max_tokens: int,
) -> list[Window]:
    """Windows over a passage, in its order; each overlaps the one before by `stride` tokens.

    The same windows as transformers makes with `truncation="only_second"` and
    `return_overflowing_tokens`. With `stride` None, `default_stride` is cut down to half of
    the room that the question leaves. `question` and `passage` are int32 ids.

    Raises:
        WindowError: the question leaves no room, or the stride is as long as the room.
        TextTooLargeError: the windows would hold more than `max_tokens` tokens.
    """
    room = max_length - len(question) - template.special_tokens
    if room < 1:
        raise WindowError(
            "question",
            f"{len(question)} tokens, and {template.special_tokens} special ones, leave no room "
            f"for the passage in a window of {max_length}; shorten it or raise max_length",
        )
    if len(passage) <= room:
        bounds = [(0, len(passage))]
    else:
        overlap = min(default_stride, room // 2) if stride is None else stride
        step = room - overlap
        if step < 1:
            raise WindowError(
                "stride",
                f"{overlap} tokens, but a window has room for {room} of the passage; "
                "use a smaller stride, or raise max_length",
            )
        count = 1 + -(-(len(passage) - room) // step)
        if count * max_length > max_tokens:
            raise TextTooLargeError(
                "text",
                f"needs {count} windows of {max_length} tokens, more than {max_tokens} tokens in "
                "all; send a shorter text, or use a smaller stride or a greater max_length",
            )
        bounds = [
            (first, min(first + room, len(passage))) for first in range(0, count * step, step)
        ]
    head = np.concatenate((template.before, question, template.between))
    windows: list[Window] = []
    types: ByteArray | None = None
    for first, past in bounds:
        size = past - first
        ids = np.concatenate((head, passage[first:past], template.after))
        if token_types and (types is None or len(types) != len(ids)):
            types = _types(template, len(question), size)
        windows.append(Window(ids, types, len(head), first, size))
    return windows


def _types(template: Template, question: int, passage: int) -> ByteArray:
    return np.concatenate(
        (
            template.before_types,
            np.full(question, template.question_type, np.uint8),
            template.between_types,
            np.full(passage, template.passage_type, np.uint8),
            template.after_types,
        )
    )
