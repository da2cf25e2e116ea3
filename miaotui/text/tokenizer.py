"""A model directory's tokenizer: text to tokens and windows, and tokens back to text."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from miaotui.robustness.scripts import count_pieces
from miaotui.text.alignment import IntArray
from miaotui.text.characters import table
from miaotui.text.cleaning import CLEANING_VERSION, TextOptions, clean
from miaotui.text.directory import load_fast_tokenizer, read_model_config
from miaotui.text.errors import (
    EmptyTextError,
    FingerprintMismatchError,
    ModelDirectoryError,
    TextTooLargeError,
    TokenRangeError,
    WindowError,
)
from miaotui.text.tokens import TokenizedText, token_ranges
from miaotui.text.windows import Template, Window, make_windows

DEFAULT_MAX_LENGTH = 384
DEFAULT_STRIDE = 128

# Model types whose position table begins after the padding token's position.
_PADDED_POSITIONS = frozenset(("camembert", "roberta", "xlm-roberta", "xlm-roberta-xl"))
# Defaults of transformers' configurations; other types have no token types, or but one.
_TYPE_VOCAB_SIZES = {"bert": 2, "electra": 2}
# From here on the binding that releases the GIL is used, so that a thread pool helps.
LONG_TEXT = 2048


@dataclass(frozen=True, slots=True)
class Limits:
    """What one call may cost.

    `max_characters`: longest text, in code points; `max_window_tokens`: most tokens in all
    windows of a call together.
    """

    max_characters: int = 1_000_000
    max_window_tokens: int = 8_000_000


class TextTokenizer:
    """Cleans, tokenises, and cuts passages into windows for one model. Thread-safe."""

    def __init__(
        self,
        model_dir: Path,
        backend: Any,
        config: dict[str, Any],
        fingerprint: str,
        *,
        token_types: bool,
        special_ids: Sequence[int],
        unknown_id: int | None,
        limits: Limits,
    ) -> None:
        """See `load_tokenizer`; `backend` is a `tokenizers.Tokenizer`, which this one owns."""
        backend.no_truncation()
        backend.no_padding()
        self.template = Template.of(backend, model_dir)
        # A passage that spells "[SEP]" must not end up as the separator itself.
        backend.encode_special_tokens = True
        self._backend = self.backend = backend
        self.model_dir = model_dir
        self.fingerprint = fingerprint
        self.limits = limits
        self.token_types = token_types
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self.longest, self.max_length, self.stride = _lengths(config, model_dir)
        self.no_answer_thresholds = _no_answer_thresholds(config)
        # Unigram vocabularies hold special tokens as pieces, which the switch above misses.
        self._unknown_id = -1 if unknown_id is None else unknown_id
        self._forged = np.zeros(self.vocab_size, np.bool_)
        if unknown_id is not None:
            self._forged[list(special_ids)] = True
            self._forged[unknown_id] = False
        self._fingerprints: dict[TextOptions, str] = {}
        table()  # so that no request waits for it

    @property
    def special_tokens(self) -> dict[int, str]:
        """The names of the special tokens that windows hold, by id."""
        template = self.template
        ids = np.concatenate((template.before, template.between, template.after))
        return {int(token): str(self._backend.id_to_token(int(token))) for token in ids}

    def unknown_share(self, *texts: TokenizedText) -> float:
        """The share of the texts' tokens that the vocabulary lacks, 0 to 1."""
        if self._unknown_id < 0:
            return 0.0
        unknown = sum(int(np.count_nonzero(t.input_ids == self._unknown_id)) for t in texts)
        return unknown / max(1, sum(map(len, texts)))

    def script_pieces(self) -> dict[str, int]:
        """By script, pieces of the vocabulary that hold letters of it."""
        pieces = self._backend.get_vocab(with_added_tokens=False)
        if type(self._backend.decoder).__name__ == "ByteLevel":
            return count_pieces(self._backend.decode_batch([[token] for token in pieces.values()]))
        return count_pieces(list(pieces))

    def text_fingerprint(self, options: TextOptions) -> str:
        """Names this tokenizer and `options`: equal ones turn equal texts into equal tokens."""
        known = self._fingerprints.get(options)
        if known is None:
            parts = [
                self.fingerprint,
                options.normalization.value,
                options.strip_markup,
                CLEANING_VERSION,
                unicodedata.unidata_version,
            ]
            known = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
            self._fingerprints[options] = known
        return known

    def tokenize(
        self, text: str, options: TextOptions | None = None, *, field: str = "text"
    ) -> TokenizedText:
        """The text's tokens, with offsets in the text as given.

        Raises `TextTooLargeError` and `EmptyTextError`, which name `field`.
        """
        options = options or TextOptions()
        if len(text) > self.limits.max_characters:
            raise TextTooLargeError(
                field,
                f"{len(text)} characters; at most {self.limits.max_characters} are taken, "
                "split it or raise the service's max_characters",
            )
        aligned = clean(text, options)
        if not aligned.text:
            raise EmptyTextError(field, _empty(text))
        if len(aligned.text) < LONG_TEXT:
            encoding = self._backend.encode(aligned.text, add_special_tokens=False)
        else:
            encoding = self._backend.encode_batch([aligned.text], add_special_tokens=False)[0]
        ids = np.array(encoding.ids, np.int32)
        forged = self._forged[ids]
        if forged.any():
            ids[forged] = self._unknown_id
        flat = np.fromiter(chain.from_iterable(encoding.offsets), np.int32, 2 * len(ids))
        starts, ends = token_ranges(aligned, flat[::2], flat[1::2])
        if not (ends > starts).any():
            raise EmptyTextError(field, _empty(text))
        return TokenizedText(ids, starts, ends, len(text), self.text_fingerprint(options))

    def windows(
        self,
        question: TokenizedText,
        passage: TokenizedText,
        *,
        max_length: int | None = None,
        stride: int | None = None,
    ) -> list[Window]:
        """The model's inputs, at least one; `max_length` and `stride` in tokens.

        Raises `WindowError` and `TextTooLargeError`.
        """
        length = self.max_length if max_length is None else max_length
        if not 1 <= length <= self.longest:
            raise WindowError(
                "max_length", f"{length} tokens; this model takes from 1 to {self.longest}"
            )
        return make_windows(
            self.template,
            question.input_ids,
            passage.input_ids,
            max_length=length,
            stride=stride,
            default_stride=self.stride,
            token_types=self.token_types,
            max_tokens=self.limits.max_window_tokens,
        )

    def check_passage(
        self, passage: TokenizedText, options: TextOptions, *, field: str = "tokenized"
    ) -> None:
        """Refuses tokens that `tokenize` would not have made with these options.

        Raises `FingerprintMismatchError`, `MalformedTokensError` and `EmptyTextError`.
        """
        if passage.fingerprint != self.text_fingerprint(options):
            raise FingerprintMismatchError(
                field,
                "made by another tokenizer or with other options; send the passage as text",
            )
        passage.check(field, self.vocab_size)
        if len(passage) == 0:
            raise EmptyTextError(field, "no tokens; send a passage that holds text")

    def decode(self, ids: Sequence[int] | IntArray, *, skip_special_tokens: bool = False) -> str:
        """Text of the ids. Raises `TokenRangeError` for an id outside of the vocabulary."""
        values = [int(value) for value in ids]
        for index, value in enumerate(values):
            if not 0 <= value < self.vocab_size:
                raise TokenRangeError(
                    f"ids[{index}]", f"{value}; the vocabulary has ids 0 to {self.vocab_size - 1}"
                )
        text: str = self._backend.decode(values, skip_special_tokens=skip_special_tokens)
        return text


