"""Tokens that a model must never write, or never begin a text with, as its makers found.

Whisper's generation configuration lists them: symbols that are not spoken, and an end before any
word (Radford et al., 2022, arXiv:2212.04356).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from miaotui.engine.decode.directory import configured
from miaotui.models.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Suppression:
    """Token ids, int64 on the logits' device."""

    always: torch.Tensor
    at_begin: torch.Tensor
    """Not as a text's first token."""

    @classmethod
    def read(cls, directory: Path, vocab_size: int, device: torch.device) -> Suppression | None:
        """Return what a model directory asks for; None: nothing.

        Raises:
            CheckpointError: what it lists are no token ids.
        """
        always = _ids(directory, "suppress_tokens", vocab_size)
        at_begin = _ids(directory, "begin_suppress_tokens", vocab_size)
        if not always and not at_begin:
            return None
        return cls(
            *(torch.tensor(ids, dtype=torch.int64, device=device) for ids in (always, at_begin))
        )

    def apply(self, logits: torch.Tensor, firsts: Sequence[int]) -> None:
        """Rule the tokens out of logits [n, vocab_size], in place.

        `firsts`: the rows that a text's first token is sampled from.
        """
        logits.index_fill_(1, self.always, -torch.inf)
        if firsts and len(self.at_begin):
            rows = torch.tensor(firsts, device=logits.device)
            logits[rows[:, None], self.at_begin] = -torch.inf


def _ids(directory: Path, name: str, vocab_size: int) -> list[int]:
    found = configured(directory, name)
    if found is None:
        return []
    file, value = found
    if not isinstance(value, list) or not all(type(token) is int for token in value):
        raise CheckpointError(f"{file}: {name} must be a list of token ids")
    # One that the model has no logit for is never written anyway.
    return [token for token in value if 0 <= token < vocab_size]
