"""What a model directory holds for its tokenizer: the fast tokenizer, and what the makers say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from miaotui.text.errors import ModelDirectoryError

# The longest text's tokens, by the families' names.
_CONTEXT_NAMES = ("max_target_positions", "max_position_embeddings", "n_positions", "n_ctx")
_DECODER_TYPES = frozenset(
    ("gemma", "gemma2", "gemma3_text", "gpt2", "llama", "mistral", "qwen2", "qwen3")
)
# Tokens that end a turn in well-known chat formats; those that a model's template writes
# end its texts, too, even where its makers forgot to say so.
_TURN_ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<end_of_turn>",
    "<turn|>",
    "<|end|>",
    "<|return|>",
    "<|endofturn|>",
    "<|end_of_turn|>",
)


def load_fast_tokenizer(model_dir: Path) -> tuple[Any, str]:
    """(transformers' fast tokenizer, its files' fingerprint). Raises `ModelDirectoryError`."""
    from transformers import AutoTokenizer  # takes seconds

    from miaotui.models.errors import ModelError
    from miaotui.models.fingerprint import tokenizer_fingerprint

    try:
        fingerprint = tokenizer_fingerprint(model_dir)
    except ModelError as error:
        raise ModelDirectoryError(str(error)) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model_dir, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # whatever a damaged file makes transformers raise
        raise ModelDirectoryError(
            f"{model_dir}: its tokenizer cannot be loaded ({type(error).__name__}: {error}); "
            "copy the tokenizer's files from the model's page again"
        ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise ModelDirectoryError(
            f"{model_dir}: {type(tokenizer).__name__} is not a fast tokenizer and has no offsets; "
            "add a tokenizer.json"
        )
    return tokenizer, fingerprint


def read_model_config(model_dir: Path) -> dict[str, Any]:
    """The directory's `config.json`. Raises `ModelDirectoryError`."""
    from miaotui.models.checkpoint import read_config
    from miaotui.models.errors import ModelError

    try:
        return read_config(model_dir)
    except ModelError as error:
        raise ModelDirectoryError(str(error)) from error


def read_generation_config(model_dir: Path) -> dict[str, Any]:
    """The directory's `generation_config.json`; empty where there is none.

    Raises `ModelDirectoryError`.
    """
    file = model_dir / "generation_config.json"
    if not file.is_file():
        return {}
    try:
        generation: Any = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelDirectoryError(
            f"{file}: cannot be read ({error}); copy it from the model's page again"
        ) from error
    if not isinstance(generation, dict):
        raise ModelDirectoryError(f"{file}: must hold a JSON object")
    return generation


def is_decoder(config: Mapping[str, Any]) -> bool:
    """Whether a model of this `config.json` writes text (otherwise it finds spans)."""
    names = config.get("architectures") or ()
    return any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in names) or (
        not names and str(config.get("model_type")) in _DECODER_TYPES
    )


def context_length(config: Mapping[str, Any], where: Path) -> int:
    """Most tokens of a text, that which a decoder is given and that which it writes together.

    `config`: of the decoder; `where` is named in the error. Raises `ModelDirectoryError`.
    """
    text_config = config.get("text_config") or {}
    for name in _CONTEXT_NAMES:
        value = config.get(name, text_config.get(name))
        if isinstance(value, int) and value > 0:
            return value
    raise ModelDirectoryError(
        f"{where}: config.json says nothing of the longest text ({' or '.join(_CONTEXT_NAMES)})"
    )


def stop_ids(tokenizer: Any, config: Mapping[str, Any], generation: Mapping[str, Any]) -> list[int]:
    """The tokens that end a model's texts."""
    found: set[int] = set()
    text_config = config.get("text_config") or {}
    for value in (
        generation.get("eos_token_id"),
        config.get("eos_token_id", text_config.get("eos_token_id")),
        tokenizer.eos_token_id,
    ):
        found.update(value if isinstance(value, list) else () if value is None else (value,))
    template = json.dumps(tokenizer.chat_template or "", ensure_ascii=False)
    vocabulary = tokenizer.backend_tokenizer
    for text in _TURN_ENDS:
        token = vocabulary.token_to_id(text)
        if token is not None and text in template:
            found.add(token)
    return sorted(found)
