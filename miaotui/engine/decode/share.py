"""A lane's share of a stage's KV cache: from a lane's block numbers and ids to the stage's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from miaotui.engine.decode.types import DecodeSlice, SampledTokens

# A stage 0 counts its sequences from 1; in its lifetime there are fewer than this.
_IDS = 1 << 48


class KvShare:
    """Several heads number their blocks and sequences from 0 and 1; a stage keeps them apart.

    A share that begins at block 0 changes nothing, so that a lane alone costs nothing.
    """

    def __init__(self, first_block: int = 0, index: int = 0) -> None:
        """`first_block`: of the share's blocks, at this stage; `index`: among the shares."""
        self.index = index
        self._first_block = first_block
        self._first_id = index * _IDS
        self._owed: list[int] = []
        self._live: dict[int, None] = {}

    def slices(self, slices: list[DecodeSlice]) -> list[DecodeSlice]:
        """The slices as the stage numbers their blocks and sequences."""
        for item in slices:
            if item.begin is not None:
                self._live[item.sequence_id] = None
        if not self.index:
            return slices
        return [
            replace(
                item,
                sequence_id=item.sequence_id + self._first_id,
                blocks=item.blocks + self._first_block,
            )
            for item in slices
        ]

    def settle(self, ids: Iterable[int]) -> list[int]:
        """Sequences that a batch reports as ended, and before them those that are owed."""
        ended = [*self._owed, *ids]
        self._owed = []
        for sequence_id in ended:
            self._live.pop(sequence_id, None)
        return ended

    def released(self, ids: Iterable[int]) -> list[int]:
        """Sequences that have ended, as the stage numbers them."""
        return [sequence_id + self._first_id for sequence_id in ids]

    def owe(self, ids: Iterable[int]) -> None:
        """These sequences have ended, and the next batch is to report them."""
        self._owed.extend(ids)

    def sampled(self, sampled: list[SampledTokens]) -> list[SampledTokens]:
        """What was sampled, as the head numbers its sequences."""
        if self.index:
            for item in sampled:
                item.sequence_id -= self._first_id
        return sampled

    def end(self) -> None:
        """The lane has ended, and with it all of its sequences."""
        self._owed = list(self._live)
        self._live = {}
