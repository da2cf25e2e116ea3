"""Where the tokens of a decoder's batch lie: in the batch, in their sequences, in the KV cache.

Made once a batch and shared by all layers of a stage; layers of one sliding window (or of
none) also share what `rows` and `spans` return.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch

from miaotui.engine.decode.types import DecodeSlice
from miaotui.models.errors import BatchError
from miaotui.models.kv_cache import KVCache

Index = npt.NDArray[np.int64]

# Rows of a group are padded to the longest: at most so many places a head in vain before a
# group of its own pays for the calls that it costs.
_PADDING = 512


@dataclass(frozen=True, slots=True)
class Span:
    """A slice that attends as a block: the first chunk of a prompt, or a later one.

    `first` and `length` say where it lies in the batch, `start` at which position of the
    sequence it begins. `context`, int64 [start + length - low], are the slots of the positions
    from `low` on that any of its tokens attends to; None where the slice is its own context.
    """

    first: int
    length: int
    start: int
    low: int
    context: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Rows:
    """Tokens that attend one by one, each over the slots of its own context.

    `rows`, int64 [n], are their places in the batch, None for all in order; `context`, int64
    [n, longest], the slots of their contexts, padded with a slot of their own; `mask`, bool
    [n, longest], False where padded, None where nothing is. `run` is the first slot of a
    single row's context whose slots follow one another, else None.
    """

    rows: torch.Tensor | None
    context: torch.Tensor
    mask: torch.Tensor | None
    run: int | None = None


class PagedLayout:
    """The layout of one batch."""

    def __init__(
        self,
        lengths: Sequence[int],
        slices: Sequence[DecodeSlice],
        cache: KVCache,
        device: torch.device,
        *,
        row_tokens: int,
    ) -> None:
        """Check and lay out a batch.

        Args:
            lengths: tokens of each slice, laid end to end.
            slices: the slices, in the same order.
            cache: the stage's cache.
            device: where the tensors go.
            row_tokens: slices that continue a sequence and have at most so many tokens attend
                token by token.

        Raises:
            BatchError: slices and lengths contradict each other, or name no block of the cache.
        """
        self.cache = cache
        self._device = device
        self._size = size = cache.block_tokens
        _check(lengths, slices, cache)
        self.offsets = tuple(accumulate(lengths, initial=0))
        tokens = self.offsets[-1]
        self._slices, self._lengths = slices, lengths
        width = max(len(item.blocks) for item in slices)
        table = np.zeros((len(slices), width), np.int64)
        for index, item in enumerate(slices):
            table[index, : len(item.blocks)] = item.blocks
        low, high = int(table.min()), int(table.max())
        if low < 0 or high >= cache.blocks:
            raise BatchError(f"blocks {low} to {high} were named; the cache has {cache.blocks}")
        self._table = table
        starts = np.fromiter((item.start for item in slices), np.int64, len(slices))
        if tokens == len(slices):
            owner = np.arange(tokens)
            positions = starts
        else:
            owner = np.repeat(np.arange(len(slices)), lengths)
            positions = np.arange(tokens) + np.repeat(starts - self.offsets[:-1], lengths)
        self._owner, self._positions = owner, positions
        slots = table[owner, positions // size] * size + positions % size
        self.positions = self._tensor(positions)
        """int64 [tokens]: each token's position in its sequence."""
        self.slots = self._tensor(slots)
        """int64 [tokens]: each token's slot in the cache."""
        alone = [
            length <= (row_tokens if item.start else 1)
            for item, length in zip(slices, lengths, strict=True)
        ]
        self._alone = np.flatnonzero(np.asarray(alone)[owner])
        self._blocks = [index for index, flag in enumerate(alone) if not flag]
        self._longest = int(positions.max()) + 1
        self._rows: dict[int | None, list[Rows]] = {}
        self._spans: dict[int | None, list[Span]] = {}

    def rows(self, window: int | None) -> list[Rows]:
        """Return the tokens that attend one by one, in groups of about equal contexts.

        Args:
            window: at most so many positions are attended to, the token's own included.
        """
        window = self._window(window)
        if window not in self._rows:
            self._rows[window] = self._make_rows(window)
        return self._rows[window]

    def spans(self, window: int | None) -> list[Span]:
        """Return the slices that attend as a block; `window` as for `rows`."""
        window = self._window(window)
        if window not in self._spans:
            self._spans[window] = [self._make_span(index, window) for index in self._blocks]
        return self._spans[window]

    def _window(self, window: int | None) -> int | None:
        return None if window is None or window >= self._longest else window

    def _make_rows(self, window: int | None) -> list[Rows]:
        places = self._alone
        if not len(places):
            return []
        counts = self._positions[places] + 1
        if window is not None:
            counts = np.minimum(counts, window)
        groups = _group(counts)
        whole = len(groups) == 1 and len(places) == self.offsets[-1]
        return [self._make_group(places[group], counts[group], whole=whole) for group in groups]

    def _make_group(self, places: Index, counts: Index, *, whole: bool) -> Rows:
        longest = int(counts.max())
        ends = self._positions[places]
        steps = np.arange(longest)
        taken = np.minimum(steps, counts[:, None] - 1) + (ends - counts + 1)[:, None]
        slots = self._slots_of(self._owner[places][:, None], taken)
        mask = None
        if int(counts.min()) < longest:
            mask = torch.from_numpy(steps < counts[:, None]).to(self._device)
        run = None
        if len(places) == 1 and (np.diff(slots[0]) == 1).all():
            run = int(slots[0, 0])
        return Rows(None if whole else self._tensor(places), self._tensor(slots), mask, run)

    def _make_span(self, index: int, window: int | None) -> Span:
        start, length = self._slices[index].start, self._lengths[index]
        low = 0 if window is None else max(0, start + 1 - window)
        context = None
        if start:
            context = self._tensor(self._slots_of(index, np.arange(low, start + length)))
        return Span(self.offsets[index], length, start, low, context)

    def _slots_of(self, owner: Index | int, positions: Index) -> Index:
        size = self._size
        slots: Index = self._table[owner, positions // size] * size + positions % size
        return slots

    def _tensor(self, array: Index) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)


def _group(counts: Index) -> list[Index]:
    """Divide rows into groups that waste little when each is padded to its longest row."""
    order = np.argsort(-counts, kind="stable")
    first, last = int(counts[order[0]]), int(counts[order[-1]])
    if (first - last) * len(order) <= _PADDING:
        return [np.arange(len(counts))]
    groups: list[Index] = []
    begin, waste = 0, 0
    for index in range(len(order)):
        padding = int(counts[order[begin]] - counts[order[index]])
        if waste + padding > max(_PADDING, int(counts[order[begin : index + 1]].sum()) // 8):
            groups.append(np.sort(order[begin:index]))
            begin, waste = index, 0
        else:
            waste += padding
    groups.append(np.sort(order[begin:]))
    return groups


def _check(lengths: Sequence[int], slices: Sequence[DecodeSlice], cache: KVCache) -> None:
    if len(lengths) != len(slices) or not slices:
        raise BatchError(f"the batch has {len(slices)} slices and {len(lengths)} lengths")
    for item, length in zip(slices, lengths, strict=True):
        end = item.start + length
        if length < 1 or item.start < 0 or not 0 <= item.samples <= length:
            raise BatchError(
                f"a slice of {length} tokens from position {item.start} with {item.samples} "
                "samples cannot be"
            )
        if len(item.blocks) * cache.block_tokens < end:
            raise BatchError(
                f"{len(item.blocks)} blocks of {cache.block_tokens} tokens do not hold {end}"
            )
