"""How the first stage of an encoder embeds packed sequences."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn

from miaotui.models.attention import PackedSequences


class Embedding(Protocol):
    """Computes a first stage's input activations."""

    def __call__(
        self,
        input_ids: torch.Tensor,
        token_type_ids: torch.Tensor | None,
        packed: PackedSequences,
        words: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return [tokens, hidden_size] for int64 ids [tokens].

        `words`, [tokens, embedding_size], takes the place of the ids' word embeddings.
        """
        ...

    def words(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the word embeddings of int64 ids: [tokens, embedding_size]."""
        ...

    @property
    def pad_token_id(self) -> int | None:
        """The padding token, where there is one."""
        ...


class BertEmbedding:
    """Calls a BERT-like embeddings module with positions that restart at each sequence."""

    def __init__(
        self,
        embeddings: nn.Module,
        project: nn.Module | None,
        pad_token_id: int | None,
        *,
        padded_positions: bool,
        token_types: bool,
    ) -> None:
        """`project`: what stands behind the embeddings, if anything; see `ExtractiveFamily`."""
        self._embeddings = embeddings
        self._project = project
        self._pad = pad_token_id
        self._padded_positions = padded_positions
        self._token_types = token_types

    def __call__(
        self,
        input_ids: torch.Tensor,
        token_type_ids: torch.Tensor | None,
        packed: PackedSequences,
        words: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if self._padded_positions:
            assert self._pad is not None
            positions = padded_position_ids(input_ids, packed, self._pad)
        else:
            positions = position_ids(packed)
        arguments: dict[str, torch.Tensor | None]
        if words is None:
            arguments = {"input_ids": input_ids[None], "position_ids": positions[None]}
        else:
            arguments = {"input_ids": None, "position_ids": positions[None]}
            arguments["inputs_embeds"] = words[None]
        if self._token_types:
            if token_type_ids is None:
                token_type_ids = torch.zeros_like(input_ids)
            arguments["token_type_ids"] = token_type_ids[None]
        hidden: torch.Tensor = self._embeddings(**arguments)
        if self._project is not None:
            hidden = self._project(hidden)
        return hidden[0]

    def words(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the word embeddings of int64 ids: [tokens, embedding_size]."""
        embeddings: Any = self._embeddings
        found: torch.Tensor = embeddings.word_embeddings(input_ids)
        return found

    @property
    def pad_token_id(self) -> int | None:
        """The padding token, where there is one."""
        return self._pad


def position_ids(packed: PackedSequences) -> torch.Tensor:
    """Return int64 [tokens] that count from 0 within each sequence."""
    if len(packed.lengths) == 1:
        return torch.arange(packed.lengths[0], device=packed.device)
    tokens = torch.arange(packed.offsets[-1], device=packed.device)
    return tokens - _repeat(tokens[torch.tensor(packed.offsets[:-1], device=packed.device)], packed)


def padded_position_ids(
    input_ids: torch.Tensor, packed: PackedSequences, pad_token_id: int
) -> torch.Tensor:
    """Return int64 [tokens] as RoBERTa counts positions within each sequence.

    As transformers' `create_position_ids_from_input_ids` does for an unpadded sequence:
    from `pad_token_id + 1` on; a token that happens to be the padding id (a text may hold it)
    gets `pad_token_id` itself and is not counted.
    """
    counted = input_ids.ne(pad_token_id).long()
    running = counted.cumsum(0)
    if len(packed.lengths) > 1:
        starts = torch.tensor(packed.offsets[:-1], device=input_ids.device)
        running = running - _repeat(running[starts] - counted[starts], packed)
    return running * counted + pad_token_id


def _repeat(per_sequence: torch.Tensor, packed: PackedSequences) -> torch.Tensor:
    lengths = torch.tensor(packed.lengths, device=per_sequence.device)
    return per_sequence.repeat_interleave(lengths, output_size=packed.offsets[-1])
