"""KV blocks: who holds which, and which hold a beginning that others may share.

Paged after PagedAttention (Kwon et al., SOSP 2023). A full block is known by a hash of its
tokens and of all before them, so that sequences that begin alike share blocks.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable, Sequence


class BlockPool:
    """Counts who uses each of the blocks 0 to `blocks` - 1. Not thread-safe.

    A published block that nobody uses any more keeps its content until the room is needed;
    the one that was used least recently goes first.
    """

    def __init__(self, blocks: int) -> None:
        if blocks < 1:
            raise ValueError(f"a pool of {blocks} blocks holds nothing")
        self.blocks = blocks
        self._users = [0] * blocks
        # As a stack: what was freed last is warm in the hardware's caches.
        self._empty = list(range(blocks - 1, -1, -1))
        self._digests: list[bytes | None] = [None] * blocks
        self._published: dict[bytes, int] = {}
        self._idle: dict[int, None] = {}

    @property
    def available(self) -> int:
        """Blocks that `take` can give out."""
        return len(self._empty) + len(self._idle)

    @property
    def used(self) -> int:
        """Blocks that somebody uses."""
        return self.blocks - self.available

    @property
    def cached(self) -> int:
        """Blocks that nobody uses, kept for their content."""
        return len(self._idle)

    def take(self, count: int) -> list[int]:
        """Gives out blocks with nothing in them. Raises `MemoryError` if there are fewer."""
        if count > self.available:
            raise MemoryError(f"{count} KV blocks wanted, {self.available} are free")
        taken: list[int] = []
        for _ in range(count):
            if self._empty:
                block = self._empty.pop()
            else:
                block = next(iter(self._idle))
                del self._idle[block]
                self._retract(block)
            self._users[block] = 1
            taken.append(block)
        return taken

    def find(self, digests: Sequence[bytes], limit: int) -> list[int]:
        """The published blocks of the longest known beginning, of at most `limit` blocks."""
        found: list[int] = []
        for digest in digests[:limit]:
            block = self._published.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def idle(self, blocks: Iterable[int]) -> int:
        """How many of these blocks nobody uses: sharing them costs so many of `available`."""
        return sum(not self._users[block] for block in blocks)

    def share(self, blocks: Iterable[int]) -> None:
        """Adds a user to each of these published blocks."""
        for block in blocks:
            if not self._users[block]:
                del self._idle[block]
            self._users[block] += 1

    def give_back(self, blocks: Sequence[int]) -> None:
        """Takes a user from each block of a sequence, given in the sequence's order."""
        # From the end: of a beginning, the part that most have in common stays longest.
        for block in reversed(blocks):
            users = self._users[block] - 1
            if users < 0:
                raise ValueError(f"KV block {block} is not in use")
            self._users[block] = users
            if users:
                continue
            if self._digests[block] is None:
                self._empty.append(block)
            else:
                self._idle[block] = None

    def publish(self, block: int, digest: bytes) -> None:
        """Lets others share a block: its keys and values are there, at every stage.

        Nothing happens where another block with the same content is published already.
        """
        if digest not in self._published and self._digests[block] is None:
            self._published[digest] = block
            self._digests[block] = digest

    def clear(self) -> None:
        """Forgets all users and contents."""
        self._users = [0] * self.blocks
        self._empty = list(range(self.blocks - 1, -1, -1))
        self._digests = [None] * self.blocks
        self._published.clear()
        self._idle.clear()

    def _retract(self, block: int) -> None:
        digest = self._digests[block]
        if digest is not None:
            del self._published[digest]
            self._digests[block] = None


class BlockHasher:
    """Names a block's content: 128 bits, keyed, so that nobody can make two contents collide."""

    def __init__(self) -> None:
        self._key = secrets.token_bytes(16)

    def digest(self, parent: bytes, tokens: bytes) -> bytes:
        """Names a block by its `tokens` and the block before it.

        For the first block `parent` is its salt: blocks of different salts are never shared.
        """
        return hashlib.blake2b(parent + tokens, digest_size=16, key=self._key).digest()
