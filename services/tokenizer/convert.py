"""Between the tokenizer's messages and `miaotui.text`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from miaotui.text.alignment import IntArray
from miaotui.text.cleaning import TextOptions
from miaotui.text.detokenize import Growth
from miaotui.text.errors import MalformedTokensError, TextError
from miaotui.text.normalization import Normalization
from miaotui.text.prompts import Chat
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


def prompt_options_from_proto(message: pb.TextOptions) -> TextOptions | None:
    """How to clean a prompt; None: not at all. Raises `TextError`."""
    if message.normalization == pb.NORMALIZATION_UNSPECIFIED:
        if not message.strip_markup:
            return None
        return TextOptions(Normalization.NONE, True)
    return options_from_proto(message)


def chat_from_proto(message: pb.ChatPrompt) -> Chat:
    """The chat. Raises `TextError` where what should be JSON is not."""
    messages: list[dict[str, Any]] = []
    for index, part in enumerate(message.messages):
        entry: dict[str, Any] = {"role": part.role, "content": part.content}
        if part.more_json:
            entry |= _json(part.more_json, dict, f"chat.messages[{index}].more_json")
        messages.append(entry)
    tools: list[Any] = []
    if message.tools_json:
        tools = _json(message.tools_json, list, "chat.tools_json")
    variables: dict[str, Any] = {}
    if message.variables_json:
        variables = _json(message.variables_json, dict, "chat.variables_json")
        if taken := _RESERVED & set(variables):
            raise TextError("chat.variables_json", f"must not set {', '.join(sorted(taken))}")
    return Chat(messages, tools, variables, message.continue_last)


# The arguments of apply_chat_template itself.
_RESERVED = frozenset(
    (
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "documents",
        "messages",
        "max_length",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    )
)


def _json(text: str, kind: type[Any], field: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, kind):
        raise TextError(field, f"must be a JSON {'object' if kind is dict else 'list'}")
    return value


def sampling_to_proto(sampling: Mapping[str, float]) -> pb.SamplingDefaults:
    """What the makers of a model advise, as sent."""
    message = pb.SamplingDefaults()
    for name, value in sampling.items():
        whole = name == "top_k"
        setattr(message, name, max(0, int(value)) if whole else float(value))
    return message


def growth_from_proto(message: pb.DecodeItem, index: int) -> Growth:
    """The sequence; its ids are a view of the message's bytes. Raises `MalformedTokensError`."""
    ids = _ints(message.token_ids, f"items[{index}].token_ids")
    return Growth(ids, message.read_offset, message.flush)


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
        input_ids=ids_to_bytes(tokens.input_ids),
        starts=ids_to_bytes(tokens.starts),
        ends=ids_to_bytes(tokens.ends),
        characters=tokens.characters,
        fingerprint=tokens.fingerprint,
    )


def window_to_proto(window: Window) -> pb.Window:
    """The window as sent."""
    types = window.token_type_ids
    return pb.Window(
        input_ids=ids_to_bytes(window.input_ids),
        token_type_ids=b"" if types is None else types.tobytes(),
        passage_position=window.passage_position,
        passage_first=window.passage_first,
        passage_tokens=window.passage_tokens,
    )


def _ints(raw: bytes, field: str) -> IntArray:
    if len(raw) % 4:
        raise MalformedTokensError(field, f"{len(raw)} bytes; int32 values take 4 each")
    return np.frombuffer(raw, "<i4")


def ids_to_bytes(values: IntArray) -> bytes:
    """Token ids as sent."""
    return values.astype("<i4", copy=False).tobytes()
