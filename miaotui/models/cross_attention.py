"""A decoder's attention to what its encoder made of a sound or a picture.

The encoder's rows become keys and values once a sequence, in the sequence's first KV blocks, and
are read there at every later step, as a text's own keys and values are.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from miaotui.engine.decode.types import DecodeSlice
from miaotui.models.errors import BatchError
from miaotui.models.kv_cache import KVCache
from miaotui.models.paged_attention import SparseRows, attend_rows
from miaotui.models.paged_layout import Index, Rows


class SourceLayout:
    """Where the encoder's rows of a batch's sequences lie in the KV cache; made once a batch.

    `memory`, [sequences that begin * rows, width], is what the encoder made for those.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        slices: Sequence[DecodeSlice],
        rows: int,
        cache: KVCache,
        device: torch.device,
        *,
        row_tokens: int,
        memory: torch.Tensor | None,
    ) -> None:
        """Lay out a batch; `rows`: of a sequence; the rest as for `PagedLayout`.

        Raises:
            BatchError: a slice names no blocks for the rows, or such as the cache does not have.
        """
        self.memory = memory
        self.patterns: dict[tuple[int, int], SparseRows] = {}
        size = cache.block_tokens
        count = -(-rows // size)
        if any(len(item.blocks) < count for item in slices):
            raise BatchError(f"fewer than the {count} blocks of {rows} rows were named")
        table = np.array([item.blocks[:count] for item in slices], np.int64)
        if int(table.min()) < 0 or int(table.max()) >= cache.blocks:
            raise BatchError(
                f"source blocks were named that are none of the cache's {cache.blocks}"
            )
        places = np.arange(rows)
        slots = table[:, places // size] * size + places % size
        fresh = [index for index, item in enumerate(slices) if item.begin is not None]
        self.fresh = torch.from_numpy(slots[fresh].reshape(-1)).to(device)
        """int64 [sequences that begin * rows]: the slots of `memory`."""
        offsets = tuple(accumulate(lengths, initial=0))
        alone = np.array([length <= row_tokens for length in lengths])
        owner = np.repeat(np.arange(len(slices)), lengths)
        self.rows = _rows(owner, alone, slots, device)
        """The tokens that attend one by one."""
        self.spans = [
            (offsets[index], length, torch.from_numpy(slots[index]).to(device))
            for index, length in enumerate(lengths)
            if not alone[index]
        ]
        """(first token, tokens, slots) of each slice that attends as a block."""


def _rows(owner: Index, alone: Any, slots: Index, device: torch.device) -> Rows | None:
    places = np.flatnonzero(alone[owner])
    if not len(places):
        return None
    context = slots[owner[places]]
    run = None
    if len(places) == 1 and (np.diff(context[0]) == 1).all():
        run = int(context[0, 0])
    whole = len(places) == len(owner)
    rows = None if whole else torch.from_numpy(places).to(device)
    return Rows(rows, torch.from_numpy(context).to(device), None, run)


class SourceReader:
    """Hands a batch's layout to the layers, which transformers does not pass it on to."""

    layout: SourceLayout


class CrossAttention(nn.Module):
    """Stands in for the attention module of a decoder layer that reads the encoder's rows."""

    def __init__(
        self, attention: Any, keys: torch.Tensor, values: torch.Tensor, reader: SourceReader
    ) -> None:
        """Take a loaded module of transformers' and its layer's cache."""
        super().__init__()
        self._keys, self._values, self._reader = keys, values, reader
        self._scaling: float = attention.scaling
        self._joined: nn.Module | None
        if hasattr(attention, "c_attn"):
            self.query, self.output = attention.q_attn, attention.c_proj
            self._joined = attention.c_attn
        else:
            self.query, self.output = attention.q_proj, attention.out_proj
            self._joined = None
            self.key, self.value = attention.k_proj, attention.v_proj

    def forward(self, hidden: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        """Return [1, tokens, width] for such an input, and None for the weights."""
        layout = self._reader.layout
        if layout.memory is not None:
            self._keep(layout.memory, layout.fresh)
        query = self.query(hidden[0]).view(-1, *self._keys.shape[1:])
        return self.output(self._attend(query, layout).flatten(1))[None], None

    def _keep(self, memory: torch.Tensor, slots: torch.Tensor) -> None:
        if self._joined is not None:
            key, value = self._joined(memory).chunk(2, -1)
        else:
            key, value = self.key(memory), self.value(memory)
        self._keys.index_copy_(0, slots, key.reshape(-1, *self._keys.shape[1:]))
        self._values.index_copy_(0, slots, value.reshape(-1, *self._values.shape[1:]))

    def _attend(self, query: torch.Tensor, layout: SourceLayout) -> torch.Tensor:
        """Return [tokens, heads, head_dim] for `query` of that shape."""
        rows, scaling = layout.rows, self._scaling
        if rows is not None and rows.rows is None:
            return attend_rows(query, self._keys, self._values, layout.patterns, rows, scaling)
        output = torch.empty_like(query)
        if rows is not None:
            assert rows.rows is not None
            picked = query.index_select(0, rows.rows)
            done = attend_rows(picked, self._keys, self._values, layout.patterns, rows, scaling)
            output.index_copy_(0, rows.rows, done)
        for first, length, slots in layout.spans:
            here = slice(first, first + length)
            key, value = (cache.index_select(0, slots) for cache in (self._keys, self._values))
            q, k, v = (part.transpose(0, 1) for part in (query[here], key, value))
            output[here] = scaled_dot_product_attention(q, k, v, scale=scaling).transpose(0, 1)
        return output
