"""The languages that a model hears."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Language:
    """A language that a model hears: "en", "english", and the token that names it."""

    code: str
    name: str
    token: int


def known_languages(
    vocabulary: Mapping[str, int], generation: Mapping[str, Any]
) -> tuple[Language, ...]:
    """The languages that a vocabulary has tokens for, or `generation_config.json` names."""
    from transformers.models.whisper.tokenization_whisper import LANGUAGES  # takes seconds

    named = generation.get("lang_to_id")
    if not isinstance(named, dict):
        named = vocabulary
    return tuple(
        Language(code, name, int(named[f"<|{code}|>"]))
        for code, name in LANGUAGES.items()
        if f"<|{code}|>" in named
    )