def load_tokenizer(model_dir: Path, *, limits: Limits | None = None) -> TextTokenizer:
    """The fast tokenizer of a Hugging Face model directory, as `AutoTokenizer` loads it.

    Reads `config.json` for the longest window, and `max_length` and `stride` under its key
    "miaotui" where training has left them. Never goes to the network and never runs code
    that a checkpoint brings along. Raises `ModelDirectoryError`.
    """
    config = read_model_config(model_dir)
    tokenizer, fingerprint = load_fast_tokenizer(model_dir)
    types = config.get("type_vocab_size", _TYPE_VOCAB_SIZES.get(config.get("model_type", ""), 1))
    token_types = "token_type_ids" in tokenizer.model_input_names and types > 1
    return TextTokenizer(
        model_dir,
        tokenizer.backend_tokenizer,
        config,
        fingerprint,
        token_types=token_types,
        special_ids=tokenizer.all_special_ids,
        unknown_id=tokenizer.unk_token_id,
        limits=limits or Limits(),
    )


def _lengths(config: dict[str, Any], where: Path) -> tuple[int, int, int]:
    """(longest window, default window, default stride), all in tokens."""
    positions = config.get("max_position_embeddings", 512)
    if config.get("model_type") in _PADDED_POSITIONS:
        pad = config.get("pad_token_id")
        positions -= (1 if pad is None else pad) + 1
    longest = int(positions)
    own = config.get("miaotui") or {}
    max_length = own.get("max_length", min(DEFAULT_MAX_LENGTH, longest))
    _check_length("max_length", max_length, 1, longest, where)
    stride = own.get("stride", min(DEFAULT_STRIDE, max_length - 1))
    _check_length("stride", stride, 0, max_length - 1, where)
    return longest, max_length, stride


def _no_answer_thresholds(config: dict[str, Any]) -> dict[str, float]:
    """By language, most that "no answer" may be above the best span, as training has left it."""
    own = config.get("miaotui") or {}
    return {
        str(language): float(fitted["threshold"])
        for language, fitted in (own.get("no_answer_by_language") or {}).items()
    }


def _check_length(name: str, value: object, least: int, most: int, where: Path) -> None:
    if not isinstance(value, int) or not least <= value <= most:
        raise ModelDirectoryError(
            f"{where}: config.json has miaotui.{name} {value!r}; "
            f"it must be a whole number from {least} to {most}"
        )


def _empty(text: str) -> str:
    if not text:
        return "is empty"
    return "holds nothing but white space, control characters or markup"
