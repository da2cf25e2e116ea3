"""How lanes share a stage's KV cache: each has blocks and sequence ids of its own."""

from __future__ import annotations

from miaotui.engine.decode.share import KvShare


class NoShareError(Exception):
    """All shares of the KV cache are taken."""


class Shares:
    """As many equal shares as lanes are expected; one lane alone has all blocks."""

    def __init__(self, blocks: int, count: int) -> None:
        """`blocks`: of this stage; 0: it keeps no keys and values, and lanes are not bounded."""
        self.blocks = blocks // count
        """Of one share."""
        self._shares = [KvShare(index * self.blocks, index) for index in range(count)]
        self._free = list(reversed(self._shares))
        self._bounded = blocks > 0

    @property
    def count(self) -> int:
        """Shares in all."""
        return len(self._shares)

    def of(self, index: int) -> KvShare:
        """The share of this index, whoever has it."""
        return self._shares[index]

    @property
    def free(self) -> bool:
        """Whether a lane may be added."""
        return not self._bounded or bool(self._free)

    def take(self) -> KvShare:
        """A share for a lane. Raises `NoShareError`."""
        if not self._bounded:
            return KvShare()
        if not self._free:
            raise NoShareError(
                f"all {len(self._shares)} shares of the KV cache are taken; for more replicas of "
                "stage 0 or of this stage, set kv-shares higher"
            )
        return self._free.pop()

    def give_back(self, share: KvShare) -> None:
        """A lane has ended."""
        if self._bounded:
            share.end()
            self._free.append(share)
            self._free.sort(key=lambda one: -one.index)
