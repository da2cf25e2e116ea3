"""Texts that fit a JSON schema: which tokens may come next, by llguidance.

Whitespace is fixed (`{"a": 1, "b": [2]}`), so that a text ends where its value does and a model
cannot go on with blanks forever.
"""

from __future__ import annotations

import json
import logging
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import llguidance
import numpy as np
import torch

from miaotui.engine.decode.directory import configured

log = logging.getLogger(__name__)

_COMPILED = 64
_OPTIONS: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class SchemaError(ValueError):
    """A JSON schema cannot be followed; the message says why."""


def check_json_schema(schema: str) -> None:
    """Check that texts can be made to fit a schema. Needs no tokenizer.

    Raises:
        SchemaError: not JSON, not a schema, or it uses what cannot be enforced.
    """
    message = llguidance.LLMatcher.validate_grammar(_grammar(schema))
    if message:
        raise SchemaError(f"the JSON schema cannot be followed: {_brief(message)}")


class Matcher:
    """Follows one text through its grammar."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    def allowed(self) -> torch.Tensor:
        """Return which tokens may come next, bool [vocab_size]; stop tokens if it may end."""
        packed = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        bits = np.unpackbits(packed, count=self._vocab_size, bitorder="little")
        return torch.from_numpy(bits.view(np.bool_))

    def accept(self, token: int) -> None:
        """Take note of the next token."""
        self._matcher.consume_token(token)

    @property
    def complete(self) -> bool:
        """Whether nothing but a stop token may follow."""
        return self._matcher.is_stopped()

    @property
    def error(self) -> str:
        """Why the grammar cannot be followed any further; empty where it can."""
        return self._matcher.get_error()


class Grammars:
    """Compiles schemas for one model's tokens, and keeps the latest."""

    def __init__(self, directory: Path, vocab_size: int) -> None:
        """Take a model directory, whose tokenizer is loaded when it is first needed.

        Args:
            directory: holds tokenizer files.
            vocab_size: tokens that the model has logits for.
        """
        self._directory = directory
        self._vocab_size = vocab_size
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._compiled: OrderedDict[str, llguidance.LLMatcher] = OrderedDict()
        self.stop_ids = stop_token_ids(directory)

    def matcher(self, schema: str, written: Iterable[int] = ()) -> Matcher:
        """Return a matcher at the end of what was written so far.

        Raises:
            SchemaError: the schema cannot be followed, or what was written does not fit it.
        """
        compiled = self._compiled.get(schema)
        if compiled is None:
            compiled = llguidance.LLMatcher(self._load(), _grammar(schema), log_level=0)
            if compiled.is_error():
                message = _brief(compiled.get_error())
                raise SchemaError(f"the JSON schema cannot be followed: {message}")
            self._compiled[schema] = compiled
            if len(self._compiled) > _COMPILED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(schema)
        own = compiled.deep_copy()
        if not own.consume_tokens(list(written)):
            raise SchemaError(f"the text so far does not fit the JSON schema: {own.get_error()}")
        return Matcher(own, self._vocab_size)

    def _load(self) -> llguidance.LLTokenizer:
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            try:
                loaded = AutoTokenizer.from_pretrained(self._directory, local_files_only=True)
                backend = loaded.backend_tokenizer
                stops = list(self.stop_ids) or None
                self._tokenizer = llguidance.LLTokenizer(
                    backend.to_str(), n_vocab=self._vocab_size, eos_token=stops
                )
            except Exception as error:  # the libraries raise many kinds
                raise SchemaError(
                    f"{self._directory}: no tokenizer that JSON schemas can be followed with: "
                    f"{error}"
                ) from error
        return self._tokenizer


def stop_token_ids(directory: Path) -> tuple[int, ...]:
    """Return the ids that end a text, from `generation_config.json` or else `config.json`."""
    found = configured(directory, "eos_token_id")
    if found is None:
        return ()
    _, value = found
    return tuple(value) if isinstance(value, list) else (int(value),)


def _grammar(schema: str) -> str:
    try:
        parsed = json.loads(schema)
        if not isinstance(parsed, dict | bool):
            raise ValueError("it is neither an object nor a boolean")
        if isinstance(parsed, bool):
            parsed = {} if parsed else {"not": {}}
        return llguidance.LLMatcher.grammar_from_json_schema(parsed, overrides=_OPTIONS)
    except (ValueError, RecursionError) as error:
        raise SchemaError(f"not a JSON schema: {error}") from error


def _brief(message: str) -> str:
    return " ".join(message.split())[:300]
