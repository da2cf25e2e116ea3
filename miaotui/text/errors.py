"""What can be wrong with a text, a window or a model directory.

Messages name the field, say what is wrong and what to do, and never quote the text.
"""

from __future__ import annotations


class ModelDirectoryError(ValueError):
    """A model directory that this tokenizer cannot serve."""


class TextError(ValueError):
    """Something that the caller sent is at fault; `field` says what."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field


class EmptyTextError(TextError):
    """A text of which nothing is left to tokenise."""


class TextTooLargeError(TextError):
    """More characters, windows or spans than the limits allow."""


class WindowError(TextError):
    """A window that cannot hold the question and part of the passage."""


class FingerprintMismatchError(TextError):
    """Tokens of another tokenizer, or made with other options."""


class MalformedTokensError(TextError):
    """A tokenised text whose arrays do not fit together."""


class TokenRangeError(TextError):
    """A token span outside of the passage, or an id outside of the vocabulary."""


class WrongModelError(TextError):
    """Something that this kind of model does not do."""
