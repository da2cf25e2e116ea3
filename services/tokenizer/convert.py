"""Between the tokenizer's messages and `miaotui.text`."""

from __future__ import annotations

import numpy as np

from miaotui.text.alignment import IntArray
from miaotui.text.cleaning import TextOptions
from miaotui.text.errors import MalformedTokensError, TextError
from miaotui.text.normalization import Normalization
from miaotui.text.tokens import TokenizedText
from miaotui.text.windows import Window
from miaotui.v1 import tokenizer_pb2 as pb

_NORMALIZATIONS = {
    pb.NORMALIZATION_UNSPECIFIED: Normalization.NFC,
    pb.NORMALIZATION_NONE: Normalization.NONE,
    pb.NORMALIZATION_NFC: Normalization.NFC,
    pb.NORMALIZATION_NFKC: Normalization.NFKC,
}


def options_from_proto(message: pb.TextOptions) -> TextOptions:
    """How to clean a text. Raises `TextError` for a normal form that does not exist."""
    normalization = _NORMALIZATIONS.get(message.normalization)
    if normalization is None:
        raise TextError(
            "options.normalization", f"{message.normalization} is none of the values defined"
        )
    return TextOptions(normalization, message.strip_markup)


def tokens_from_proto(message: pb.TokenizedText, field: str) -> TokenizedText:
    """Arrays are views of the message's bytes. Raises `MalformedTokensError`."""
    return TokenizedText(
        _ints(message.input_ids, f"{field}.input_ids"),
        _ints(message.starts, f"{field}.starts"),
        _ints(message.ends, f"{field}.ends"),
        message.characters,
        message.fingerprint,
    )


def tokens_to_proto(tokens: TokenizedText) -> pb.TokenizedText:
    """The tokens as sent."""
    return pb.TokenizedText(
        input_ids=_bytes(tokens.input_ids),
        starts=_bytes(tokens.starts),
        ends=_bytes(tokens.ends),
        characters=tokens.characters,
        fingerprint=tokens.fingerprint,
    )


def window_to_proto(window: Window) -> pb.Window:
    """The window as sent."""
    types = window.token_type_ids
    return pb.Window(
        input_ids=_bytes(window.input_ids),
        token_type_ids=b"" if types is None else types.tobytes(),
        passage_position=window.passage_position,
        passage_first=window.passage_first,
        passage_tokens=window.passage_tokens,
    )


def _ints(raw: bytes, field: str) -> IntArray:
    if len(raw) % 4:
        raise MalformedTokensError(field, f"{len(raw)} bytes; int32 values take 4 each")
    return np.frombuffer(raw, "<i4")


def _bytes(values: IntArray) -> bytes:
    return values.astype("<i4", copy=False).tobytes()
