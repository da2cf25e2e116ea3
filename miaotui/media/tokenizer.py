"""The tokenizer of a model whose encoder hears or sees: what its decoder begins with."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from miaotui.media.errors import MediaError
from miaotui.media.features import FeatureExtractor, MediaLimits, load_extractor, modality_of
from miaotui.media.languages import Language, known_languages
from miaotui.text.alignment import IntArray
from miaotui.text.directory import (
    context_length,
    load_fast_tokenizer,
    read_generation_config,
    read_model_config,
    stop_ids,
)
from miaotui.text.errors import ModelDirectoryError

# As many as `generate` of transformers writes where a captioner's makers say nothing.
_CAPTION_TOKENS = 20
# OpenAI's multilingual vocabularies have so many entries at least.
_MULTILINGUAL_TOKENS = 51_865
_TIMESTAMP = re.compile(r"<\|\d+\.\d\d\|>")


@dataclass(frozen=True, slots=True)
class _SpeechTokens:
    start: int
    transcribe: int | None
    translate: int | None
    no_timestamps: int | None
    previous: int | None


class MediaTokenizer:
    """Makes features of files and beginnings for the decoder. Thread-safe."""

    def __init__(
        self,
        model_dir: Path,
        tokenizer: Any,
        config: Mapping[str, Any],
        generation: Mapping[str, Any],
        fingerprint: str,
        extractor: FeatureExtractor,
    ) -> None:
        """See `load_media_tokenizer`; `tokenizer` is a fast one of transformers'."""
        decoder = config.get("decoder") or config
        self.model_dir = model_dir
        self.fingerprint = fingerprint
        self.extractor = extractor
        self.backend: Any = tokenizer.backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()
        # What a caller sends must not end up as a special token.
        self.backend.encode_special_tokens = True
        vocabulary: dict[str, int] = self.backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self.context_length = context_length(decoder, model_dir)
        self.stop_token_ids = stop_ids(tokenizer, {**decoder, **config}, generation)
        self.languages: tuple[Language, ...] = ()
        """Empty: the model knows one only, or is shown pictures."""
        self._speech: _SpeechTokens | None = None
        self._start = _first(
            generation.get("decoder_start_token_id"),
            config.get("decoder_start_token_id"),
            decoder.get("bos_token_id"),
        )
        if self._start is None:
            raise ModelDirectoryError(
                f"{model_dir}: neither config.json nor generation_config.json says which token "
                "the decoder begins with (decoder_start_token_id)"
            )
        advised = _first(generation.get("max_new_tokens"), generation.get("max_length"))
        if extractor.modality == "audio":
            self._speech = _speech_tokens(vocabulary, self._start)
            if _is_multilingual(generation, vocabulary):
                self.languages = known_languages(vocabulary, generation)
            # As special ones they have no text.
            self.backend.add_special_tokens([name for name in vocabulary if _TIMESTAMP.match(name)])
        elif advised is None:
            advised = _first(config.get("max_length")) or _CAPTION_TOKENS
        self.advised_tokens = min(advised or self.context_length, self.context_length)
        """Most tokens of a text that the makers advise."""

    def begin(
        self,
        *,
        language: str = "",
        translate: bool = False,
        previous: str = "",
        detect: bool = False,
    ) -> IntArray:
        """What the decoder begins with: int32 [tokens].

        Of speech: `language` is a code; `translate`: into English; `previous`: a text that
        stands before, of which the end is kept; `detect`: only that after which the model names
        the language. Raises `MediaError`.
        """
        speech = self._speech
        assert self._start is not None, "the constructor has it"
        if speech is None:
            if language or translate or previous or detect:
                raise MediaError("media", "this model is shown pictures: it takes no language")
            return np.array([self._start], np.int32)
        ids = [] if detect else self._before(speech, previous)
        ids.append(speech.start)
        if detect:
            if not self.languages:
                raise MediaError("media.detect", "this model knows one language only")
        elif self.languages:
            ids.append(self._language(language))
            task = speech.translate if translate else speech.transcribe
            ids += [task] if task is not None else []
        elif translate or language not in ("", "en"):
            raise MediaError("media.language", "this model knows English only")
        if not detect and speech.no_timestamps is not None:
            ids.append(speech.no_timestamps)
        return np.array(ids, np.int32)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Text of the ids; those outside of the vocabulary have none."""
        text: str = self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def _before(self, speech: _SpeechTokens, previous: str) -> list[int]:
        if not previous.strip():
            return []
        if speech.previous is None:
            raise MediaError("media.previous", "this model takes no text that stands before")
        ids = self.backend.encode(" " + previous.strip(), add_special_tokens=False).ids
        return [speech.previous, *ids[-(self.context_length // 2 - 1) :]]

    def _language(self, code: str) -> int:
        for language in self.languages:
            if language.code == code:
                return language.token
        what = "is none that this model knows" if code else "is missing"
        raise MediaError("media.language", f"{what}; it knows {_listed(self.languages)}")


def load_media_tokenizer(model_dir: Path, *, limits: MediaLimits | None = None) -> MediaTokenizer:
    """The tokenizer and the extractor of a directory that `modality_of` knows.

    Never goes to the network and never runs code of the checkpoint's. Raises
    `ModelDirectoryError`.
    """
    config = read_model_config(model_dir)
    modality = modality_of(config)
    if modality is None:
        raise ModelDirectoryError(f"{model_dir}: this model neither hears nor sees")
    tokenizer, fingerprint = load_fast_tokenizer(model_dir)
    extractor = load_extractor(model_dir, modality, limits=limits)
    generation = read_generation_config(model_dir)
    return MediaTokenizer(model_dir, tokenizer, config, generation, fingerprint, extractor)


def _first(*values: object) -> int | None:
    return next((value for value in values if isinstance(value, int)), None)


def _speech_tokens(vocabulary: Mapping[str, int], start: int) -> _SpeechTokens:
    return _SpeechTokens(
        start,
        vocabulary.get("<|transcribe|>"),
        vocabulary.get("<|translate|>"),
        vocabulary.get("<|notimestamps|>"),
        vocabulary.get("<|startofprev|>"),
    )


def _is_multilingual(generation: Mapping[str, Any], vocabulary: Mapping[str, int]) -> bool:
    """The vocabularies of English-only models hold the languages' tokens, too."""
    told = generation.get("is_multilingual")
    if isinstance(told, bool):
        return told
    return "lang_to_id" in generation or len(vocabulary) >= _MULTILINGUAL_TOKENS


def _listed(languages: Sequence[Language]) -> str:
    return ", ".join(sorted(language.code for language in languages))
