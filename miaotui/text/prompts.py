"""A decoder's tokenizer: texts and chats to prompts."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from miaotui.text.alignment import IntArray
from miaotui.text.characters import table
from miaotui.text.cleaning import TextOptions, clean
from miaotui.text.directory import (
    context_length,
    load_fast_tokenizer,
    read_generation_config,
    read_model_config,
    stop_ids,
)
from miaotui.text.errors import TextError, TextTooLargeError
from miaotui.text.tokenizer import LONG_TEXT, Limits

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
# A noncharacter, which no text may hold: stands within what must not become a special token.
_BREAK = "\ufdd0"
_MESSAGE_CHARACTERS = 300


class PromptError(TextError):
    """A chat that cannot be made a prompt."""


@dataclass(frozen=True, slots=True)
class Chat:
    """Messages (`role`, `content` and what else the template knows), and the template's inputs."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)
    continue_last: bool = False


class PromptTokenizer:
    """Renders and tokenises for one decoder. Thread-safe."""

    def __init__(
        self,
        model_dir: Path,
        tokenizer: Any,
        config: Mapping[str, Any],
        generation: Mapping[str, Any],
        fingerprint: str,
        limits: Limits,
    ) -> None:
        """See `load_prompt_tokenizer`; `tokenizer` is a fast one of transformers'."""
        self.model_dir = model_dir
        self.fingerprint = fingerprint
        self.limits = limits
        self._tokenizer = tokenizer
        self.backend: Any = tokenizer.backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()
        self.vocab_size: int = max(self.backend.get_vocab(with_added_tokens=True).values()) + 1
        self.context_length = context_length(config, model_dir)
        self.has_chat_template = bool(tokenizer.chat_template)
        self._knows_developer = "developer" in json.dumps(tokenizer.chat_template or "")
        self.stop_token_ids = stop_ids(tokenizer, config, generation)
        self.sampling: dict[str, float] = {
            name: generation[name]
            for name in _SAMPLING
            if isinstance(generation.get(name), int | float)
        }
        added = tokenizer.added_tokens_decoder.values()
        special = [token.content for token in added if token.special and len(token.content) > 1]
        alternatives = "|".join(re.escape(text) for text in sorted(special, key=len, reverse=True))
        self._special = re.compile(alternatives) if special else None
        table()  # so that no request waits for it

    def encode_text(
        self, text: str, options: TextOptions | None = None, *, add_special_tokens: bool = True
    ) -> IntArray:
        """A text's tokens: int32 [tokens]. Raises `TextTooLargeError` and `PromptError`."""
        self._check_size("text", len(text))
        if options is not None:
            text = clean(text, options).text
        ids = self._encode(text, add_special_tokens)
        if not len(ids):
            raise PromptError("text", "is empty, and this model's texts begin with no token")
        return ids

    def encode_chat(self, chat: Chat, options: TextOptions | None = None) -> IntArray:
        """A chat's tokens: int32 [tokens]. Raises `TextTooLargeError` and `PromptError`."""
        rendered = self.render(chat, options)
        parts = [self._encode(part, False) for part in rendered.split(_BREAK) if part]
        if not parts:
            raise PromptError("chat", "the model's chat template makes an empty text of it")
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def render(self, chat: Chat, options: TextOptions | None = None) -> str:
        """The template's text, with a noncharacter (U+FDD0) in each special token that a message
        spells: text must not be able to end its own turn."""
        if not chat.messages:
            raise PromptError("chat.messages", "is empty; send at least one message")
        if not self.has_chat_template:
            raise PromptError(
                "chat", "this model has no chat template; send a text, or add chat_template.jinja"
            )
        from jinja2.exceptions import TemplateError

        try:
            self._check_size("chat", sum(len(str(message)) for message in chat.messages))
            messages = self._guarded(chat.messages, options)
            if not self._knows_developer:
                # OpenAI's newer name of the role; templates that do not know it refuse it.
                for message in messages:
                    if message.get("role") == "developer":
                        message["role"] = "system"
            return str(
                self._tokenizer.apply_chat_template(
                    messages,
                    tools=self._guarded(chat.tools, None) or None,
                    tokenize=False,
                    add_generation_prompt=not chat.continue_last,
                    continue_final_message=chat.continue_last,
                    **chat.variables,
                )
            )
        except TextTooLargeError:
            raise
        except TemplateError as error:
            reason = (error.message or type(error).__name__)[:_MESSAGE_CHARACTERS]
            raise PromptError("chat", f"the model's chat template refuses it: {reason}") from None
        except Exception as error:  # a template is a program, and fails in any way
            raise PromptError(
                "chat",
                f"the model's chat template cannot render it ({type(error).__name__}); check "
                "the roles, their order, and the fields that the template needs",
            ) from error

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Text of the ids; those outside of the vocabulary have none."""
        text: str = self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def _encode(self, text: str, add_special_tokens: bool) -> IntArray:
        if len(text) < LONG_TEXT:
            encoding = self.backend.encode(text, add_special_tokens=add_special_tokens)
        else:  # this binding releases the GIL
            (encoding,) = self.backend.encode_batch([text], add_special_tokens=add_special_tokens)
        return np.array(encoding.ids, np.int32)

    def _guarded(self, value: Any, options: TextOptions | None) -> Any:
        if isinstance(value, str):
            text = value.replace(_BREAK, "")
            if options is not None:
                text = clean(text, options).text
            if self._special is None:
                return text
            return self._special.sub(lambda found: found[0][0] + _BREAK + found[0][1:], text)
        if isinstance(value, Mapping):
            return {name: self._guarded(item, options) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._guarded(item, options) for item in value]
        return value

    def _check_size(self, name: str, characters: int) -> None:
        if characters > self.limits.max_characters:
            raise TextTooLargeError(
                name,
                f"{characters} characters; at most {self.limits.max_characters} are taken, "
                "shorten it or raise the service's max_characters",
            )


def load_prompt_tokenizer(model_dir: Path, *, limits: Limits | None = None) -> PromptTokenizer:
    """The fast tokenizer of a decoder's Hugging Face directory, as `AutoTokenizer` loads it.

    Reads `config.json` for the context's length and `generation_config.json`, where there is
    one, for the tokens that end a text and the sampling that the makers advise. Never goes to
    the network and never runs code of the checkpoint's, but its chat template, in a sandbox.
    Raises `ModelDirectoryError`.
    """
    config = read_model_config(model_dir)
    tokenizer, fingerprint = load_fast_tokenizer(model_dir)
    generation = read_generation_config(model_dir)
    return PromptTokenizer(
        model_dir, tokenizer, config, generation, fingerprint, limits or Limits()
    )
